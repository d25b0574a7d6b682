use super::*;
use crate::image::digest::Digest;
use crate::image::format::Config;
use crate::image::format::fixture::{blob, manifest, recipe_of, streams};

const XML: &str = "<domain><memory unit='MiB'>512</memory><os><type arch='x86_64'>hvm</type></os></domain>";
const LOGIN: &str = r#"{"users":[{"username":"vagrant","password":"vagrant"},{"username":"other","password":"x"}],
    "services":[{"service":"ssh","port":22,"protocol":"tcp"}]}"#;

const FILE: &str = "application/x-qemu-disk+gzip";

fn image(files: &[&str]) -> Manifest {
    let mut layers = vec![blob(DOMAIN, 100, &[]), blob(ACCESS, 100, &[])];
    layers.extend(files.iter().map(|media_type| blob(media_type, 10, &[])));
    manifest(layers)
}

#[test]
fn blobs_belong_together_by_their_number() {
    let manifest = image(&[
        FILE,
        "application/x-qemu-disk+gzip;chunk=1",
        "application/x-qemu-disk+gzip; chunk=2",
    ]);
    assert_eq!(files(&manifest), 3);
    let config = Config {
        diff_ids: [&b"xml"[..], b"login", b"disk"].map(Digest::of).to_vec(),
        ..Config::default()
    };
    let recipe = recipe_of(&manifest, &config, &[XML, LOGIN]).unwrap();
    assert_eq!(recipe.hints.memory, Some(512 << 20));
    assert_eq!(recipe.hints.user.as_deref(), Some("vagrant"));
    let streams = streams(recipe);
    assert_eq!(streams.len(), 1);
    assert_eq!(
        (streams[0].blobs.len(), streams[0].diff_id),
        (3, Some(Digest::of(b"disk")))
    );
}

#[test]
fn a_raw_disk_has_another_type_and_is_taken_all_the_same() {
    let recipe = recipe_of(
        &image(&["application/octet-stream+gzip"]),
        &Config::default(),
        &[XML, LOGIN],
    )
    .unwrap();
    assert_eq!(streams(recipe)[0].diff_id, None);
}

#[test]
fn blobs_that_do_not_follow_each_other_are_refused() {
    let chunk = |number: &str| format!("{FILE};chunk={number}");
    let (one, two, huge) = (chunk("1"), chunk("2"), chunk("99999999999"));
    for (files, part) in [
        (&[][..], "at least one file"),
        (&[one.as_str()], "does not follow"),
        (&[FILE, &two], "does not follow"),
        (&[FILE, &one, &one], "does not follow"),
        (&[FILE, &huge], "cannot be read"),
        (
            &[FILE, "application/x-qemu-disk+gzip;chunk=1;x=2"],
            "cannot be read",
        ),
        (&[FILE, "application/x-qemu-disk+gzip;part=1"], "cannot be read"),
        (&[FILE, "application/x-qemu-disk"], "cannot be read"),
        (&[FILE, DOMAIN], "exactly one domain"),
    ] {
        let error = recipe_of(&image(files), &Config::default(), &[XML, LOGIN]).unwrap_err();
        assert!(
            error.contains(part) && !error.contains('\n'),
            "{files:?}: {error}"
        );
    }
}

#[test]
fn of_several_files_their_machine_says_which_are_disks() {
    let drives = "<devices><disk type='file'><source file='/vms/top.qcow2'/></disk><disk type='file' device='cdrom'>\
        <source file='cd.iso'/></disk><disk type='block'><source dev='/dev/sdb'/></disk></devices></domain>";
    let xml = XML.replace("</domain>", drives);
    let recipe = |files: &[&str]| recipe_of(&image(files), &Config::default(), &[&xml, LOGIN]);
    let several = recipe(&[FILE, FILE, "application/x-qemu-disk+gzip;chunk=1"]).unwrap();
    let drive = |disk: bool, name: &str| Drive {
        disk,
        name: name.to_owned(),
    };
    assert_eq!(several.drives, [drive(true, "top.qcow2"), drive(false, "cd.iso")]);
    let streams = streams(several);
    assert_eq!(streams.len(), 2);
    assert!(streams.iter().all(Layer::is_one_of_several));
    assert!(recipe(&[FILE; DEPTH_MAX]).is_ok());
    assert!(
        recipe(&[FILE; DEPTH_MAX + 1])
            .unwrap_err()
            .contains("it has 65 files")
    );
}

#[test]
fn a_files_name_stands_in_its_gzip_header() {
    let packed = |builder: flate2::GzBuilder| {
        builder
            .write(Vec::new(), flate2::Compression::fast())
            .finish()
            .unwrap()
    };
    let builder = flate2::GzBuilder::new;
    let name = |head: &[u8]| packed_name(head);
    assert_eq!(
        name(&packed(builder().filename("a.qcow2"))).as_deref(),
        Some("a.qcow2")
    );
    assert_eq!(
        name(&packed(builder().filename(&b"b\xe4se"[..]))).as_deref(),
        Some("b\u{e4}se")
    );
    let extra = packed(builder().extra(vec![1; 300]).filename("a").comment("c"));
    assert_eq!(name(&extra).as_deref(), Some("a"));
    assert_eq!(name(&packed(builder().comment("c"))), None);
    assert_eq!(name(&packed(builder().filename(""))), None);
    // Cut anywhere, or something else.
    let whole = packed(builder().extra(vec![1; 30]).filename("name"));
    for end in 0..whole.len().min(10 + 32 + 5) {
        assert_eq!(name(&whole[..end]), None, "{end}");
    }
    assert_eq!(name(b"QFI\xfb"), None);
}

#[test]
fn documents_are_strict_about_what_counts_and_lenient_about_the_rest() {
    let refused =
        |xml: &str, login: &str| recipe_of(&image(&[FILE]), &Config::default(), &[xml, login]).unwrap_err();
    assert!(refused("<network/>", LOGIN).contains("something else"));
    assert!(refused(&XML.replace("x86_64", "aarch64"), LOGIN).contains("linux/aarch64"));
    assert!(refused(XML, "[").contains("cannot be read"));
    for login in ["{}", r#"{"users":[]}"#, r#"{"users":[{"username":"a b"}]}"#] {
        let recipe = recipe_of(&image(&[FILE]), &Config::default(), &[XML, login]).unwrap();
        assert_eq!(recipe.hints.user, None, "{login}");
    }
}
