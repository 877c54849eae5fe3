//! The guest's init and agent, started by the kernel as process 1.

use isopod_guest::agent::init;

fn main() {
    init::run();
}
