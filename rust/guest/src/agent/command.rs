//! What a child does between its birth and its exec: root, terminal, user, capabilities, environment, folder, program.
//!
//! The same defaults as for containers (src/isopod/engine/bundle.py, capabilities.py): docker's fourteen capabilities, no new privileges,
//! PATH, HOSTNAME, HOME, and TERM with a terminal. The child shares the mounts of all commands and sees nothing of init's.
//!
//! Source: credentials(7), capabilities(7), execve(2), environ(7).

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, Metadata, OpenOptions};
use std::io::{Error, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;

use rustix::thread::{CapabilitySet, CapabilitySets, set_capabilities};

use super::requests::{Command, Failure};
use super::system;
use super::users::{self, User};

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// Of /etc/passwd and /etc/group.
const TEXT_BYTES_MAX: u64 = 4 << 20;
/// Of a program that is read ahead.
const PROGRAM_BYTES_MAX: u64 = 16 << 20;
/// Where the name of a program's loader stands, and how it begins.
const INTERPRETER_WITHIN: usize = 4096;
const LIBRARIES: &[u8] = b"/lib";
const FILES_SOFT: u64 = 1024;
const FILES_HARD: u64 = 524_288;
const CAPABILITIES: CapabilitySet = CapabilitySet::AUDIT_WRITE
    .union(CapabilitySet::CHOWN)
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::MKNOD)
    .union(CapabilitySet::NET_BIND_SERVICE)
    .union(CapabilitySet::NET_RAW)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SYS_CHROOT);

/// What a child is given as 0, 1 and 2.
pub struct Stdio {
    /// To read from.
    pub stdin: OwnedFd,
    /// To write to.
    pub stdout: OwnedFd,
    /// To write errors to.
    pub stderr: OwnedFd,
    /// Whether all three are one terminal.
    pub is_terminal: bool,
}

/// The texts that say who a name is.
pub struct Accounts {
    passwd: String,
    group: String,
}

/// Do what is the same for every command: mounts, session, limits, and most of what it may not.
pub fn settle(mounts: BorrowedFd<'_>) -> Result<Accounts, Failure> {
    system::reset_signals();
    system::enter_mounts(mounts).map_err(|error| Failure::failed("the sandbox's mounts", error))?;
    rustix::process::setsid().map_err(|error| Failure::failed("a session", error))?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    system::limit_files(FILES_SOFT, FILES_HARD);
    for capability in CapabilitySet::all().difference(CAPABILITIES) {
        // What this kernel does not know needs no dropping.
        let _ = rustix::thread::remove_capability_from_bounding_set(capability);
    }
    Ok(Accounts { passwd: read_text("/etc/passwd"), group: read_text("/etc/group") })
}

/// Become the command, after `settle`. Returns only what went wrong.
pub fn become_command(command: &Command, accounts: &Accounts, stdio: &Stdio, hostname: &str) -> Failure {
    match prepare(command, accounts, stdio, hostname) {
        Err(failure) => failure,
        Ok(environment) => execute(&command.argv, &environment),
    }
}

fn prepare(command: &Command, accounts: &Accounts, stdio: &Stdio, hostname: &str) -> Result<BTreeMap<String, String>, Failure> {
    let failed = |what: &'static str| move |error: Error| Failure::failed(what, error);
    if stdio.is_terminal {
        system::control_terminal(stdio.stdin.as_fd()).map_err(failed("the terminal"))?;
    }
    for (fd, number) in [(&stdio.stdin, 0), (&stdio.stdout, 1), (&stdio.stderr, 2)] {
        system::put_at(fd.as_fd(), number).map_err(failed("its files"))?;
    }
    let user = users::resolve(&command.user, &accounts.passwd, &accounts.group).map_err(Failure::invalid)?;
    if stdio.is_terminal {
        // As a login would have it: the user may open the terminal by its name.
        let _ = rustix::fs::fchown(&stdio.stdin, Some(rustix::fs::Uid::from_raw(user.uid)), None);
    }
    let folder = if command.cwd.is_empty() { "/" } else { &command.cwd };
    let enter = || std::env::set_current_dir(folder);
    enter().or_else(|_| fs::create_dir_all(folder).and_then(|()| enter())).map_err(|error| {
        let code = if error.kind() == ErrorKind::PermissionDenied { "not_executable" } else { "failed" };
        Failure::new(code, format!("the working folder {folder}: {error}"))
    })?;
    give_up_privileges(&user).map_err(failed("its privileges"))?;
    Ok(environment(command, &user, hostname))
}

