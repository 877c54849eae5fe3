//! The machine's figures, from /proc, /sys and its cgroup. Bytes and seconds; what the kernel does not tell is left out or zero.
//!
//! Source: proc(5), the kernel's `Documentation/admin-guide/iostats.rst` (sectors of 512 bytes) and `cgroup-v2.rst`.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

const SECTOR_BYTES: u64 = 512;
/// Clock ticks per second in /proc, a constant of Linux' interface.
const TICKS: f64 = 100.0;
const MEMORY: [(&str, &str); 14] = [
    ("total", "MemTotal"),
    ("free", "MemFree"),
    ("available", "MemAvailable"),
    ("cached", "Cached"),
    ("buffers", "Buffers"),
    ("swap_total", "SwapTotal"),
    ("swap_free", "SwapFree"),
    ("active", "Active"),
    ("inactive", "Inactive"),
    ("dirty", "Dirty"),
    ("anonymous", "AnonPages"),
    ("mapped", "Mapped"),
    ("shared", "Shmem"),
    ("slab", "Slab"),
];
const CPU: [&str; 8] = ["user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal"];

/// All figures.
///
/// `before_s` is the time process 1 had taken when it became the agent: until then it was the kernel that came up in it.
pub fn read(before_s: f64) -> Value {
    let stat = text("/proc/stat");
    let load = text("/proc/loadavg");
    let loads: Vec<f64> = load.split(' ').take(3).filter_map(|part| part.parse().ok()).collect();
    // "running/all" counts threads.
    let threads = load.split(' ').nth(3).and_then(|part| part.split_once('/')?.1.parse::<u64>().ok());
    json!({
        "uptime_s": text("/proc/uptime").split(' ').next().and_then(|part| part.parse::<f64>().ok()),
        "load1": loads.first(),
        "load5": loads.get(1),
        "load15": loads.get(2),
        "memory": memory(&text("/proc/meminfo")),
        "cpu": cpu(&stat),
        "n_cpus": n_cpus(),
        "processes": n_processes(),
        "threads": threads,
        "disks": disks(&text("/proc/diskstats")),
        "interfaces": interfaces(&text("/proc/net/dev")),
        "agent": agent(before_s),
        "main": group("main"),
    })
}

/// Processors in use.
pub fn n_cpus() -> usize {
    text("/proc/stat").lines().filter(|line| line.starts_with("cpu") && !line.starts_with("cpu ")).count()
}

/// The memory the kernel manages.
pub fn memory_bytes() -> u64 {
    memory(&text("/proc/meminfo"))["total"].as_u64().unwrap_or(0)
}

/// Whether process 1 has children, ended ones too.
pub fn has_children() -> bool {
    !text("/proc/self/task/1/children").trim().is_empty()
}

/// The places of what is mounted at or below some folders, the last first.
pub fn mounted_below(folders: &[&str]) -> Vec<PathBuf> {
    let mounts = text("/proc/self/mounts");
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(1)).map(|place| PathBuf::from(unescape(place)));
    let mut places: Vec<PathBuf> = places.filter(|place| folders.iter().any(|folder| place.starts_with(folder))).collect();
    places.reverse();
    places
}

/// Undo what the kernel does to blanks in its lists of mounts: `\040`.
pub fn unescape(text: &str) -> String {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, tail @ ..] = rest {
        let code = tail.get(..3).and_then(|digits| std::str::from_utf8(digits).ok()).and_then(|digits| u8::from_str_radix(digits, 8).ok());
        if let (b'\\', Some(code)) = (first, code) {
            bytes.push(code);
            rest = &tail[3..];
        } else {
            bytes.push(*first);
            rest = tail;
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The number behind a word at the beginning of a line.
pub fn field(text: &str, name: &str) -> Option<u64> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok())
}

fn text(path: impl AsRef<Path>) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

fn memory(meminfo: &str) -> Value {
    let kib = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
        line.trim().trim_end_matches(" kB").parse::<u64>().ok()
    };
    let rows = MEMORY.iter().filter_map(|(key, name)| Some(((*key).to_owned(), json!(kib(name)? * 1024))));
    Value::Object(rows.collect::<Map<_, _>>())
}

fn cpu(stat: &str) -> Value {
    let ticks = stat.lines().find_map(|line| line.strip_prefix("cpu ")).unwrap_or("").split_ascii_whitespace();
    let rows = CPU.iter().zip(ticks.filter_map(|part| part.parse::<f64>().ok()));
    Value::Object(rows.map(|(key, ticks)| ((*key).to_owned(), json!(ticks / TICKS))).collect::<Map<_, _>>())
}

fn n_processes() -> usize {
    let Ok(folder) = fs::read_dir("/proc") else { return 0 };
    let is_process = |name: &str| name.bytes().all(|byte| byte.is_ascii_digit());
    folder.filter(|entry| entry.as_ref().is_ok_and(|entry| entry.file_name().to_str().is_some_and(is_process))).count()
}

