//! The sandbox: its layers, its root, what is mounted in it, and who and when the machine is. All of it runs in a child of process 1, whose
//! mounts it shares.
//!
//! In process 1's own mounts the layers lie in /layers, what is written in /upper, shares in /shares, the identity files in /identity, and
//! the overlay with everything in it on [`ROOT`]; /proc, /sys and /dev wait for it in /standard. Commands run in a copy of these mounts in which [`ROOT`] covers everything.
//!
//! Source: the kernel's overlayfs.rst, erofs.rst, cgroup-v2.rst, devices.txt; mount(2), pivot_root(2), user_namespaces(7).

use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, Mode, OFlags, makedev, mknodat, open};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount, mount_bind, mount_move, mount_remount, unmount};

use super::init::command_line;
use super::requests::{Configure, Failure, Layer, MountKind, MountWish, Prepare, Renew, parse_hex};
use super::root::{Root, make_own_folder, path_of};
use super::{metrics, network, system};

/// Where the sandbox's root lies for process 1.
pub const ROOT: &str = "/newroot";
const GROUPS: &str = "/sys/fs/cgroup";
const LAYERS: &str = "/layers";
const UPPER: &str = "/upper";
const SHARES: &str = "/shares";
const IDENTITY: &str = "/identity";
/// Which layers are mounted.
const MOUNTED: &str = "/layers.mounted";
const STANDARD: &str = "/standard";
/// That `prepare` was done.
const STAGED: &str = "/staged";
const DISK_S: u64 = 5;
const LAYERS_MAX: usize = 128;
const MOUNTS_MAX: usize = 256;
const SHM_BYTES: u64 = 64 << 20;
const NODES: [(&str, u32, u32); 6] = [("null", 1, 3), ("zero", 1, 5), ("full", 1, 7), ("random", 1, 8), ("urandom", 1, 9), ("tty", 5, 0)];
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("ptmx", "pts/ptmx"),
];

type Outcome = Result<(), Failure>;

/// Mount the layers, read-only, and make all else that is the same for every sandbox. Again with the same layers: nothing.
///
/// What is done here lies in a template's memory and costs its clones nothing.
pub fn prepare(wanted: &Prepare) -> Outcome {
    mount_layers(&wanted.layers)?;
    if fs::symlink_metadata(STAGED).is_ok() {
        return Ok(());
    }
    make_groups()?;
    make_own_folder(STANDARD).map_err(about(STANDARD))?;
    mount_standard(&Root::open(Path::new(STANDARD)).map_err(about(STANDARD))?)?;
    network::prepare()?;
    fs::write(STAGED, "").map_err(about(STAGED))
}

/// Make the sandbox.
pub fn configure(wanted: &Configure) -> Outcome {
    let outcome = build(wanted);
    if outcome.is_err() {
        for place in metrics::mounted_below(&[ROOT, UPPER, SHARES, STANDARD]) {
            let _ = unmount(&place, UnmountFlags::DETACH);
        }
        let _ = fs::remove_file(STAGED);
    }
    outcome
}

fn build(wanted: &Configure) -> Outcome {
    set_time_and_entropy(&wanted.renew)?;
    prepare(&Prepare { layers: wanted.layers.clone() })?;
    mount_root(wanted.layers.len(), wanted.upper.as_deref())?;
    limit_groups(wanted.pids_max)?;
    let root = Root::open(Path::new(ROOT)).map_err(about("the root"))?;
    move_standard(&root)?;
    write_identity(&wanted.renew)?;
    let mut wishes: Vec<&MountWish> = wanted.mounts.iter().collect();
    if wishes.len() > MOUNTS_MAX {
        return Err(Failure::invalid(format!("more than {MOUNTS_MAX} mounts")));
    }
    // The outermost first, so that none hides another.
    wishes.sort_by_key(|wish| Path::new(&wish.path).components().count());
    for wish in wishes {
        mount_wish(&root, wish).map_err(|failure| Failure::new(&failure.code, format!("{}: {}", wish.path, failure.message)))?;
    }
    bind_identity(&root)?;
    network::apply(wanted.renew.network.as_ref())
}

