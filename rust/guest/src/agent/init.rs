//! Process 1: from the kernel's first program to the agent's loop, and back to power off.
//!
//! The initial memory file system holds this program as `/init`, and in `/modules` the kernel's modules, decompressed, with the files `order`
//! (one name per line, each after what it needs) and `order.vsock` (more of them, for that channel). The channel comes up with the first
//! module already, so the rest are inserted while the host reads the greeting.
//!
//! Settings are words of the kernel's command line: `isopod.channel=serial|vsock`, `isopod.disks=NAME,...` for a monitor that gives disks no
//! serials of ours. All others come from the host, by `configure`.

use std::collections::VecDeque;
use std::ffi::CStr;
use std::fs;
use std::io::{Error, Result};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

use super::channel::{Channel, say};
use super::server::Server;
use super::{metrics, system};

const MODULES: &str = "/modules";
/// What the channel needs on machines whose devices are not on a PCI bus; built into the kernel for those that are.
const CHANNEL_MODULES: [&str; 1] = ["virtio_mmio"];
/// How long the killed may take to be gone, and the disks to be written.
const KILLED_S: u64 = 2;
const WRITTEN_S: u64 = 10;

/// Where frames go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// A virtio-serial port.
    Serial,
    /// A vsock port.
    Vsock,
}

/// Come up and serve. Returns never: without process 1 the machine is over.
pub fn run() -> ! {
    std::panic::set_hook(Box::new(|panic| {
        say(&format!("{panic}"));
        system::end_machine(ends_by_reboot(&command_line()));
    }));
    if let Err(error) = serve() {
        say(&format!("cannot begin: {error}"));
    }
    power_off();
    loop {
        std::thread::park();
    }
}

fn serve() -> Result<()> {
    for (kind, path) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        fs::create_dir_all(path)?;
        mount(kind, path, kind, MountFlags::NOSUID | MountFlags::NOEXEC, None::<&CStr>)?;
    }
    system::catch_ctrl_alt_del();
    let signals = system::open_signals()?;
    let way = way(&command_line());
    let mut modules = Modules::read(way);
    for name in CHANNEL_MODULES {
        modules.insert(name);
    }
    let channel = match way {
        Way::Serial => Channel::open_port()?,
        Way::Vsock => {
            modules.insert_all();
            Channel::open_vsock()?
        }
    };
    Server::new(channel, modules, signals).run()
}

/// The channel that the kernel's command line names.
pub fn way(cmdline: &str) -> Way {
    let said = cmdline.split_ascii_whitespace().filter_map(|word| word.strip_prefix("isopod.channel=")).next_back();
    if said == Some("vsock") { Way::Vsock } else { Way::Serial }
}

/// The kernel's command line, "" before there is /proc.
pub fn command_line() -> String {
    fs::read_to_string("/proc/cmdline").unwrap_or_default()
}

/// Whether the machine is ended by a reboot: the command line says how the keyboard's controller does that, as Firecracker wants it.
pub fn ends_by_reboot(cmdline: &str) -> bool {
    cmdline.split_ascii_whitespace().rfind(|word| word.starts_with("reboot=")) == Some("reboot=k")
}

/// Kernel modules that are not inserted yet.
pub struct Modules {
    names: VecDeque<String>,
}

impl Modules {
    fn read(way: Way) -> Self {
        let list = |file: &str| fs::read_to_string(Path::new(MODULES).join(file)).unwrap_or_default();
        let mut text = list("order");
        if way == Way::Vsock {
            text += &list("order.vsock");
        }
        Self { names: text.lines().filter(|line| !line.is_empty()).map(str::to_owned).collect() }
    }

    /// Whether none is left.
    pub fn are_inserted(&self) -> bool {
        self.names.is_empty()
    }

    /// Insert the next one.
    pub fn insert_next(&mut self) {
        if let Some(name) = self.names.front().cloned() {
            self.insert(&name);
        }
    }

    /// Insert all that are left.
    pub fn insert_all(&mut self) {
        while !self.are_inserted() {
            self.insert_next();
        }
    }

    fn insert(&mut self, name: &str) {
        let n_before = self.names.len();
        self.names.retain(|other| other != name);
        if self.names.len() == n_before {
            return;
        }
        let path = Path::new(MODULES).join(format!("{name}.ko"));
        let inserted = fs::read(&path).and_then(|image| Ok(rustix::system::init_module(&image, c"")?));
        match inserted {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
            Err(error) => say(&format!("module {name}: {error}")),
        }
        // Its memory is the guest's again.
        let _ = fs::remove_file(path);
    }
}

/// End everything and power the machine off: processes, then disks, then mounts.
pub fn power_off() {
    let reboots = ends_by_reboot(&command_line());
    let _ = system::kill(-1, libc::SIGKILL);
    let until = Instant::now() + Duration::from_secs(KILLED_S);
    while metrics::has_children() && Instant::now() < until {
        while system::reap().is_some() {}
        std::thread::sleep(Duration::from_millis(1));
    }
    write_disks();
    system::end_machine(reboots);
}

/// Sync and unmount in a child: a share or a disk that is dead would keep process 1 from ever getting further.
fn write_disks() {
    let Ok(Some(child)) = system::fork(None) else {
        rustix::fs::sync();
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
        for path in in_reverse(&mounts) {
            let _ = unmount(Path::new(&path), UnmountFlags::empty());
        }
        system::exit_now(0);
    };
    let until = Instant::now() + Duration::from_secs(WRITTEN_S);
    while Instant::now() < until {
        match system::reap() {
            Some((pid, _)) if pid == child => return,
            _ => std::thread::sleep(Duration::from_millis(1)),
        }
    }
    say(&format!("the disks were not written in {WRITTEN_S} s: {}", Error::from_raw_os_error(libc::ETIMEDOUT)));
}

/// The places of what is mounted, the last first, without those that hold nothing.
fn in_reverse(mounts: &str) -> Vec<String> {
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    let kept = ["/", "/proc", "/sys", "/dev"];
    let mut places: Vec<String> = places.filter(|place| !kept.contains(place)).map(metrics::unescape).collect();
    places.reverse();
    places
}

#[cfg(test)]
mod tests {
    use super::{Way, ends_by_reboot, in_reverse, way};

    #[test]
    fn the_last_word_of_the_command_line_counts() {
        assert_eq!(way("console=ttyS0 quiet"), Way::Serial);
        assert_eq!(way("isopod.channel=serial isopod.channel=vsock quiet\n"), Way::Vsock);
        assert_eq!(way("isopod.channel=carrier-pigeon"), Way::Serial);
    }

    #[test]
    fn a_monitor_without_power_is_ended_by_a_reboot() {
        assert!(ends_by_reboot("reboot=t panic=-1 reboot=k pci=off"));
        assert!(!ends_by_reboot("reboot=k reboot=t"));
        assert!(!ends_by_reboot("console=ttyS0"));
    }

    #[test]
    fn what_was_mounted_last_is_unmounted_first() {
        let mounts = "rootfs / rootfs rw 0 0\nproc /proc proc rw 0 0\n/dev/vdc /upper ext4 rw 0 0\noverlay /newroot overlay rw 0 0\nt /newroot/a\\040b tmpfs rw 0 0\n";
        assert_eq!(in_reverse(mounts), ["/newroot/a b", "/newroot", "/upper"]);
    }
}
