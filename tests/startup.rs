//! What the program is loaded with.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::process::Command;

#[test]
fn libvirt_is_not_loaded_before_it_is_needed() {
    // With this the loader only lists what it would load (ld.so(8)).
    let output = Command::new(env!("CARGO_BIN_EXE_cannery"))
        .env("LD_TRACE_LOADED_OBJECTS", "1")
        .output()
        .unwrap();
    let libraries = String::from_utf8(output.stdout).unwrap();
    assert!(libraries.contains("libcrypto"), "{libraries}");
    assert!(!libraries.contains("libvirt"), "{libraries}");
}
