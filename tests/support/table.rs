//! Tables of what was seen, for whoever runs the tests.

use std::fs::{self, OpenOptions};
use std::io::Write as _;

use super::guests::checkout;

/// Where tables are kept beside: what a test prints is shown by cargo only if the test fails.
pub const FILE: &str = ".cache/tables.txt";

/// Prints a table under a title, and adds it to [`FILE`].
pub fn show(title: &str, header: &[&str], rows: &[Vec<String>]) {
    let text = format!("\n{title}\n{}", table(header, rows));
    eprint!("{text}");
    let path = checkout().join(FILE);
    fs::create_dir_all(path.parent().expect("the file has a folder")).expect("a folder for tables");
    let mut file = OpenOptions::new()
        .create(true)
        .append(true)
        .open(path)
        .expect("the file of tables");
    file.write_all(text.as_bytes()).expect("room for a table");
}

/// Rows of cells between bars, with columns as wide as they need to be.
fn table(header: &[&str], rows: &[Vec<String>]) -> String {
    let header: Vec<String> = header.iter().map(|&name| name.to_owned()).collect();
    let widths: Vec<usize> = (0..header.len())
        .map(|column| {
            let cells = std::iter::once(&header).chain(rows);
            cells.map(|row| row[column].chars().count()).max().unwrap_or(0)
        })
        .collect();
    let line = |row: &Vec<String>| {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .map(|(cell, width)| format!("{cell:<width$}"))
            .collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let rule: Vec<String> = widths.iter().map(|width| "-".repeat(*width)).collect();
    let mut text = line(&header) + &line(&rule);
    rows.iter().for_each(|row| text.push_str(&line(row)));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cells_stand_below_each_other() {
        let rows = [vec!["one".to_owned(), String::new()]];
        assert_eq!(
            table(&["a", "long"], &rows),
            "| a   | long |\n| --- | ---- |\n| one |      |\n"
        );
    }
}
