//! A job's layer, made by the real qemu-img.

use std::fs;
use std::process::Command;

use cannery::machine::overlay::{self, Error};
use cannery::machine::placement::{Backing, Format};

#[tokio::test]
#[ignore = "needs qemu-img"]
async fn a_layer_names_its_backing_with_its_format_and_has_the_size_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    // A backing file that is no qcow2 at all: it is named and not opened, so that nothing in it can matter here.
    let backing = Backing {
        path: folder.path().join("disk,with=odd name"),
        format: Format::Qcow2,
    };
    fs::write(&backing.path, "not a disk").unwrap();
    let layer = folder.path().join("overlay.qcow2");
    fs::write(&layer, "what an earlier try left").unwrap();
    overlay::create(&layer, &backing, (20 << 20) + 1, 10 << 20)
        .await
        .unwrap();

    let output = Command::new("qemu-img")
        .args(["info", "--output=json", "-f", "qcow2"])
        .arg(&layer)
        .output()
        .unwrap();
    let about: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(about["virtual-size"], (20 << 20) + 512);
    assert_eq!(about["backing-filename"], backing.path.to_str().unwrap());
    assert_eq!(about["backing-filename-format"], "qcow2");
}

#[tokio::test]
#[ignore = "needs qemu-img, and mount as root"]
async fn a_full_disk_is_named_and_nothing_is_left() {
    let folder = tempfile::tempdir().unwrap();
    let mount = |arguments: &[&str]| {
        let done = Command::new("mount")
            .args(arguments)
            .arg(folder.path())
            .status()
            .unwrap();
        assert!(done.success());
    };
    mount(&["-t", "tmpfs", "-o", "size=64k", "tmpfs"]);
    let backing = Backing {
        path: folder.path().join("disk"),
        format: Format::Raw,
    };
    fs::write(&backing.path, vec![1; 60 << 10]).unwrap();
    let layer = folder.path().join("overlay.qcow2");
    let result = overlay::create(&layer, &backing, 1 << 30, 60 << 10).await;
    let left = layer.exists();
    assert!(
        Command::new("umount")
            .arg(folder.path())
            .status()
            .unwrap()
            .success()
    );
    assert!(matches!(result, Err(Error::Full(_))), "{result:?}");
    assert!(!left);
}
