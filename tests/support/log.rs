//! A job log, made readable: without time stamps, colours and section marks.

/// The text of a raw job log, as somebody reads it in the browser with all sections unfolded.
pub fn readable(raw: &[u8]) -> String {
    let raw = String::from_utf8_lossy(raw);
    let mut joined = String::new();
    for line in raw.split_inclusive('\n') {
        match time_stamped(line) {
            // A plus sign says that the line goes on where the one before ended.
            Some((true, rest)) => {
                while joined.ends_with('\n') {
                    joined.pop();
                }
                joined.push_str(rest);
            }
            Some((false, rest)) => joined.push_str(rest),
            None => joined.push_str(line),
        }
    }
    let mut text = String::new();
    for line in without_escapes(&joined).trim_end_matches('\n').split('\n') {
        // `section_start:TIME:NAME` and `section_end:TIME:NAME` end with a carriage return; they may follow each other.
        let rest = match line.rsplit_once('\r') {
            Some((marks, rest)) if marks.starts_with("section_") => rest,
            _ => line,
        };
        if !rest.is_empty() || rest == line {
            text.push_str(rest);
            text.push('\n');
        }
    }
    text
}

/// `2026-11-21T07:32:05.171923Z 00O text` → (goes on, text)
fn time_stamped(line: &str) -> Option<(bool, &str)> {
    let (stamp, rest) = line.split_once(' ')?;
    let is_stamp = stamp.len() == 27 && stamp.ends_with('Z') && stamp.as_bytes()[10] == b'T';
    let flag = rest.as_bytes().get(3)?;
    let kind = rest.as_bytes().get(2)?;
    (is_stamp && matches!(kind, b'O' | b'E') && matches!(flag, b' ' | b'+'))
        .then(|| (*flag == b'+', &rest[4..]))
}

fn without_escapes(text: &str) -> String {
    let mut plain = String::new();
    let mut characters = text.chars();
    while let Some(character) = characters.next() {
        if character != '\x1b' {
            plain.push(character);
            continue;
        }
        // ESC [ parameters, up to a letter.
        for end in characters.by_ref() {
            if end.is_ascii_alphabetic() {
                break;
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::readable;

    #[test]
    fn marks_colours_and_time_stamps_go() {
        let raw = b"2026-11-21T07:32:05.171955Z 00O section_start:1795246325:prepare_executor\r\x1b[0K\n\
            2026-11-21T07:32:05.171959Z 00O+\x1b[0K\x1b[36;1mPreparing\x1b[0;m\x1b[0;m\n\
            2026-11-21T07:32:05.204885Z 01E a  b\n\
            2026-11-21T07:32:05.205011Z 00O section_end:1795246325:prepare_executor\r\x1b[0K\n\
            2026-11-21T07:32:05.205338Z 00O+section_start:1795246325:get_sources\r\x1b[0K\n\
            2026-11-21T07:32:05.205348Z 00O+\x1b[0KGetting\n\n";
        assert_eq!(readable(raw), "Preparing\na  b\nGetting\n");
    }

    #[test]
    fn plain_lines_stay() {
        assert_eq!(readable(b"one two\n\nthree"), "one two\n\nthree\n");
    }
}
