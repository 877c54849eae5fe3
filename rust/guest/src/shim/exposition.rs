//! What Kata's shim says at `/metrics`: Prometheus' text format 0.0.4, one group per family, sorted.
//!
//! Families and items are those of Kata's shim-v2; everything is typed as Kata types it (gauges, but for scrape counts and the histogram).
//! Units: clock ticks in *_proc_stat, bytes in *_proc_status and meminfo, milliseconds in kata_guest_cpu_time and the times of diskstat,
//! sectors of 512 bytes, seconds in kata_agent_total_time. What cannot be known is left out rather than made up: items that the guest's
//! agent does not tell (vm_stat, times per CPU and per direction of a disk), kata_shim_pod_overhead_cpu (Kata's is a rate over a second of
//! waiting), and everything Go-specific. `kata_shim_agent_answers` is ours: 0 when the guest's families are absent because it did not answer.
//! Source: proc(5); the family tables of Kata's runtime metrics documentation.

use std::fmt::Write;
use std::fs::{read_dir, read_to_string};

use serde_json::Value;

use crate::shim::calls::{BOUNDS_MS, Calls};

const STATUS_ITEMS: [&str; 15] = [
    "VmPeak", "VmSize", "VmLck", "VmPin", "VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem", "VmData", "VmStk", "VmExe", "VmLib", "VmPTE",
    "VmSwap",
];
const STATUS_COUNTS: [&str; 2] = ["voluntary_ctxt_switches", "nonvoluntary_ctxt_switches"];
const IO_ITEMS: [(&str, &str); 7] = [
    ("rchar", "rchar"),
    ("wchar", "wchar"),
    ("syscr", "syscr"),
    ("syscw", "syscw"),
    ("read_bytes", "readbytes"),
    ("write_bytes", "writebytes"),
    ("cancelled_write_bytes", "cancelledwritebytes"),
];
const NET_ITEMS: [&str; 16] = [
    "recv_bytes",
    "recv_packets",
    "recv_errs",
    "recv_drop",
    "recv_fifo",
    "recv_frame",
    "recv_compressed",
    "recv_multicast",
    "sent_bytes",
    "sent_packets",
    "sent_errs",
    "sent_drop",
    "sent_fifo",
    "sent_colls",
    "sent_carrier",
    "sent_compressed",
];
const SECTOR_BYTES: f64 = 512.0;

/// What is to be told.
pub struct Facts<'a> {
    /// The machine's process.
    pub vmm_pid: i32,
    /// Its taps, on the host.
    pub taps: Vec<&'a str>,
    /// What the guest says about itself, if it does.
    pub guest: Option<&'a Value>,
    /// How long its answers took.
    pub calls: &'a Calls,
    /// How often the agent was asked.
    pub n_scrapes: u64,
}

/// The whole text.
pub fn render(facts: &Facts<'_>) -> String {
    let mut page = Page::default();
    if let Some(guest) = facts.guest {
        page.agent(guest, facts.n_scrapes);
        page.guest(guest);
    }
    page.process("hypervisor", &format!("/proc/{}", facts.vmm_pid));
    page.taps(&facts.taps);
    page.histogram(facts.calls);
    page.family("kata_shim_agent_answers", "gauge", "Whether the agent in the guest answered this scrape.");
    page.sample("kata_shim_agent_answers", &[], f64::from(u8::from(facts.guest.is_some())));
    page.process("shim", "/proc/self");
    page.overhead(facts);
    page.text
}

#[derive(Default)]
struct Page {
    text: String,
}

impl Page {
    fn family(&mut self, name: &str, kind: &str, help: &str) {
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, labels: &[(&str, &str)], value: f64) {
        self.text.push_str(name);
        for (index, (label, text)) in labels.iter().enumerate() {
            let _ = write!(self.text, "{}{label}=\"{}\"", if index == 0 { '{' } else { ',' }, escaped(text));
        }
        let _ = writeln!(self.text, "{} {value}", if labels.is_empty() { "" } else { "}" });
    }

