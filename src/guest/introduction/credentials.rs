//! The introduction as systemd's credentials (systemd.system-credentials(7)).

use std::fmt;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;

use super::Introduction;
use crate::secret::Secret;

/// One credential: for fw_cfg, an item named `opt/io.systemd.credentials/NAME` whose content this is. The content may be
/// secret: keep it in a file that nobody else can read.
#[derive(Clone, PartialEq, Eq)]
pub struct Credential {
    /// The credential's name.
    pub name: &'static str,
    /// Its content, to be written as it is.
    pub content: Secret,
}

impl fmt::Debug for Credential {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credential({})", self.name)
    }
}

impl Introduction {
    /// What systemd reads at boot.
    ///
    /// Names that an older systemd does not know are ignored by it: `system.hostname` and `system.machine_id` came with
    /// 254, what `tmpfiles.extra` and `ssh.authorized_keys.root` need with 252.
    pub fn credentials(&self) -> Vec<Credential> {
        let mut credentials = vec![
            Credential {
                name: "tmpfiles.extra",
                content: Secret::new(self.tmpfiles()),
            },
            Credential {
                name: "system.hostname",
                content: Secret::new(self.hostname.clone()),
            },
            Credential {
                name: "system.machine_id",
                content: Secret::new(self.machine_id.clone()),
            },
        ];
        if self.user == "root" {
            credentials.push(Credential {
                name: "ssh.authorized_keys.root",
                content: Secret::new(format!("{}\n", self.user_key)),
            });
        }
        credentials
    }

    /// Lines of tmpfiles.d(5). They are carried out before sshd starts; `~` says that the content is in base64.
    fn tmpfiles(&self) -> String {
        let host_key = "/etc/ssh/ssh_host_ed25519_key";
        let private = BASE64.encode(self.host_key.private().reveal());
        let public = BASE64.encode(format!("{}\n", self.host_key.public()));
        let user_key = BASE64.encode(format!("{}\n", self.user_key));
        let mut lines = format!(
            "f+~ {host_key} 0600 root root - {private}\n\
             f+~ {host_key}.pub 0644 root root - {public}\n"
        );
        if self.user == "root" {
            // systemd itself makes root's file from the other credential, but leaves an existing one as it is.
            lines.push_str(&format!("w+~ /root/.ssh/authorized_keys - - - - {user_key}\n"));
        } else {
            // The group stays root's: the user's own group may have another name, and sshd asks for the owner only.
            let user = &self.user;
            lines.push_str(&format!(
                "d /home/{user}/.ssh 0700 {user} - -\n\
                 f+~ /home/{user}/.ssh/authorized_keys 0600 {user} - - {user_key}\n"
            ));
        }
        lines
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::introduction;
    use super::*;

    fn content(credentials: &[Credential], name: &str) -> Option<String> {
        let found = credentials.iter().find(|c| c.name == name)?;
        Some(found.content.reveal().to_owned())
    }

    #[test]
    fn root_gets_its_key_whether_it_has_some_or_none() {
        let introduction = introduction("root");
        let credentials = introduction.credentials();
        let line = format!("{}\n", introduction.user_key);
        assert_eq!(content(&credentials, "ssh.authorized_keys.root").unwrap(), line);
        let lines = content(&credentials, "tmpfiles.extra").unwrap();
        assert!(lines.contains(&format!(
            "w+~ /root/.ssh/authorized_keys - - - - {}",
            BASE64.encode(line)
        )));
    }

    #[test]
    fn another_user_gets_a_file_and_root_none() {
        let credentials = introduction("ci").credentials();
        assert_eq!(content(&credentials, "ssh.authorized_keys.root"), None);
        let lines = content(&credentials, "tmpfiles.extra").unwrap();
        assert!(lines.contains("d /home/ci/.ssh 0700 ci - -\n"));
        assert!(lines.contains("f+~ /home/ci/.ssh/authorized_keys 0600 ci - - "));
        assert!(!lines.contains("/root/"));
    }

    #[test]
    fn the_host_key_is_replaced_and_private() {
        let introduction = introduction("root");
        let lines = introduction.tmpfiles();
        let first = lines.lines().next().unwrap();
        let (head, encoded) = first.rsplit_once(' ').unwrap();
        assert_eq!(head, "f+~ /etc/ssh/ssh_host_ed25519_key 0600 root root -");
        let text = BASE64.decode(encoded).unwrap();
        assert_eq!(text, introduction.host_key.private().reveal().as_bytes());
    }
}
