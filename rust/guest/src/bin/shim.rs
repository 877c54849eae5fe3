//! The process beside one machine on the host: `isopod-shim CONFIG.json`.

use std::process::ExitCode;

fn main() -> ExitCode {
    isopod_guest::shim::main::main()
}
