//! How it ended: one judgement over all that is known, and the two files that tell it.

use std::fs::{OpenOptions, rename};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The code when nothing better is known.
pub const UNKNOWN: i32 = 255;
/// The code of what was killed.
pub const KILLED: i32 = 137;

/// How the main command ended, as the guest tells it.
#[derive(Clone, Debug, Deserialize, Serialize, PartialEq, Eq)]
pub struct Exit {
    /// 128 + signal if one killed it.
    pub code: i32,
    /// The signal.
    #[serde(default)]
    pub signal: Option<i32>,
    /// Whether its memory limit did it.
    #[serde(default)]
    pub out_of_memory: bool,
}

impl Exit {
    /// Read what a guest says; None if it makes no sense.
    pub fn parse(payload: &[u8]) -> Option<Self> {
        let exit: Self = serde_json::from_slice(payload).ok()?;
        let is_sane = (0..=255).contains(&exit.code) && exit.signal.is_none_or(|signal| (1..=64).contains(&signal));
        is_sane.then_some(exit)
    }
}

/// Why the shim wanted the machine to end.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The main command had ended.
    Command,
    /// Somebody asked for it.
    Stopped,
    /// The guest's kernel panicked.
    Panic,
    /// The guest answered no more.
    Silent(u64),
    /// It never began to.
    BootTimeout(u64),
    /// It broke the protocol.
    Broken(String),
}

/// How the machine's process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VmmEnd {
    /// By itself, with that code.
    Code(i32),
    /// By that signal.
    Signal(i32),
}

/// Whether there was a main command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MainState {
    /// None was started.
    None,
    /// It runs.
    Running,
    /// It has ended.
    Exited,
}

/// All that is known at the end.
pub struct Facts<'a> {
    /// Why the shim wanted it.
    pub cause: Option<&'a Cause>,
    /// What the console said of a panic.
    pub panic: Option<&'a str>,
    /// How the main command ended.
    pub exit: Option<&'a Exit>,
    /// Whether there was one.
    pub main: MainState,
    /// How the machine's process ended.
    pub vmm: VmmEnd,
    /// The last line it said.
    pub last_words: &'a str,
    /// Whether there is an agent; without one the process is the command.
    pub has_agent: bool,
}

/// The judgement.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct End {
    /// The code of the command, null if nobody knows.
    pub code: Option<i32>,
    /// One line.
    pub why: String,
    /// One word.
    pub kind: &'static str,
    /// Whether the command's memory limit did it.
    pub out_of_memory: bool,
}

impl End {
    /// The end of a machine that never began.
    pub fn not_begun(why: &str) -> Self {
        Self { code: None, why: why.into(), kind: "vmm_failed", out_of_memory: false }
    }

    /// What the exit file says.
    pub fn exit_code(&self) -> i32 {
        self.code.unwrap_or(UNKNOWN)
    }

    /// What attached clients are told.
    pub fn as_exit(&self) -> Value {
        serde_json::json!({"code": self.exit_code(), "signal": null, "out_of_memory": self.out_of_memory})
    }
}

/// Judge.
pub fn judge(facts: &Facts<'_>) -> End {
    let (kind, why) = kind_of(facts);
    let code = facts.exit.map(|exit| exit.code).or_else(|| code_of(facts));
    End { code, why, kind, out_of_memory: facts.exit.is_some_and(|exit| exit.out_of_memory) }
}

fn kind_of(facts: &Facts<'_>) -> (&'static str, String) {
    match facts.cause {
        Some(Cause::Stopped) => ("stopped", "it was stopped".into()),
        Some(Cause::Silent(ms)) if facts.panic.is_none() => ("silent", format!("the guest did not answer for {:.1} s", seconds(*ms))),
        Some(Cause::BootTimeout(ms)) if facts.panic.is_none() => {
            ("boot_timeout", format!("the guest's agent did not answer within {:.1} s", seconds(*ms)))
        }
        Some(Cause::Broken(why)) => ("vmm_killed", format!("the guest broke the protocol: {why}")),
        _ => match (facts.exit, facts.panic) {
            (Some(exit), _) => ("command", command_words(exit)),
            (None, Some(text)) => ("panic", format!("the guest's kernel panicked: {text}")),
            (None, None) => vmm_words(facts),
        },
    }
}

fn command_words(exit: &Exit) -> String {
    match exit.signal {
        _ if exit.out_of_memory => "the command was killed: out of memory".into(),
        Some(signal) => format!("the command was killed by signal {signal}"),
        None => format!("the command ended with {}", exit.code),
    }
}

fn vmm_words(facts: &Facts<'_>) -> (&'static str, String) {
    let told = if facts.last_words.is_empty() { String::new() } else { format!(": {}", facts.last_words) };
    match facts.vmm {
        VmmEnd::Code(0) => ("poweroff", "the machine powered off".into()),
        VmmEnd::Code(code) => ("vmm_failed", format!("the machine's process ended with {code}{told}")),
        VmmEnd::Signal(signal) => ("vmm_killed", format!("the machine's process was killed by signal {signal}{told}")),
    }
}

