//! What the shim is told: one JSON file, written by the engine before the shim is started.
//!
//! Rules: whatever the engine could have got wrong is refused here with one line, before anything was made. Unknown keys are ignored, a
//! newer `version` is not. (The file names the machine, its processors and its memory too, for people.)

use std::collections::BTreeMap;

use serde::Deserialize;

/// Files that a machine may be handed.
const FILES_MAX: usize = 64;
/// Longest name of a network interface.
const INTERFACE_BYTES_MAX: usize = 15;
/// A longer time is a mistake of the caller, and would overflow sums of milliseconds at last.
const TIMEOUT_S_MAX: f64 = 1e9;

/// One file of the machine: descriptor 3 is the first.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum File {
    /// A listening Unix stream socket.
    Listen {
        /// Where it listens.
        path: String,
    },
    /// One end of a socket pair; the other is the console.
    Console,
    /// One end of a socket pair; the other is the channel to the agent.
    Agent,
    /// An existing tap.
    Tap {
        /// The interface's name.
        name: String,
    },
}

/// Where the console comes from.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Console {
    /// The file `console`.
    Socket,
    /// The machine's stdin, stdout and stderr.
    Stdio,
}

/// How the agent is reached.
#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(untagged)]
pub enum Agent {
    /// `"socket"` or `"none"`.
    Plain(PlainAgent),
    /// The hybrid vsock of Firecracker and Cloud Hypervisor.
    Vsock {
        /// The socket of the machine's monitor.
        vsock: String,
        /// The guest's port.
        port: u32,
    },
}

/// The two that need no more words.
#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum PlainAgent {
    /// The file `agent`.
    Socket,
    /// There is none: the command's end is the machine's end.
    None,
}

/// The whole file.
#[derive(Clone, Debug, Deserialize)]
pub struct Config {
    /// 1.
    pub version: u32,
    /// The machine's program.
    pub argv: Vec<String>,
    /// All of its environment.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Where it runs.
    #[serde(default = "root")]
    pub cwd: String,
    /// Its descriptors from 3 on.
    #[serde(default)]
    pub files: Vec<File>,
    /// Where the console comes from.
    pub console: Console,
    /// How the agent is reached.
    pub agent: Agent,
    /// Whether the machine gets a network namespace of its own, empty but for its taps.
    #[serde(default)]
    pub own_network: bool,
    /// Files into which the machine writes itself before it begins.
    #[serde(default)]
    pub cgroup_procs: Vec<String>,
    /// The log of the main command, in conmon's k8s format.
    pub log: String,
    /// Over this it is begun anew; 0 or less: never.
    pub log_bytes_max: i64,
    /// What the console said.
    pub console_log: String,
    /// Over this it is renamed to FILE.1 and begun anew; 0 or less: never.
    pub console_bytes_max: i64,
    /// The exit code, in decimal.
    pub exit_file: String,
    /// How it ended, as JSON.
    pub end_file: String,
    /// Where the shim listens.
    pub socket: String,
    /// Where it serves Kata's routes.
    #[serde(default)]
    pub monitor_socket: Option<String>,
    /// How a machine without an agent is asked to end.
    #[serde(default)]
    pub stop_argv: Option<Vec<String>>,
    /// For the agent's HELLO.
    pub boot_timeout_s: f64,
    /// Without any frame.
    pub silent_timeout_s: f64,
    /// Between the wish that it ends and the kill.
    pub stop_timeout_s: f64,
}

impl Config {
    /// Read the text of a configuration.
    pub fn parse(text: &[u8]) -> Result<Self, String> {
        let config: Self = serde_json::from_slice(text).map_err(|error| format!("the configuration makes no sense: {error}"))?;
        config.check()?;
        Ok(config)
    }

    /// Whether there is an agent to talk to.
    pub fn has_agent(&self) -> bool {
        self.agent != Agent::Plain(PlainAgent::None)
    }

    /// The names of its taps, in order.
    pub fn taps(&self) -> impl Iterator<Item = &str> {
        self.files.iter().filter_map(|file| if let File::Tap { name } = file { Some(name.as_str()) } else { None })
    }

    fn check(&self) -> Result<(), String> {
        if self.version != 1 {
            return Err(format!("a configuration of version {}: this shim knows 1", self.version));
        }
        if self.argv.first().is_none_or(String::is_empty) {
            return Err("no program to start".into());
        }
        if self.stop_argv.as_ref().is_some_and(Vec::is_empty) {
            return Err("stop_argv is empty".into());
        }
        self.check_paths()?;
        self.check_times()?;
        self.check_files()
    }

