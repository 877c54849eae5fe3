//! What the kernel says in its log of memory and file systems, as events for the host.
//!
//! Source: the kernel's `Documentation/ABI/testing/dev-kmsg`; the lines are those of `mm/oom_kill.c` and `fs/ext4/super.c`.

use std::fs;
use std::io::Result;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, SeekFrom, open, seek};
use rustix::io::Errno;
use serde_json::{Value, json};

use super::setup;

const RECORD_BYTES: usize = 8192;
/// At once: a flood of messages must not keep the loop.
const RECORDS_MAX: usize = 64;

/// The kernel's log from now on.
pub struct Messages {
    file: OwnedFd,
}

impl Messages {
    /// Open it behind what was said before.
    pub fn open() -> Result<Self> {
        let file = open("/dev/kmsg", OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
        seek(&file, SeekFrom::End(0))?;
        Ok(Self { file })
    }

    /// What to wait for.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The events among what was said since the last time.
    pub fn read(&mut self) -> Vec<Value> {
        let mut events = Vec::new();
        let mut buffer = [0; RECORD_BYTES];
        for _ in 0..RECORDS_MAX {
            match rustix::io::read(&self.file, &mut buffer) {
                Ok(n_read) => events.extend(event(&String::from_utf8_lossy(&buffer[..n_read]), &mounts)),
                // What it said was overwritten; the next is read.
                Err(Errno::PIPE) => {}
                Err(_) => break,
            }
        }
        events
    }
}

fn mounts() -> String {
    fs::read_to_string("/proc/self/mounts").unwrap_or_default()
}

/// The event that a record tells of.
fn event(record: &str, mounts: &dyn Fn() -> String) -> Option<Value> {
    let (_, line) = record.split_once(';')?;
    let line = line.lines().next()?;
    if let Some(facts) = line.strip_prefix("oom-kill:") {
        let fact = |key: &str| facts.split(',').find_map(|fact| fact.strip_prefix(key)?.strip_prefix('='));
        let pid: i32 = fact("pid")?.parse().ok()?;
        return Some(json!({"event": "oom", "pid": pid, "command": fact("task")?}));
    }
    let (device, said) = line.strip_prefix("EXT4-fs (")?.split_once("): ")?;
    if !said.starts_with("Remounting filesystem read-only") {
        return None;
    }
    let source = format!("/dev/{device}");
    let text = mounts();
    let place = text.lines().filter_map(|line| line.split_once(' ')).find(|(first, _)| *first == source)?.1;
    let place = place.split(' ').next()?;
    // The disk for what is written lies below the root.
    let path = place.strip_prefix(setup::ROOT).filter(|path| !path.is_empty()).unwrap_or("/");
    Some(json!({"event": "readonly", "path": path}))
}

#[cfg(test)]
mod tests {
    use super::event;
    use serde_json::json;

    fn mounts() -> String {
        "/dev/vdc /upper ext4 rw 0 0\n/dev/vdd /newroot/data ext4 rw 0 0\n".to_owned()
    }

    #[test]
    fn a_kill_and_a_disk_that_failed_are_events() {
        let record = "6,512,83,-;oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,task_memcg=/main,task=python3,pid=77,uid=0\n";
        assert_eq!(event(record, &mounts), Some(json!({"event": "oom", "pid": 77, "command": "python3"})));
        for (device, path) in [("vdc", "/"), ("vdd", "/data")] {
            let record = format!("2,9,8,-;EXT4-fs ({device}): Remounting filesystem read-only\n SUBSYSTEM=block\n");
            assert_eq!(event(&record, &mounts), Some(json!({"event": "readonly", "path": path})));
        }
    }

    #[test]
    fn other_messages_are_none() {
        for record in
            ["", "6,1,1,-", "6,1,1,-;hello", "6,1,1,-;EXT4-fs (vdz): Remounting filesystem read-only", "6,1,1,-;oom-kill:pid=x,task=y"]
        {
            assert_eq!(event(record, &mounts), None, "{record}");
        }
    }
}