/// Who and when the machine is, anew.
pub fn renew(wanted: &Renew) -> Outcome {
    set_time_and_entropy(wanted)?;
    write_identity(wanted)?;
    network::apply(wanted.network.as_ref())
}

/// The mount namespace of commands: a copy of the caller's, with the sandbox's root over everything. The caller stays where it is.
///
/// A process in it that climbs above its root comes out at that root: nothing of init's can be named from there.
pub fn open_sandbox() -> io::Result<OwnedFd> {
    let namespace = || open("/proc/self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let own = namespace()?;
    system::unshare_mounts()?;
    let made = namespace().and_then(|made| mount_move(ROOT, "/").map(|()| made));
    system::enter_mounts(std::os::fd::AsFd::as_fd(&own))?;
    Ok(made?)
}

/// The folder of a group of commands, "main" or "exec".
pub fn open_group(name: &str) -> io::Result<OwnedFd> {
    Ok(open(Path::new(GROUPS).join(name), OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?)
}

/// How many of a group the kernel has killed for want of memory.
pub fn n_oom_kills(group: &str) -> u64 {
    let text = fs::read_to_string(Path::new(GROUPS).join(group).join("memory.events")).unwrap_or_default();
    metrics::field(&text, "oom_kill").unwrap_or(0)
}

fn set_time_and_entropy(wanted: &Renew) -> Outcome {
    if wanted.time_ns > 0 {
        system::set_clock(wanted.time_ns).map_err(about("the clock"))?;
    }
    let entropy = parse_hex(&wanted.entropy)?;
    if !entropy.is_empty() {
        let random = OpenOptions::new().write(true).open("/dev/random").map_err(about("/dev/random"))?;
        system::feed_entropy(&random, &entropy).map_err(about("the generator of random numbers"))?;
    }
    Ok(())
}

fn mount_layers(layers: &[Layer]) -> Outcome {
    if layers.is_empty() || layers.len() > LAYERS_MAX {
        return Err(Failure::invalid(format!("there are 1 to {LAYERS_MAX} layers")));
    }
    let list = format!("{layers:?}");
    match fs::read_to_string(MOUNTED) {
        Ok(mounted) if mounted == list => return Ok(()),
        Ok(_) => return Err(Failure::new("busy", "other layers are mounted already")),
        Err(_) => {}
    }
    make_own_folder(LAYERS).map_err(about(LAYERS))?;
    let outcome = layers.iter().enumerate().try_for_each(|(index, layer)| mount_layer(&layer_path(index), layer));
    match outcome {
        Ok(()) => fs::write(MOUNTED, list).map_err(about(MOUNTED)),
        Err(failure) => {
            for place in metrics::mounted_below(&[LAYERS]) {
                let _ = unmount(&place, UnmountFlags::DETACH);
            }
            Err(failure)
        }
    }
}

fn layer_path(index: usize) -> String {
    format!("{LAYERS}/{index}")
}

fn mount_layer(place: &str, (index, tar): &Layer) -> Outcome {
    let device = find_disk(index)?;
    let option = match tar {
        Some(tar) => Some(c_text(&format!("device={}", find_disk(tar)?))?),
        None => None,
    };
    make_own_folder(place).map_err(about(place))?;
    mount(&device, place, "erofs", MountFlags::RDONLY | MountFlags::NODEV | MountFlags::NOATIME, option.as_deref()).map_err(about(index))
}

/// The device of the disk with that serial, which may just be coming.
fn find_disk(serial: &str) -> Result<String, Failure> {
    let until = Instant::now() + Duration::from_secs(DISK_S);
    let listed = listed_disk(&command_line(), serial);
    loop {
        if let Some(name) = listed.as_ref().filter(|name| Path::new("/sys/block").join(name).exists()) {
            return Ok(format!("/dev/{name}"));
        }
        if let Some(name) = disk_names().into_iter().find(|name| serial_of(name).as_deref() == Some(serial)) {
            return Ok(format!("/dev/{name}"));
        }
        if Instant::now() > until {
            return Err(Failure::new("not_found", format!("no disk has the serial {serial:?}")));
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// The disk that the command line lists under a name: the first is vda.
fn listed_disk(cmdline: &str, name: &str) -> Option<String> {
    let names = cmdline.split_ascii_whitespace().find_map(|word| word.strip_prefix("isopod.disks="))?;
    let place = names.split(',').position(|each| each == name)?;
    let letter = char::from(b'a' + u8::try_from(place).ok().filter(|place| *place < 26)?);
    Some(format!("vd{letter}"))
}

fn disk_names() -> Vec<String> {
    let Ok(folder) = fs::read_dir("/sys/block") else { return Vec::new() };
    folder.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect()
}

fn serial_of(disk: &str) -> Option<String> {
    fs::read_to_string(format!("/sys/block/{disk}/serial")).ok().map(|text| text.trim_end().to_owned())
}

fn mount_root(n_layers: usize, upper: Option<&str>) -> Outcome {
    for folder in [UPPER, ROOT, SHARES, IDENTITY] {
        make_own_folder(folder).map_err(about(folder))?;
    }
    match upper {
        None => mount("tmpfs", UPPER, "tmpfs", MountFlags::NODEV, Some(c"mode=700")).map_err(about("the memory for what is written"))?,
        Some(serial) => {
            let flags = MountFlags::NODEV | MountFlags::NOATIME;
            mount(find_disk(serial)?, UPPER, "ext4", flags, Some(c"errors=remount-ro")).map_err(about("the disk for what is written"))?;
        }
    }
    let (data, work) = (format!("{UPPER}/data"), format!("{UPPER}/work"));
    make_own_folder(&work).map_err(about(&work))?;
    if fs::symlink_metadata(&data).is_err() {
        // The root of the overlay looks like the folder that takes what is written.
        let facts = fs::metadata(layer_path(0)).map_err(about("the first layer"))?;
        make_own_folder(&data).map_err(about(&data))?;
        chown(&data, Some(facts.uid()), Some(facts.gid())).map_err(about(&data))?;
        fs::set_permissions(&data, fs::Permissions::from_mode(facts.mode() & 0o7777)).map_err(about(&data))?;
    }
    let lowers: Vec<String> = (0..n_layers).map(layer_path).collect();
    // What is written must be a whole layer by itself, or it could not be committed: no references to the layers below.
    let options = format!("lowerdir={},upperdir={data},workdir={work},redirect_dir=off,metacopy=off,index=off", lowers.join(":"));
    mount("overlay", ROOT, "overlay", MountFlags::empty(), Some(c_text(&options)?.as_c_str())).map_err(about("the root"))
}

fn make_groups() -> Outcome {
    if fs::symlink_metadata(Path::new(GROUPS).join("cgroup.procs")).is_err() {
        let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        mount("cgroup2", GROUPS, "cgroup2", flags, None::<&std::ffi::CStr>).map_err(about("control groups"))?;
    }
    fs::write(Path::new(GROUPS).join("cgroup.subtree_control"), "+cpu +memory +pids").map_err(about("control groups"))?;
    for name in ["main", "exec"] {
        fs::create_dir_all(Path::new(GROUPS).join(name)).map_err(about("control groups"))?;
    }
    Ok(())
}

fn limit_groups(pids_max: Option<u64>) -> Outcome {
    let limit = pids_max.map_or("max".to_owned(), |limit| limit.to_string());
    ["main", "exec"]
        .iter()
        .try_for_each(|name| fs::write(Path::new(GROUPS).join(name).join("pids.max"), &limit).map_err(about("the limit of processes")))
}

/// From where they were made to the sandbox's root, each with what is mounted in it.
fn move_standard(root: &Root) -> Outcome {
    for path in ["/proc", "/sys", "/dev"] {
        let folder = root.make_folder(Path::new(path)).map_err(about(path))?;
        mount_move(format!("{STANDARD}{path}"), path_of(&folder)).map_err(about(path))?;
    }
    Ok(())
}

fn mount_standard(root: &Root) -> Outcome {
    let safe = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    let shm = format!("mode=1777,size={SHM_BYTES}");
    let rows: [(&str, &str, MountFlags, &str); 7] = [
        ("/proc", "proc", safe, ""),
        ("/sys", "sysfs", safe | MountFlags::RDONLY, ""),
        ("/sys/fs/cgroup", "cgroup2", safe | MountFlags::RDONLY, ""),
        ("/dev", "tmpfs", MountFlags::NOSUID, "mode=755,size=65536k"),
        ("/dev/pts", "devpts", MountFlags::NOSUID | MountFlags::NOEXEC, "newinstance,ptmxmode=0666,mode=0620,gid=5"),
        ("/dev/shm", "tmpfs", safe, &shm),
        ("/dev/mqueue", "mqueue", safe, ""),
    ];
    for (path, kind, flags, options) in rows {
        let folder = root.make_folder(Path::new(path)).map_err(about(path))?;
        mount_on(&folder, kind, kind, flags, options).map_err(about(path))?;
        if path == "/dev" {
            fill_devices(root).map_err(about(path))?;
        }
    }
    Ok(())
}

fn fill_devices(root: &Root) -> io::Result<()> {
    let folder = root.file(Path::new("/dev"), OFlags::RDONLY | OFlags::DIRECTORY)?;
    for (name, major, minor) in NODES {
        let mode = Mode::from_raw_mode(0o666);
        mknodat(&folder, name, FileType::CharacterDevice, mode, makedev(major, minor))?;
        // The mode of a new node is less the mask of process 1.
        rustix::fs::chmodat(&folder, name, mode, rustix::fs::AtFlags::empty())?;
    }
    LINKS.iter().try_for_each(|(name, target)| symlink(target, path_of(&folder).join(name)))
}

fn mount_on(target: &OwnedFd, source: &str, kind: &str, flags: MountFlags, options: &str) -> io::Result<()> {
    let options = CString::new(options)?;
    Ok(mount(source, path_of(target), kind, flags, Some(options.as_c_str()))?)
}

fn mount_wish(root: &Root, wish: &MountWish) -> Outcome {
    if !wish.path.starts_with('/') {
        return Err(Failure::invalid("the path is not absolute"));
    }
    let path = Path::new(&wish.path);
    let access = if wish.read_only { MountFlags::RDONLY } else { MountFlags::empty() };
    let kept = MountFlags::NOSUID | MountFlags::NODEV;
    match (wish.kind, &wish.file) {
        (MountKind::Virtiofs, Some(name)) => mount_file(root, path, wish, name),
        (MountKind::Virtiofs, None) => {
            let folder = root.make_folder(path).map_err(about("the place"))?;
            mount_on(&folder, &wish.tag, "virtiofs", access, "").map_err(about("the share"))
        }
        (MountKind::Tmpfs, _) => {
            let options = wish.n_bytes.map_or("mode=1777".to_owned(), |n_bytes| format!("mode=1777,size={n_bytes}"));
            let folder = root.make_folder(path).map_err(about("the place"))?;
            mount_on(&folder, "tmpfs", "tmpfs", access | kept, &options).map_err(about("the memory"))
        }
        (MountKind::Disk, _) => {
            let device = find_disk(&wish.tag)?;
            let folder = root.make_folder(path).map_err(about("the place"))?;
            mount_on(&folder, &device, "ext4", access | MountFlags::NODEV, "").map_err(about("the disk"))
        }
    }
}

/// One file of a share: the share itself lies outside the root.
fn mount_file(root: &Root, path: &Path, wish: &MountWish, name: &str) -> Outcome {
    if wish.tag.contains('/') || name.contains('/') || [".", "..", ""].contains(&name) || wish.tag.starts_with('.') {
        return Err(Failure::invalid("a share or a file with such a name"));
    }
    let share = PathBuf::from(SHARES).join(&wish.tag);
    let place = share.to_string_lossy().into_owned();
    if make_folder_once(&share).map_err(about(&place))? {
        mount(wish.tag.as_str(), &share, "virtiofs", MountFlags::empty(), None::<&std::ffi::CStr>).map_err(about("the share"))?;
    }
    let source = Root::open(&share).and_then(|share| share.file(Path::new(name), OFlags::PATH | OFlags::NOFOLLOW)).map_err(about(name))?;
    let target = root.make_file(path).map_err(about("the place"))?;
    mount_bind(path_of(&source), path_of(&target)).map_err(about("the file"))?;
    if wish.read_only {
        let mounted = root.file(path, OFlags::PATH).map_err(about("the file"))?;
        mount_remount(path_of(&mounted), MountFlags::BIND | MountFlags::RDONLY, "").map_err(about("the file"))?;
    }
    Ok(())
}

/// Whether the folder was made now.
fn make_folder_once(path: &Path) -> io::Result<bool> {
    match fs::create_dir(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(error) => Err(error),
    }
}

fn write_identity(wanted: &Renew) -> Outcome {
    if !wanted.hostname.is_empty() {
        rustix::system::sethostname(wanted.hostname.as_bytes()).map_err(about("the host's name"))?;
    }
    make_own_folder(IDENTITY).map_err(about(IDENTITY))?;
    for (name, text) in
        [("hostname", format!("{}\n", wanted.hostname)), ("hosts", wanted.hosts.clone()), ("resolv.conf", wanted.resolv.clone())]
    {
        // Into the same file: the sandbox has it mounted.
        let path = Path::new(IDENTITY).join(name);
        let file = OpenOptions::new().write(true).create(true).truncate(true).open(&path);
        file.and_then(|mut file| file.write_all(text.as_bytes())).map_err(about(name))?;
    }
    Ok(())
}

/// Over the image's own, whatever that is, so that they are no part of what was written.
fn bind_identity(root: &Root) -> Outcome {
    for name in ["hostname", "hosts", "resolv.conf"] {
        let place = Path::new("/etc").join(name);
        let target = match root.make_file(&place) {
            // A link to what is not there.
            Err(Errno::EXIST) => continue,
            other => other.map_err(about(name))?,
        };
        mount_bind(Path::new(IDENTITY).join(name), path_of(&target)).map_err(about(name))?;
    }
    Ok(())
}

fn c_text(text: &str) -> Result<CString, Failure> {
    CString::new(text).map_err(|_| Failure::invalid("a NUL in a name"))
}

fn about<E: std::fmt::Display>(what: &str) -> impl Fn(E) -> Failure + '_ {
    move |error| Failure::failed(what, error)
}

#[cfg(test)]
mod tests {
    use super::{Configure, build, layer_path, listed_disk};
    use crate::agent::requests::parse;

    #[test]
    fn disks_are_found_by_their_place_in_a_list() {
        let words = "quiet isopod.disks=l0i,l0t,upper panic=-1";
        assert_eq!(listed_disk(words, "l0i").as_deref(), Some("vda"));
        assert_eq!(listed_disk(words, "upper").as_deref(), Some("vdc"));
        assert_eq!(listed_disk(words, "l1i"), None);
        assert_eq!(listed_disk("quiet", "l0i"), None);
    }

    #[test]
    fn nonsense_is_refused_before_anything_is_mounted() {
        for text in [r#"{"hostname":"","layers":[]}"#, r#"{"entropy":"x","layers":[["a",null]]}"#] {
            let wanted: Configure = parse(text.as_bytes()).expect("it is well formed");
            assert_eq!(build(&wanted).map_err(|failure| failure.code), Err("invalid".to_owned()), "{text}");
        }
        assert_eq!(layer_path(3), "/layers/3");
    }
}
