//! What is asked of the agent and what it answers, as JSON. Unknown keys are ignored: a newer host may say more.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// Why something was not done: one of the protocol's codes, and a sentence.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// "not_found", "not_executable", "invalid", "failed", "unsupported" or "busy".
    pub code: String,
    /// One line.
    pub message: String,
}

impl Failure {
    /// A failure of a code.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.to_owned(), message: message.into() }
    }

    /// What was asked makes no sense.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new("invalid", message)
    }

    /// The kernel, or a file system, said no.
    pub fn failed(what: &str, error: impl std::fmt::Display) -> Self {
        Self::new("failed", format!("{what}: {error}"))
    }
}

/// The payload of a RESPONSE.
pub fn response(outcome: &Result<Value, Failure>) -> Vec<u8> {
    match outcome {
        Ok(value) => json!({ "ok": value }),
        Err(failure) => json!({ "error": failure }),
    }
    .to_string()
    .into_bytes()
}

/// The name of what is asked.
pub fn operation(payload: &[u8]) -> Result<String, Failure> {
    #[derive(Deserialize)]
    struct Named {
        op: String,
    }
    parse::<Named>(payload).map(|named| named.op)
}

/// What is asked, in full.
pub fn parse<'a, T: Deserialize<'a>>(payload: &'a [u8]) -> Result<T, Failure> {
    serde_json::from_slice(payload).map_err(|error| Failure::invalid(format!("the request makes no sense: {error}")))
}

/// A layer: the serial of its index's disk, and of its tar's; without one the index is a whole image.
pub type Layer = (String, Option<String>);

/// `prepare`.
#[derive(Debug, Deserialize)]
pub struct Prepare {
    /// The topmost first.
    pub layers: Vec<Layer>,
}

/// `configure`.
#[derive(Debug, Deserialize)]
pub struct Configure {
    /// Who and when the machine is.
    #[serde(flatten)]
    pub renew: Renew,
    /// The topmost first.
    pub layers: Vec<Layer>,
    /// The serial of the ext4 disk that takes what is written; without one that lies in memory.
    #[serde(default)]
    pub upper: Option<String>,
    /// What else is mounted.
    #[serde(default)]
    pub mounts: Vec<MountWish>,
    /// Most processes of the main command, and of the others.
    #[serde(default)]
    pub pids_max: Option<u64>,
}

/// `renew`.
#[derive(Debug, Deserialize)]
pub struct Renew {
    /// Its name.
    #[serde(default)]
    pub hostname: String,
    /// Nanoseconds since 1970; 0 leaves the clock alone.
    #[serde(default)]
    pub time_ns: u64,
    /// Hexadecimal.
    #[serde(default)]
    pub entropy: String,
    /// Its link.
    #[serde(default)]
    pub network: Option<Network>,
    /// The text of /etc/hosts.
    #[serde(default)]
    pub hosts: String,
    /// The text of /etc/resolv.conf.
    #[serde(default)]
    pub resolv: String,
}

/// A link's settings.
#[derive(Debug, Deserialize)]
pub struct Network {
    /// Its hardware address.
    pub mac: String,
    /// "10.88.0.5/24".
    pub address: String,
    /// Where the default route goes.
    #[serde(default)]
    pub gateway: Option<String>,
    /// Bytes of its packets.
    #[serde(default)]
    pub mtu: Option<u32>,
}

/// Something to mount in the root.
#[derive(Debug, Deserialize)]
pub struct MountWish {
    /// What it is.
    pub kind: MountKind,
    /// The name of a share, or the serial of a disk.
    #[serde(default)]
    pub tag: String,
    /// Where it goes.
    pub path: String,
    /// Whether it cannot be written to.
    #[serde(default)]
    pub read_only: bool,
    /// Only this file of the share.
    #[serde(default)]
    pub file: Option<String>,
    /// The size of a tmpfs.
    #[serde(default)]
    pub n_bytes: Option<u64>,
}

/// A kind of mount.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum MountKind {
    /// A folder of the host.
    Virtiofs,
    /// Memory.
    Tmpfs,
    /// An ext4 disk.
    Disk,
}

/// `start` and `exec`.
#[derive(Debug, Deserialize)]
pub struct Command {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// Its environment; what is usual is added.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Where it runs; made if missing.
    #[serde(default)]
    pub cwd: String,
    /// NAME|UID[:GROUP|GID].
    #[serde(default)]
    pub user: String,
    /// Whether it gets a terminal.
    #[serde(default)]
    pub terminal: bool,
    /// Of the terminal.
    #[serde(default)]
    pub rows: u16,
    /// Of the terminal.
    #[serde(default)]
    pub columns: u16,
    /// Whether it is given anything to read.
    #[serde(default)]
    pub stdin: bool,
}

