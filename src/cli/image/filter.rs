//! Which images are listed: those with a name that fits a pattern, as docker and podman have it, or with a digest that begins so.

use std::str::FromStr;

use super::choose::begins;
use crate::image::{Digest, Held, Reference};
use crate::settings::Pattern;

/// A word of the command line.
#[derive(Debug, Clone)]
pub(super) struct Filter {
    pattern: Pattern,
}

impl FromStr for Filter {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        word.parse().map(|pattern| Self { pattern })
    }
}

impl Filter {
    fn fits_digest(&self, digest: &Digest) -> bool {
        begins(digest, self.pattern.as_str())
    }

    fn fits_name(&self, name: &str) -> bool {
        spellings(name).iter().any(|spelling| self.pattern.fits(spelling))
    }
}

/// Is the image listed?
pub(super) fn lists(filters: &[Filter], held: &Held) -> bool {
    let named = |filter: &Filter| held.names.iter().any(|name| filter.fits_name(&name.reference));
    filters.is_empty()
        || filters
            .iter()
            .any(|filter| filter.fits_digest(&held.digest) || named(filter))
}

/// Of an image that is listed: is it by this name?
pub(super) fn lists_as(filters: &[Filter], digest: &Digest, name: &str) -> bool {
    filters.is_empty()
        || filters
            .iter()
            .any(|filter| filter.fits_digest(digest) || filter.fits_name(name))
}

/// All that a name may be called: whole, without its registry, or by its last part alone; each with its tag and without.
fn spellings(name: &str) -> Vec<String> {
    let Ok(reference) = name.parse::<Reference>() else {
        return vec![name.to_owned()];
    };
    let (whole, place) = (reference.to_string(), reference.place());
    let version = whole.strip_prefix(&place).unwrap_or_default();
    let last = place.rsplit('/').next().unwrap_or_default();
    let mut paths = vec![place.as_str(), last];
    if let Reference::Registry { repository, .. } = &reference {
        paths.push(repository);
    }
    let spellings = paths
        .iter()
        .flat_map(|path| [(*path).to_owned(), format!("{path}{version}")]);
    spellings.collect()
}

#[cfg(test)]
mod tests {
    use super::super::choose::tests::held;
    use super::*;

    #[test]
    fn a_name_fits_as_docker_and_podman_have_it() {
        let names = [
            "docker.io/library/debian:12",
            "docker.io/library/debian:13",
            "r.example.com:5000/ci/vm:1",
            "oci:/srv/images:web",
            "https://cloud.example.com/images/debian.qcow2",
        ];
        for (word, expected) in [
            ("debian", &[0, 1][..]),
            ("debian:12", &[0]),
            ("library/debian", &[0, 1]),
            ("docker.io/library/debian:13", &[1]),
            ("deb*", &[0, 1, 4]),
            ("*:1?", &[0, 1]),
            ("vm", &[2]),
            ("ci/vm", &[2]),
            ("ci/*", &[2]),
            ("r.example.com:5000/ci/vm", &[2]),
            ("r.example.com:5000/*", &[]),
            ("r.example.com:5000/**", &[2]),
            ("images", &[3]),
            ("oci:/srv/images", &[3]),
            ("debian.qcow2", &[4]),
            ("ebian", &[]),
            ("example.com", &[]),
            ("12", &[]),
        ] {
            let filter: Filter = word.parse().unwrap();
            let fits = (0..names.len()).filter(|at| filter.fits_name(names[*at]));
            assert_eq!(fits.collect::<Vec<_>>(), expected, "{word}");
        }
        assert!("a[".parse::<Filter>().is_err());
    }

    #[test]
    fn an_image_is_listed_by_those_of_its_names_that_fit_or_by_all_for_its_digest() {
        let image = held("abcd1", &["docker.io/library/debian:12", "r.example.com/vm:1"]);
        for (words, expected) in [
            (&[][..], &[0, 1][..]),
            (&["vm"], &[1]),
            (&["vm", "debian"], &[0, 1]),
            (&["sha256:abcd"], &[0, 1]),
            (&["abc"], &[]),
            (&["other"], &[]),
        ] {
            let filters: Vec<Filter> = words.iter().map(|word| word.parse().unwrap()).collect();
            assert_eq!(lists(&filters, &image), !expected.is_empty(), "{words:?}");
            let shown = |at: &usize| lists_as(&filters, &image.digest, &image.names[*at].reference);
            assert_eq!((0..2).filter(shown).collect::<Vec<_>>(), expected, "{words:?}");
        }
    }
}