fn give_up_privileges(user: &User) -> Result<(), Error> {
    rustix::thread::clear_ambient_capability_set()?;
    system::become_user(user.uid, user.gid, &user.groups)?;
    let kept = if user.uid == 0 { CAPABILITIES } else { CapabilitySet::empty() };
    set_capabilities(None, CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() })?;
    Ok(rustix::thread::set_no_new_privs(true)?)
}

/// Read the files that the start of a command reads: accounts, the program, and what that names as its interpreter or loader.
pub fn warm(command: &Command) {
    let _ = (read_text("/etc/passwd"), read_text("/etc/group"));
    let path = command.env.get("PATH").map_or(PATH, String::as_str);
    let program = command.argv.first().into_iter().flat_map(|name| candidates(name, path)).find_map(|file| read_program(&file));
    if let Some(interpreter) = program.as_deref().and_then(interpreter) {
        read_program(&interpreter);
    }
}

fn read_program(path: &str) -> Option<Vec<u8>> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path).ok()?;
    file.metadata().ok().filter(Metadata::is_file)?;
    let mut bytes = Vec::new();
    file.take(PROGRAM_BYTES_MAX).read_to_end(&mut bytes).ok().map(|_| bytes)
}

/// The program that a program's first bytes name: behind "#!", or, of one that is linked at run time, as its loader.
fn interpreter(program: &[u8]) -> Option<String> {
    if let Some(line) = program.strip_prefix(b"#!") {
        let line = line.split(|byte| *byte == b'\n').next()?;
        let word = line.split(u8::is_ascii_whitespace).find(|word| !word.is_empty())?;
        return String::from_utf8(word.to_vec()).ok();
    }
    let head = program.get(..INTERPRETER_WITHIN.min(program.len()))?;
    let start = head.windows(LIBRARIES.len()).position(|text| text == LIBRARIES)?;
    let name = head[start..].split(|byte| *byte == 0).next()?;
    String::from_utf8(name.to_vec()).ok()
}

/// The command's variables and what every command has.
pub fn environment(command: &Command, user: &User, hostname: &str) -> BTreeMap<String, String> {
    let mut all = command.env.clone();
    let mut usual = vec![("PATH", PATH), ("HOSTNAME", hostname), ("HOME", &user.home)];
    if command.terminal {
        usual.push(("TERM", "xterm"));
    }
    for (key, value) in usual {
        all.entry(key.to_owned()).or_insert_with(|| value.to_owned());
    }
    all
}

/// The files a program's name may mean, in order.
pub fn candidates(name: &str, path: &str) -> Vec<String> {
    if name.contains('/') {
        return vec![name.to_owned()];
    }
    path.split(':').map(|folder| if folder.is_empty() { format!("./{name}") } else { format!("{folder}/{name}") }).collect()
}

