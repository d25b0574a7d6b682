use crate::outcome::Failure;
use crate::record::JobDir;

/// The job that a name on the command line means.
pub(in crate::cli) fn choose<'a>(all: &'a [JobDir], name: &str) -> Result<&'a JobDir, Failure> {
    if let Some(job) = all
        .iter()
        .find(|j| j.key().to_string() == name || j.key().machine_name() == name)
    {
        return Ok(job);
    }
    let by_number: Vec<&JobDir> = all.iter().filter(|j| j.key().id.to_string() == name).collect();
    match by_number.as_slice() {
        [one] => Ok(one),
        [] => Err(Failure::system(format!(
            "no job \"{}\" has a machine here",
            crate::report::plain(name, 60)
        ))
        .hint("`cannery vm list` shows those that have")),
        several => {
            let keys: Vec<String> = several.iter().map(|j| j.key().to_string()).collect();
            Err(
                Failure::system(format!("job {name} is ambiguous: it may be {}", keys.join(", ")))
                    .hint("Name the job as `cannery vm list` shows it"),
            )
        }
    }
}