    /// A family of items; without any it is absent.
    fn items<'a>(&mut self, name: &str, help: &str, items: impl IntoIterator<Item = (&'a str, f64)>) {
        let mut items = items.into_iter().peekable();
        if items.peek().is_some() {
            self.family(name, "gauge", help);
            for (item, value) in items {
                self.sample(name, &[("item", item)], value);
            }
        }
    }

    fn single(&mut self, name: &str, kind: &str, help: &str, value: Option<f64>) {
        if let Some(value) = value {
            self.family(name, kind, help);
            self.sample(name, &[], value);
        }
    }

    fn process(&mut self, who: &str, folder: &str) {
        let read = |file: &str| read_to_string(format!("{folder}/{file}")).unwrap_or_default();
        let (status, io, stat) = (read("status"), read("io"), read("stat"));
        let fds = read_dir(format!("{folder}/fd")).ok().map(|entries| count(entries.count()));
        self.single(&format!("kata_{who}_fds"), "gauge", &format!("Open files of the {who}."), fds);
        let io_items: Vec<_> = IO_ITEMS.iter().filter_map(|(key, item)| Some((*item, value_of(&io, key)?))).collect();
        self.items(&format!("kata_{who}_io_stat"), &format!("Input and output counts of the {who}."), io_items);
        let names = ["utime", "stime", "cutime", "cstime"];
        let ticks: Vec<f64> =
            stat.rsplit_once(')').map_or("", |parts| parts.1).split_whitespace().skip(11).take(4).flat_map(str::parse).collect();
        self.items(&format!("kata_{who}_proc_stat"), &format!("CPU time of the {who} in clock ticks."), names.into_iter().zip(ticks));
        let lowered: Vec<(String, f64)> = status_items(&status);
        let items = lowered.iter().map(|(item, value)| (item.as_str(), *value));
        self.items(&format!("kata_{who}_proc_status"), &format!("Memory in bytes, and context switches, of the {who}."), items);
        self.single(&format!("kata_{who}_threads"), "gauge", &format!("Threads of the {who}."), value_of(&status, "Threads"));
    }

    fn taps(&mut self, taps: &[&str]) {
        let text = read_to_string("/proc/self/net/dev").unwrap_or_default();
        let mut rows: Vec<(&str, Vec<f64>)> =
            text.lines().filter_map(|line| line.split_once(':')).map(|(name, rest)| (name.trim(), numbers(rest))).collect();
        rows.retain(|(name, values)| taps.contains(name) && values.len() == NET_ITEMS.len());
        rows.sort_unstable_by_key(|row| row.0);
        if !rows.is_empty() {
            let name = "kata_hypervisor_netdev";
            self.family(name, "gauge", "Network counts of the machine's taps as the host sees them.");
            for (interface, values) in rows {
                for (item, value) in NET_ITEMS.into_iter().zip(values) {
                    self.sample(name, &[("interface", interface), ("item", item)], value);
                }
            }
        }
    }

    fn histogram(&mut self, calls: &Calls) {
        let name = "kata_shim_agent_rpc_durations_histogram_milliseconds";
        let mut is_first = true;
        for (action, counts) in calls.observed() {
            if std::mem::take(&mut is_first) {
                self.family(name, "histogram", "Time the agent took to answer.");
            }
            let bounds = BOUNDS_MS.iter().map(ToString::to_string).chain([String::from("+Inf")]);
            let mut n_answers = 0;
            for (bound, n_within) in bounds.zip(counts.cumulative()) {
                self.sample(&format!("{name}_bucket"), &[("action", action), ("le", &bound)], whole(n_within));
                n_answers = n_within;
            }
            self.sample(&format!("{name}_sum"), &[("action", action)], whole(counts.sum_ms));
            self.sample(&format!("{name}_count"), &[("action", action)], whole(n_answers));
        }
    }

    fn overhead(&mut self, facts: &Facts<'_>) {
        let resident =
            |folder: &str| value_of(&read_to_string(format!("{folder}/status")).unwrap_or_default(), "VmRSS").map(|kib| kib * 1024.0);
        let used = facts.guest.and_then(|guest| guest["main"]["memory_bytes"].as_f64());
        let whole = resident(&format!("/proc/{}", facts.vmm_pid)).zip(resident("/proc/self")).map(|(vmm, own)| vmm + own);
        let overhead = whole.zip(used).map(|(whole, used)| (whole - used).max(0.0));
        let help = "Memory of the hypervisor and the shim beyond what the command uses in the guest.";
        self.single("kata_shim_pod_overhead_memory_in_bytes", "gauge", help, overhead);
    }

    fn agent(&mut self, guest: &Value, n_scrapes: u64) {
        let agent = &guest["agent"];
        self.single("kata_agent_scrape_count", "counter", "How often the agent was asked for metrics.", Some(whole(n_scrapes)));
        self.single("kata_agent_threads", "gauge", "Threads of the agent.", agent["n_threads"].as_f64());
        self.single("kata_agent_total_rss", "gauge", "Resident bytes of the agent.", agent["resident_bytes"].as_f64());
        self.single("kata_agent_total_time", "gauge", "CPU seconds of the agent.", agent["cpu_s"].as_f64());
    }

    fn guest(&mut self, guest: &Value) {
        let cpu = sorted(&guest["cpu"]);
        if !cpu.is_empty() {
            let name = "kata_guest_cpu_time";
            self.family(name, "gauge", "CPU time of the guest in milliseconds.");
            for (item, value) in &cpu {
                self.sample(name, &[("cpu", "total"), ("item", item)], value * 1000.0);
            }
        }
        self.rows("kata_guest_diskstat", "Disk counts of the guest.", ("disk", &guest["disks"]), disk_items);
        let loads = ["load1", "load5", "load15"].into_iter().filter_map(|item| Some((item, guest[item].as_f64()?)));
        self.items("kata_guest_load", "Load of the guest.", loads.collect::<Vec<_>>());
        let memory: Vec<(String, f64)> = sorted(&guest["memory"]).into_iter().map(|(key, value)| (memory_item(&key), value)).collect();
        self.items("kata_guest_meminfo", "Guest memory in bytes.", memory.iter().map(|(item, value)| (item.as_str(), *value)));
        self.rows("kata_guest_netdev_stat", "Network counts of the guest.", ("interface", &guest["interfaces"]), interface_items);
        let tasks = [("cur", &guest["processes"]), ("max", &guest["threads"])]
            .into_iter()
            .filter_map(|(item, value)| Some((item, value.as_f64()?)));
        self.items("kata_guest_tasks", "Processes (cur) and threads (max) of the guest.", tasks.collect::<Vec<_>>());
    }

    fn rows(&mut self, name: &str, help: &str, (label, rows): (&str, &Value), items: fn(&Value) -> Vec<(&'static str, f64)>) {
        let mut seen: Vec<(&str, &Value)> = Vec::new();
        for row in rows.as_array().into_iter().flatten() {
            if let Some(who) = row["name"].as_str().filter(|who| !seen.iter().any(|(other, _)| other == who)) {
                seen.push((who, row));
            }
        }
        seen.sort_unstable_by_key(|(who, _)| *who);
        if !seen.is_empty() {
            self.family(name, "gauge", help);
            for (who, row) in seen {
                for (item, value) in items(row) {
                    self.sample(name, &[(label, who), ("item", item)], value);
                }
            }
        }
    }
}

