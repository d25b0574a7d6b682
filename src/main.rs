//! The `cannery` command.
fn main() {}