fn execute(argv: &[String], environment: &BTreeMap<String, String>) -> Failure {
    let texts = |words: Vec<String>| -> Vec<CString> { words.into_iter().filter_map(|word| CString::new(word).ok()).collect() };
    let arguments = texts(argv.to_vec());
    let variables = texts(environment.iter().map(|(key, value)| format!("{key}={value}")).collect());
    let mut outcome = Error::from_raw_os_error(libc::ENOENT);
    for file in texts(candidates(&argv[0], environment.get("PATH").map_or(PATH, String::as_str))) {
        let error = execute_file(&file, &arguments, &variables);
        match error.raw_os_error() {
            Some(libc::ENOENT | libc::ENOTDIR | libc::ENAMETOOLONG) => {}
            // The search goes on, as execvp(3) has it; if nothing else is found, this is what is said.
            Some(libc::EACCES) => outcome = error,
            _ => {
                outcome = error;
                break;
            }
        }
    }
    let code = if outcome.raw_os_error() == Some(libc::ENOENT) { "not_found" } else { "not_executable" };
    Failure::new(code, format!("{}: {outcome}", argv[0]))
}

fn execute_file(file: &CString, arguments: &[CString], variables: &[CString]) -> Error {
    let pointers = |texts: &[CString]| -> Vec<_> { texts.iter().map(|text| text.as_ptr()).chain([std::ptr::null()]).collect() };
    let (arguments, variables) = (pointers(arguments), pointers(variables));
    // SAFETY: both arrays end with a null pointer, and they and the texts they point to outlive the call.
    unsafe { libc::execve(file.as_ptr(), arguments.as_ptr(), variables.as_ptr()) };
    Error::last_os_error()
}

/// The text of a file of the root; empty if there is none. What is no regular file is not waited for.
fn read_text(path: &str) -> String {
    let mut bytes = Vec::new();
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
    if let Ok(file) = file {
        if file.metadata().is_ok_and(|facts| facts.is_file()) {
            let _ = file.take(TEXT_BYTES_MAX).read_to_end(&mut bytes);
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::super::requests::{Command, parse};
    use super::super::users::User;
    use super::{CAPABILITIES, candidates, environment, interpreter};

    fn command(text: &str) -> Command {
        parse(text.as_bytes()).expect("it is well formed")
    }

    #[test]
    fn every_command_has_what_is_usual_unless_it_says_otherwise() {
        let user = User { uid: 5, gid: 5, groups: vec![5], home: "/home/ann".to_owned() };
        let plain = environment(&command(r#"{"argv":["sh"],"env":{"A":"b"}}"#), &user, "web");
        let lines: Vec<String> = plain.iter().map(|(key, value)| format!("{key}={value}")).collect();
        assert_eq!(lines, ["A=b", "HOME=/home/ann", "HOSTNAME=web", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]);
        let own = environment(&command(r#"{"argv":["sh"],"terminal":true,"env":{"HOME":"/","PATH":"","TERM":"dumb"}}"#), &user, "web");
        assert_eq!((own["HOME"].as_str(), own["PATH"].as_str(), own["TERM"].as_str()), ("/", "", "dumb"));
        assert_eq!(environment(&command(r#"{"argv":["sh"],"terminal":true}"#), &user, "web")["TERM"], "xterm");
    }

    #[test]
    fn a_name_with_a_slash_is_not_searched_for() {
        assert_eq!(candidates("sh", "/a::/b"), ["/a/sh", "./sh", "/b/sh"]);
        assert_eq!(candidates("./sh", "/a"), ["./sh"]);
    }

    #[test]
    fn a_program_names_its_interpreter_or_its_loader() {
        assert_eq!(interpreter(b"#! /bin/sh -e\necho").as_deref(), Some("/bin/sh"));
        assert_eq!(interpreter(b"\x7fELF....\0/lib64/ld-linux-x86-64.so.2\0\x04").as_deref(), Some("/lib64/ld-linux-x86-64.so.2"));
        assert!([&b""[..], b"#!", b"#!\n", b"\x7fELF of one piece"].into_iter().all(|bytes| interpreter(bytes).is_none()));
    }

    #[test]
    fn there_are_fourteen_capabilities() {
        assert_eq!(CAPABILITIES.bits(), 0xa804_25fb, "docker's default");
    }
}