fn disk_items(row: &Value) -> Vec<(&'static str, f64)> {
    [
        ("reads", "reads", 1.0),
        ("sectors_read", "read_bytes", 1.0 / SECTOR_BYTES),
        ("sectors_written", "written_bytes", 1.0 / SECTOR_BYTES),
        ("time_in_progress", "busy_s", 1000.0),
        ("writes", "writes", 1.0),
    ]
    .into_iter()
    .filter_map(|(item, key, factor)| Some((item, row[key].as_f64()? * factor)))
    .collect()
}

fn interface_items(row: &Value) -> Vec<(&'static str, f64)> {
    [
        ("recv_bytes", "received_bytes"),
        ("recv_drop", "received_drops"),
        ("recv_errs", "received_errors"),
        ("recv_packets", "received_packets"),
        ("sent_bytes", "sent_bytes"),
        ("sent_drop", "sent_drops"),
        ("sent_errs", "sent_errors"),
        ("sent_packets", "sent_packets"),
    ]
    .into_iter()
    .filter_map(|(item, key)| Some((item, row[key].as_f64()?)))
    .collect()
}

/// Kata's word for a figure of memory.
fn memory_item(key: &str) -> String {
    match key {
        "total" | "free" | "available" => format!("mem_{key}"),
        _ => key.to_owned(),
    }
}

fn sorted(object: &Value) -> Vec<(String, f64)> {
    let mut items: Vec<(String, f64)> =
        object.as_object().into_iter().flatten().filter_map(|(key, value)| Some((key.clone(), value.as_f64()?))).collect();
    items.sort_unstable_by(|one, other| one.0.cmp(&other.0));
    items
}

fn status_items(status: &str) -> Vec<(String, f64)> {
    let bytes = STATUS_ITEMS.iter().filter_map(|key| Some((key.to_lowercase(), value_of(status, key)? * 1024.0)));
    let counts = STATUS_COUNTS.iter().filter_map(|key| Some(((*key).to_owned(), value_of(status, key)?)));
    let huge = value_of(status, "HugetlbPages").map(|value| ("hugetlbpages".to_owned(), value * 1024.0));
    let mut items: Vec<(String, f64)> = bytes.chain(counts).chain(huge).collect();
    items.sort_unstable_by(|one, other| one.0.cmp(&other.0));
    items
}

