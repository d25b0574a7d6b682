use super::*;

#[test]
fn a_failure_reads_as_sentences() {
    let failure = Failure::system("cannot read /x").hint("make it readable");
    assert_eq!(failure.to_string(), "Cannot read /x. Make it readable.");
    assert_eq!(Failure::system("libvirt is down").to_string(), "libvirt is down.");
    assert_eq!(
        Failure::author("CANNERY_CPUS=9: too many.").to_string(),
        "CANNERY_CPUS=9: too many."
    );
    assert_eq!(
        Failure::system("/etc/x.toml:1:2: bad").to_string(),
        "/etc/x.toml:1:2: bad."
    );
    assert_eq!(Failure::system("").to_string(), ".");
}

#[test]
fn logins_that_cannot_be_used_are_mended_by_whom_they_were_given() {
    let helper = image::CredentialsError::Helper {
        helper: "pass".into(),
        registry: "registry.example.com".into(),
        reason: "it ended with code 1".into(),
    };
    let unreadable = |origin| image::CredentialsError::Unreadable {
        origin,
        reason: "no JSON".into(),
    };
    let refused = |origin| image::CredentialsError::Refused {
        registry: "registry.example.com".into(),
        user: "ci".into(),
        origin,
    };
    for (error, fault) in [
        (helper, Fault::System),
        (refused(Origin::Host), Fault::System),
        (refused(Origin::JobGiven), Fault::Author),
        (unreadable(Origin::Host), Fault::System),
        (unreadable(Origin::JobGiven), Fault::Author),
    ] {
        let failure = Failure::from(image::Error::from(error));
        assert_eq!(failure.fault, fault, "{failure}");
    }
}

#[test]
fn who_brings_a_disk_of_another_format_is_told_how_it_becomes_a_qcow2() {
    for (format, words) in [
        ("vmdk", "qemu-img convert -f vmdk -O qcow2 "),
        ("vdi", "qemu-img convert -f vdi -O qcow2 "),
        ("vhdx", "qemu-img convert -f vhdx -O qcow2 "),
        ("vhd", "qemu-img convert -f vpc -O qcow2 "),
        ("zip", "Unpack it first."),
        ("asif", "with the program that made it"),
    ] {
        let failure = Failure::from(image::Error::Hostile {
            image: "./disk".into(),
            class: Hostility::ForeignFormat(format),
        });
        let said = failure.to_string();
        let begins = format!("./disk is refused: its disk is in the format {format}; ");
        assert!(said.starts_with(&begins) && said.contains(words), "{said}");
    }
}

#[test]
fn the_runner_gets_its_own_codes() {
    let codes = ExitCodes {
        build: 41,
        system: 42,
    };
    assert_eq!(codes.code(Fault::Script(3)), 41);
    assert_eq!(codes.code(Fault::Author), 41);
    assert_eq!(codes.code(Fault::System), 42);
}