#[allow(clippy::cast_precision_loss)] // milliseconds, as seconds with a fraction
fn disks(diskstats: &str) -> Vec<Value> {
    let disk = |line: &str| {
        let words: Vec<&str> = line.split_ascii_whitespace().collect();
        let number = |index: usize| words.get(index).and_then(|word| word.parse::<u64>().ok());
        Some(json!({
            "name": words.get(2)?,
            "reads": number(3)?,
            "read_bytes": number(5)? * SECTOR_BYTES,
            "writes": number(7)?,
            "written_bytes": number(9)? * SECTOR_BYTES,
            "busy_s": number(12)? as f64 / 1000.0,
        }))
    };
    diskstats.lines().filter_map(disk).collect()
}

fn interfaces(dev: &str) -> Vec<Value> {
    let interface = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        let numbers: Vec<u64> = rest.split_ascii_whitespace().filter_map(|word| word.parse().ok()).collect();
        let number = |index: usize| numbers.get(index).copied();
        Some(json!({
            "name": name.trim(),
            "received_bytes": number(0)?,
            "received_packets": number(1)?,
            "received_errors": number(2)?,
            "received_drops": number(3)?,
            "sent_bytes": number(8)?,
            "sent_packets": number(9)?,
            "sent_errors": number(10)?,
            "sent_drops": number(11)?,
        }))
    };
    dev.lines().skip(2).filter_map(interface).collect()
}

/// The processor's time that process 1 has taken so far.
pub fn own_cpu_s() -> f64 {
    let stat = text("/proc/self/stat");
    // The name of a program may hold blanks; the numbers follow its last bracket.
    let words: Vec<&str> = stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace().collect();
    let ticks = |index: usize| words.get(index).and_then(|word| word.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / TICKS
}

fn agent(before_s: f64) -> Value {
    let kib = |text: &str, name: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).unwrap_or("0");
        line.trim().trim_end_matches(" kB").trim().parse::<u64>().unwrap_or(0) * 1024
    };
    let status = text("/proc/self/status");
    json!({
        "cpu_s": own_cpu_s() - before_s,
        "resident_bytes": kib(&status, "VmRSS"),
        "n_fds": fs::read_dir("/proc/self/fd").map_or(0, |folder| folder.count().saturating_sub(1)),
        "n_threads": 1,
        "proportional_bytes": kib(&text("/proc/self/smaps_rollup"), "Pss"),
    })
}

#[allow(clippy::cast_precision_loss)] // microseconds, as seconds with a fraction
fn group(name: &str) -> Value {
    let folder = Path::new("/sys/fs/cgroup").join(name);
    let number = |file: &str| text(folder.join(file)).trim().parse::<u64>().unwrap_or(0);
    let microseconds = field(&text(folder.join("cpu.stat")), "usage_usec").unwrap_or(0);
    json!({
        "memory_bytes": number("memory.current"),
        "cpu_s": microseconds as f64 / 1e6,
        "n_pids": number("pids.current"),
        "oom_kills": field(&text(folder.join("memory.events")), "oom_kill").unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::{cpu, disks, field, interfaces, memory, unescape};
    use serde_json::json;

    #[test]
    fn the_kernels_texts_are_read() {
        let read = memory("MemTotal:         100 kB\nMemFree:           7 kB\nHugePages_Total:       0\n");
        assert_eq!(read, json!({"total": 102_400, "free": 7168}));
        assert_eq!(cpu("cpu  100 0 50 4000 1 2 3 4 0 0\ncpu0 1 1 1 1\n")["idle"], json!(40.0));
        let disk = " 254       0 vda 10 1 80 5 3 0 16 2 0 1500 7 0 0 0 0 0 0\n 7 0 loop0 1\n";
        let expected = json!([{"name": "vda", "reads": 10, "read_bytes": 40_960, "writes": 3, "written_bytes": 8192, "busy_s": 1.5}]);
        assert_eq!(json!(disks(disk)), expected);
        let link = interfaces("h\nh\n  eth0: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16\n");
        assert_eq!((&link[0]["name"], &link[0]["sent_drops"]), (&json!("eth0"), &json!(12)));
    }

    #[test]
    fn a_field_is_a_whole_word() {
        let text = "oom 1\noom_kill 2\noom_group_kill 3\n";
        assert_eq!([field(text, "oom_kill"), field(text, "oom"), field(text, "x")], [Some(2), Some(1), None]);
    }

    #[test]
    fn blanks_in_mounts_are_read_back() {
        assert_eq!(unescape(r"/a\040b\134c"), r"/a b\c");
        assert_eq!(unescape(r"/a\04"), r"/a\04");
    }
}