    fn check_paths(&self) -> Result<(), String> {
        let listening = self.files.iter().filter_map(|file| if let File::Listen { path } = file { Some(path) } else { None });
        let vsock = if let Agent::Vsock { vsock, .. } = &self.agent { Some(vsock) } else { None };
        let named = [&self.cwd, &self.log, &self.console_log, &self.exit_file, &self.end_file, &self.socket];
        let mut paths = named.into_iter().chain(&self.monitor_socket).chain(&self.cgroup_procs).chain(listening).chain(vsock);
        match paths.find(|path| !path.starts_with('/') || path.contains('\0')) {
            Some(path) => Err(format!("{path:?} is not an absolute path")),
            None => Ok(()),
        }
    }

    fn check_times(&self) -> Result<(), String> {
        for (name, value) in [("boot", self.boot_timeout_s), ("silent", self.silent_timeout_s), ("stop", self.stop_timeout_s)] {
            if !(value.is_finite() && (0.0..=TIMEOUT_S_MAX).contains(&value)) {
                return Err(format!("{name}_timeout_s is {value}"));
            }
        }
        Ok(())
    }

    fn check_files(&self) -> Result<(), String> {
        if self.files.len() > FILES_MAX {
            return Err(format!("more than {FILES_MAX} files"));
        }
        for (file, is_wanted) in
            [(File::Console, self.console == Console::Socket), (File::Agent, self.agent == Agent::Plain(PlainAgent::Socket))]
        {
            if self.files.iter().filter(|other| **other == file).count() != usize::from(is_wanted) {
                return Err(format!("the files do not fit: {file:?} is {}wanted once", if is_wanted { "" } else { "not " }));
            }
        }
        match self.taps().find(|name| name.is_empty() || name.len() > INTERFACE_BYTES_MAX || name.contains(['\0', '/', '%'])) {
            Some(name) => Err(format!("{name:?} is no interface's name")),
            None => Ok(()),
        }
    }
}

fn root() -> String {
    "/".into()
}

/// Whole milliseconds of a time that was checked.
pub fn milliseconds(time_s: f64) -> u64 {
    // A time is at most TIMEOUT_S_MAX here or clamped to it, and never negative: nothing is cut off but parts of a millisecond.
    #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
    {
        (time_s.clamp(0.0, TIMEOUT_S_MAX) * 1000.0) as u64
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::{Agent, Config, Console, File, PlainAgent};
    use serde_json::{Value, json};

    pub(crate) fn sample() -> Value {
        json!({
            "version": 1, "id": "a", "name": "n", "argv": ["/bin/true"], "env": {}, "cwd": "/",
            "files": [{"kind": "listen", "path": "/q"}, {"kind": "console"}, {"kind": "agent"}, {"kind": "tap", "name": "t0"}],
            "console": "socket", "agent": "socket", "own_network": true, "cgroup_procs": [], "log": "/l", "log_bytes_max": 1000,
            "console_log": "/c", "console_bytes_max": 1000, "exit_file": "/e", "end_file": "/f", "socket": "/s", "monitor_socket": null,
            "stop_argv": null, "boot_timeout_s": 60, "silent_timeout_s": 30.5, "stop_timeout_s": 10, "vcpus": 1,
            "memory_bytes": 134_217_728, "hypervisor": "qemu"
        })
    }

    #[test]
    fn a_whole_configuration_is_understood() {
        let config = Config::parse(sample().to_string().as_bytes()).expect("it is right");
        assert_eq!(config.files[0], File::Listen { path: "/q".into() });
        assert_eq!((config.console, &config.agent), (Console::Socket, &Agent::Plain(PlainAgent::Socket)));
        assert_eq!(config.taps().collect::<Vec<_>>(), ["t0"]);
    }

    #[test]
    fn a_vsock_is_an_agent() {
        let mut value = sample();
        value["agent"] = json!({"vsock": "/v", "port": 1024});
        value["files"] = json!([{"kind": "console"}]);
        let config = Config::parse(value.to_string().as_bytes()).expect("it is right");
        assert_eq!(config.agent, Agent::Vsock { vsock: "/v".into(), port: 1024 });
        assert!(config.has_agent());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (key, value, why) in [
            ("version", json!(2), "version 2"),
            ("argv", json!([]), "no program"),
            ("stop_argv", json!([]), "stop_argv"),
            ("log", json!("relative"), "absolute"),
            ("monitor_socket", json!("x"), "absolute"),
            ("boot_timeout_s", json!(-1), "boot_timeout_s"),
            ("silent_timeout_s", json!(1e300), "silent_timeout_s"),
            ("files", json!([{"kind": "agent"}]), "Console"),
            ("files", json!([{"kind": "console"}, {"kind": "agent"}, {"kind": "agent"}]), "Agent"),
            ("files", json!([{"kind": "console"}, {"kind": "agent"}, {"kind": "tap", "name": "much-too-long-a-name"}]), "interface"),
            ("agent", json!("pigeon"), "makes no sense"),
            ("agent", json!("none"), "Agent"),
        ] {
            let mut changed = sample();
            changed[key] = value;
            let error = Config::parse(changed.to_string().as_bytes()).expect_err("it is wrong");
            assert!(error.contains(why), "{key}: {error}");
        }
    }
}
