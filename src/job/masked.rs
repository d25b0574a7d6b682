//! What GitLab hides from a job's log, and what is therefore kept out of everything that outlives the job.

use crate::secret::Secret;

/// What stands in the place of a hidden text: GitLab's own word.
const MASK: &str = "[MASKED]";
/// Shorter texts are no secrets, and stand by chance in any sentence. GitLab itself masks nothing of fewer than 8 characters.
const SHORTEST: usize = 4;

/// The tokens, passwords and masked variables of a job.
#[derive(Debug, Clone, Default)]
pub struct Masked(Vec<Secret>);

impl FromIterator<Secret> for Masked {
    fn from_iter<I: IntoIterator<Item = Secret>>(secrets: I) -> Self {
        let mut secrets: Vec<Secret> = secrets
            .into_iter()
            .filter(|secret| secret.reveal().chars().count() >= SHORTEST)
            .collect();
        // One that contains another is hidden as a whole.
        secrets.sort_by_key(|secret| std::cmp::Reverse(secret.reveal().len()));
        Masked(secrets)
    }
}

impl Masked {
    /// The text without the secrets that stand in it.
    pub fn hide(&self, text: &str) -> String {
        self.0.iter().fold(text.to_owned(), |text, secret| {
            text.replace(secret.reveal(), MASK)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_hidden_whole_and_short_words_stay() {
        let masked: Masked = ["hunter2", "hunter2-and-more", "a", ""]
            .map(Secret::new)
            .into_iter()
            .collect();
        assert_eq!(
            masked.hide("hunter2-and-more, hunter2: a plain word"),
            "[MASKED], [MASKED]: a plain word"
        );
        assert!(!format!("{masked:?}").contains("hunter2"));
    }
}