/// The first number behind `key:`.
fn value_of(text: &str, key: &str) -> Option<f64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'))?;
    rest.split_whitespace().next()?.parse().ok()
}

fn numbers(text: &str) -> Vec<f64> {
    text.split_whitespace().flat_map(str::parse).collect()
}

fn whole(value: u64) -> f64 {
    // Counts beyond 2^53 lose their last digits, as everywhere in this format.
    #[allow(clippy::cast_precision_loss)]
    {
        value as f64
    }
}

fn count(value: usize) -> f64 {
    whole(value as u64)
}

fn escaped(text: &str) -> String {
    text.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::{Facts, render};
    use crate::shim::calls::Calls;
    use serde_json::json;

    fn own_pid() -> i32 {
        i32::try_from(std::process::id()).expect("pids are small")
    }

    #[test]
    fn units_are_those_of_kata() {
        let guest = json!({
            "load1": 0.5, "load5": 0.25, "load15": 0, "processes": 12, "threads": 15,
            "memory": {"total": 1000, "free": 10, "buffers": 5}, "cpu": {"user": 1.5, "idle": 2},
            "disks": [{"name": "vd\"a", "reads": 3, "read_bytes": 5120, "writes": 0, "written_bytes": 512, "busy_s": 0.25}],
            "interfaces": [{"name": "eth0", "received_bytes": 7, "sent_drops": 1}], "agent": {"cpu_s": 0.125, "n_threads": 1},
            "main": {"memory_bytes": 0}
        });
        let mut calls = Calls::default();
        calls.observe(Calls::index("exec"), 3);
        let text = render(&Facts { vmm_pid: own_pid(), taps: vec!["lo"], guest: Some(&guest), calls: &calls, n_scrapes: 4 });
        for line in [
            r#"kata_guest_cpu_time{cpu="total",item="user"} 1500"#,
            r#"kata_guest_meminfo{item="mem_total"} 1000"#,
            r#"kata_guest_meminfo{item="buffers"} 5"#,
            r#"kata_guest_diskstat{disk="vd\"a",item="sectors_read"} 10"#,
            r#"kata_guest_diskstat{disk="vd\"a",item="time_in_progress"} 250"#,
            r#"kata_guest_netdev_stat{interface="eth0",item="sent_drop"} 1"#,
            r#"kata_guest_tasks{item="cur"} 12"#,
            r#"kata_guest_load{item="load5"} 0.25"#,
            "kata_agent_scrape_count 4",
            "kata_agent_total_time 0.125",
            "kata_shim_agent_answers 1",
            r#"kata_shim_agent_rpc_durations_histogram_milliseconds_bucket{action="exec",le="4"} 1"#,
            r#"kata_shim_agent_rpc_durations_histogram_milliseconds_bucket{action="exec",le="+Inf"} 1"#,
            "# TYPE kata_hypervisor_netdev gauge",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\nis not in\n{text}");
        }
        assert!(text.contains("\nkata_shim_pod_overhead_memory_in_bytes "));
    }

    #[test]
    fn a_silent_guest_leaves_its_families_out() {
        let calls = Calls::default();
        let text = render(&Facts { vmm_pid: own_pid(), taps: vec![], guest: None, calls: &calls, n_scrapes: 0 });
        assert!(!text.contains("kata_guest") && !text.contains("kata_agent"));
        assert!(text.contains("kata_shim_agent_answers 0\n"));
        assert!(text.contains(r#"kata_hypervisor_proc_status{item="vmrss"} "#));
    }

    #[test]
    fn every_family_stands_once() {
        let nonsense = json!({"disks": [{"name": "a", "reads": 1}, {"name": "a", "reads": 2}, 7], "memory": [1], "cpu": {"user": "x"}});
        let text = render(&Facts { vmm_pid: own_pid(), taps: vec![], guest: Some(&nonsense), calls: &Calls::default(), n_scrapes: 1 });
        let mut families: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")).collect();
        let n_families = families.len();
        families.sort_unstable();
        families.dedup();
        assert_eq!(families.len(), n_families);
        assert_eq!(text.matches(r#"kata_guest_diskstat{disk="a",item="reads"}"#).count(), 1);
        assert!(!text.contains("cpu_time"));
    }
}
