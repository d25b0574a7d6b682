//! Compiles what stands between the program and libvirt, and puts it into the program alone: tests of the library are
//! linked with libvirt itself.

// How a build script speaks to cargo.
#![allow(clippy::print_stdout)]

const SHIM: &str = "src/machine/libvirt/lazy.c";

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed={SHIM}");
    let libvirt = pkg_config::Config::new().cargo_metadata(false).probe("libvirt")?;
    let objects = cc::Build::new()
        .file(SHIM)
        .includes(libvirt.include_paths)
        .std("c11")
        .cargo_metadata(false)
        .try_compile_intermediates()?;
    for object in objects {
        println!("cargo:rustc-link-arg-bin=cannery={}", object.display());
    }
    Ok(())
}
