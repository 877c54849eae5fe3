//! The guest's init and agent: process 1 of a microVM, one thread and one poll loop.
//!
//! `init` comes up: mounts, kernel modules, the channel. `server` is the loop; it owns the `channel` to the host and the `work` (commands,
//! archives, set-ups), each of which is a child process with pipes. Whatever may block or fail halfway (mounts, file systems, names in the
//! sandbox) happens in a child, so a dead disk, a hostile tree or a mistake costs that child and not process 1.
//!
//! Files: `system` the system calls that need `unsafe`, `requests` what is asked and answered, `launch` children and their pipes, `command`
//! what a child does until its exec, `users` who a name is, `root` paths inside the sandbox, `setup` its mounts and identity, `network` its
//! link, `files` archives, `metrics` figures, `messages` what the kernel says of memory and disks.

pub mod channel;
pub mod command;
pub mod files;
pub mod init;
pub mod launch;
pub mod messages;
pub mod metrics;
pub mod network;
pub mod requests;
pub mod root;
pub mod server;
pub mod setup;
pub mod system;
pub mod users;
pub mod work;
