//! Patterns for image names.

use std::fmt;
use std::str::FromStr;

use globset::{GlobBuilder, GlobMatcher};
use serde::de::{self, Deserialize, Deserializer};

/// A pattern for image names: `*` stops at a slash, `**` does not.
#[derive(Clone)]
pub struct Pattern {
    text: String,
    matcher: GlobMatcher,
}

impl Pattern {
    /// Does the image's full name (`registry/repository:tag`) fit?
    pub fn fits(&self, name: &str) -> bool {
        self.matcher.is_match(name)
    }

    /// The order in which patterns apply: shorter first, so that longer ones, being more exact, win.
    pub(super) fn by_length(&self, other: &Pattern) -> std::cmp::Ordering {
        (self.text.len(), &self.text).cmp(&(other.text.len(), &other.text))
    }

    /// The pattern as it was written.
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for Pattern {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let glob = GlobBuilder::new(text)
            .literal_separator(true)
            .build()
            .map_err(|e| format!("\"{text}\" is not a pattern: {}", e.kind()))?;
        Ok(Pattern {
            text: text.to_owned(),
            matcher: glob.compile_matcher(),
        })
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pattern({})", self.text)
    }
}

impl<'de> Deserialize<'de> for Pattern {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        String::deserialize(d)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_star_stops_at_a_slash_and_two_do_not() {
        let one: Pattern = "registry.example.com/vm/*".parse().unwrap();
        assert!(one.fits("registry.example.com/vm/debian:12"));
        assert!(!one.fits("registry.example.com/vm/team/debian:12"));
        assert!(!one.fits("evil.example.com/registry.example.com/vm/debian:12"));
        let two: Pattern = "registry.example.com/**".parse().unwrap();
        assert!(two.fits("registry.example.com/vm/team/debian:12"));
        assert!("a[".parse::<Pattern>().is_err());
    }
}
