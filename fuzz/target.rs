//! Runs the target that this binary is named after.

#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let name = env!("CARGO_BIN_NAME");
    if !cannery::console::fuzz::run(name, bytes) {
        cannery::image::fuzz::run(name, bytes);
    }
});