fn code_of(facts: &Facts<'_>) -> Option<i32> {
    match facts.vmm {
        VmmEnd::Signal(signal) => Some(128 + signal),
        VmmEnd::Code(code) if !facts.has_agent => Some(code),
        // The guest kills what still runs before it powers off.
        VmmEnd::Code(_) if facts.cause == Some(&Cause::Stopped) && facts.main == MainState::Running => Some(KILLED),
        VmmEnd::Code(0) if facts.main == MainState::None && facts.panic.is_none() => Some(0),
        VmmEnd::Code(_) => None,
    }
}

fn seconds(milliseconds: u64) -> f64 {
    // A time of at most a few thousand years: the last digits of a larger one do not matter.
    #[allow(clippy::cast_precision_loss)]
    {
        milliseconds as f64 / 1000.0
    }
}

/// Put a file into place, whole or not at all.
pub fn write_whole(path: &str, text: &[u8]) -> io::Result<()> {
    let temporary = format!("{path}.tmp");
    let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(0o600).open(&temporary)?;
    let outcome = file.write_all(text).and_then(|()| rename(&temporary, path));
    if outcome.is_err() {
        let _ = std::fs::remove_file(&temporary);
    }
    outcome
}

#[cfg(test)]
mod tests {
    use super::{Cause, Exit, Facts, MainState, VmmEnd, judge};

    const GOOD: Facts<'static> =
        Facts { cause: None, panic: None, exit: None, main: MainState::Running, vmm: VmmEnd::Code(0), last_words: "", has_agent: true };

    fn exit(code: i32) -> Exit {
        Exit { code, signal: None, out_of_memory: false }
    }

    #[test]
    fn every_end_has_its_kind_and_its_code() {
        let seven = exit(7);
        let broken = Cause::Broken("x".into());
        for (facts, kind, code) in [
            (Facts { exit: Some(&seven), cause: Some(&Cause::Command), ..GOOD }, "command", Some(7)),
            (Facts { exit: Some(&seven), cause: Some(&Cause::Command), vmm: VmmEnd::Signal(9), ..GOOD }, "command", Some(7)),
            (Facts { exit: Some(&seven), cause: Some(&Cause::Stopped), ..GOOD }, "stopped", Some(7)),
            (Facts { cause: Some(&Cause::Stopped), ..GOOD }, "stopped", Some(137)),
            (Facts { cause: Some(&Cause::Stopped), main: MainState::None, ..GOOD }, "stopped", Some(0)),
            (Facts { cause: Some(&Cause::Stopped), main: MainState::None, vmm: VmmEnd::Signal(9), ..GOOD }, "stopped", Some(137)),
            (Facts { panic: Some("no init"), ..GOOD }, "panic", None),
            (Facts { panic: Some("no init"), cause: Some(&Cause::Panic), vmm: VmmEnd::Signal(9), ..GOOD }, "panic", Some(137)),
            (Facts { panic: Some("no init"), cause: Some(&Cause::Silent(1)), vmm: VmmEnd::Signal(9), ..GOOD }, "panic", Some(137)),
            (Facts { cause: Some(&Cause::Silent(1)), vmm: VmmEnd::Signal(9), ..GOOD }, "silent", Some(137)),
            (Facts { cause: Some(&Cause::BootTimeout(1)), vmm: VmmEnd::Signal(9), ..GOOD }, "boot_timeout", Some(137)),
            (Facts { cause: Some(&broken), vmm: VmmEnd::Signal(9), ..GOOD }, "vmm_killed", Some(137)),
            (Facts { vmm: VmmEnd::Signal(9), ..GOOD }, "vmm_killed", Some(137)),
            (Facts { vmm: VmmEnd::Signal(11), ..GOOD }, "vmm_killed", Some(139)),
            (Facts { vmm: VmmEnd::Code(1), ..GOOD }, "vmm_failed", None),
            (GOOD, "poweroff", None),
            (Facts { main: MainState::None, ..GOOD }, "poweroff", Some(0)),
            (Facts { has_agent: false, ..GOOD }, "poweroff", Some(0)),
            (Facts { has_agent: false, vmm: VmmEnd::Code(3), ..GOOD }, "vmm_failed", Some(3)),
        ] {
            let end = judge(&facts);
            assert_eq!((end.kind, end.code), (kind, code), "{}", end.why);
        }
    }

    #[test]
    fn a_machine_that_fails_says_its_last_words() {
        let end = judge(&Facts { vmm: VmmEnd::Code(1), last_words: "qemu: no such disk", ..GOOD });
        assert_eq!(end.why, "the machine's process ended with 1: qemu: no such disk");
    }

    #[test]
    fn a_guest_cannot_make_up_codes() {
        assert_eq!(Exit::parse(br#"{"code": 3, "signal": null, "out_of_memory": false}"#), Some(exit(3)));
        for text in [r#"{"code": 256}"#, r#"{"code": -1}"#, r#"{"code": 0, "signal": 65}"#, r#"{"code": "0"}"#, "[]", ""] {
            assert_eq!(Exit::parse(text.as_bytes()), None, "{text}");
        }
    }
}
