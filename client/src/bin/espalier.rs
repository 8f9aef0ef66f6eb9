//! The command `espalier`: everything it does stands in the library's `cli`.

use std::process::ExitCode;

fn main() -> ExitCode {
    espalier_client::cli::main()
}
