//! The `cannery` command: parse, run, exit code. All else is the library's.

use std::process::ExitCode;

fn main() -> ExitCode {
    cannery::cli::main(std::env::args_os(), std::env::vars_os())
}