impl Command {
    /// Refuse what no system call could take.
    pub fn check(&self) -> Result<(), Failure> {
        let words = self.argv.iter().chain(self.env.iter().flat_map(|(key, value)| [key, value])).chain([&self.cwd, &self.user]);
        if words.into_iter().any(|word| word.contains('\0')) {
            return Err(Failure::invalid("a NUL in a command"));
        }
        if self.argv.first().is_none_or(String::is_empty) {
            return Err(Failure::invalid("a command without a name"));
        }
        if self.env.keys().any(|key| key.is_empty() || key.contains('=')) {
            return Err(Failure::invalid("an environment variable without a proper name"));
        }
        Ok(())
    }
}

/// `look`, `archive` and `extract`.
#[derive(Debug, Deserialize)]
pub struct Place {
    /// Absolute, in the root.
    pub path: String,
    /// Whether a link at its end is followed; for `look`.
    #[serde(default)]
    pub follow: bool,
}

/// Read pairs of hexadecimal digits.
pub fn parse_hex(text: &str) -> Result<Vec<u8>, Failure> {
    let digits = text.as_bytes();
    let pair = |pair: &[u8]| std::str::from_utf8(pair).ok().and_then(|pair| u8::from_str_radix(pair, 16).ok());
    let is_hex = digits.len() % 2 == 0 && digits.iter().all(u8::is_ascii_hexdigit);
    let bytes: Option<Vec<u8>> = is_hex.then(|| digits.chunks_exact(2).map(pair).collect()).flatten();
    bytes.ok_or_else(|| Failure::invalid("that is not hexadecimal"))
}

#[cfg(test)]
mod tests {
    use super::{Command, Configure, Failure, MountKind, operation, parse, parse_hex, response};
    use serde_json::json;

    #[test]
    fn the_request_of_the_contract_is_read() {
        let text = r#"{"op":"configure","hostname":"web","time_ns":1,"entropy":"00ff","layers":[["l0i","l0t"],["l1i",null]],"upper":"upper",
            "network":{"mac":"02:00:00:00:00:01","address":"10.88.0.5/24","gateway":"10.88.0.1","mtu":1500},"hosts":"h","resolv":"r",
            "mounts":[{"kind":"virtiofs","tag":"t","path":"/p","read_only":true,"file":null,"n_bytes":null}],"pids_max":null,"later":1}"#;
        assert_eq!(operation(text.as_bytes()), Ok("configure".to_owned()));
        let read: Configure = parse(text.as_bytes()).expect("it is well formed");
        assert_eq!(read.layers, [("l0i".to_owned(), Some("l0t".to_owned())), ("l1i".to_owned(), None)]);
        assert_eq!((read.renew.time_ns, read.renew.hostname.as_str()), (1, "web"));
        assert_eq!(read.renew.network.map(|network| network.mtu), Some(Some(1500)));
        assert!(read.mounts[0].read_only && read.mounts[0].kind == MountKind::Virtiofs);
    }

    #[test]
    fn what_makes_no_sense_is_invalid() {
        for text in [&b"{"[..], b"[]", b"{\"op\":1}", b"\xff"] {
            assert_eq!(operation(text).map_err(|failure| failure.code), Err("invalid".to_owned()));
        }
        for text in [r#"{"argv":[]}"#, r#"{"argv":[""]}"#, r#"{"argv":["a\u0000b"]}"#, r#"{"argv":["a"],"env":{"a=b":"c"}}"#] {
            let command: Command = parse(text.as_bytes()).expect("it is JSON of the right shape");
            assert_eq!(command.check().map_err(|failure| failure.code), Err("invalid".to_owned()), "{text}");
        }
    }

    #[test]
    fn answers_are_ok_or_error() {
        assert_eq!(response(&Ok(json!({"pid": 7}))), br#"{"ok":{"pid":7}}"#);
        assert_eq!(response(&Err(Failure::new("busy", "later"))), br#"{"error":{"code":"busy","message":"later"}}"#);
    }

    #[test]
    fn hexadecimal_is_read_or_refused() {
        assert_eq!(parse_hex("00fFa0"), Ok(vec![0, 255, 160]));
        assert!(parse_hex("0").is_err() && parse_hex("0g").is_err() && parse_hex("+1").is_err() && parse_hex("\u{e9}").is_err());
    }
}
