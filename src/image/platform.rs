//! The names of processor architectures: the kernel's, and the ones in images.

use super::error::quoted;

/// The platform that a job's machine has. Its operating system is always Linux here.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Platform {
    /// As images write it: `amd64`.
    image: &'static str,
    /// As the kernel, libvirt and podman-machine write it: `x86_64`.
    machine: &'static str,
}

/// All that a machine can be.
const PLATFORMS: [Platform; 2] = [
    Platform {
        image: "amd64",
        machine: "x86_64",
    },
    Platform {
        image: "arm64",
        machine: "aarch64",
    },
];

impl Platform {
    /// By either name.
    pub(super) fn of_machine(name: &str) -> Option<Self> {
        PLATFORMS
            .into_iter()
            .find(|p| p.machine == name || p.image == name)
    }

    /// Does an image with this operating system and architecture run here?
    ///
    /// An absent value (an artifact without an image config) claims nothing, and so fits.
    pub(super) fn matches(&self, os: &str, architecture: &str) -> bool {
        matches!(os, "linux" | "")
            && (architecture.is_empty() || [self.image, self.machine].contains(&architecture))
    }

    /// `linux/amd64`.
    pub(super) fn written(&self) -> String {
        format!("linux/{}", self.image)
    }
}

/// A stranger's platform as an error may repeat it.
pub(super) fn written(os: &str, architecture: &str) -> String {
    let text = format!("{os}/{architecture}");
    let plain = text.len() < 40
        && text
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b"/_.-".contains(&b));
    if plain { text } else { quoted(&text) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_names_of_a_platform_fit() {
        let x86 = Platform::of_machine("x86_64").unwrap();
        assert_eq!(Platform::of_machine("amd64"), Some(x86.clone()));
        for (os, architecture, fits) in [
            ("linux", "amd64", true),
            ("linux", "x86_64", true),
            ("", "", true),
            ("linux", "arm64", false),
            ("windows", "amd64", false),
            ("unknown", "unknown", false),
        ] {
            assert_eq!(x86.matches(os, architecture), fits, "{os}/{architecture}");
        }
        assert!(Platform::of_machine("riscv64").is_none());
        assert_eq!(Platform::of_machine("aarch64").unwrap().written(), "linux/arm64");
    }
}
