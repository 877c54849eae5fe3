//! Files of the sandbox as a tar, out and in. Runs in a child whose root is the sandbox's: no name in it means anything outside.
//!
//! Out: one file or folder, names relative to its parent; POSIX ustar, with pax records for what does not fit. Sockets are left out; a file
//! that shrinks meanwhile is filled up with zeros, one that grows is cut. In: below one folder; a name with `..` is refused, and so is one
//! that leads through a link out of that folder.
//!
//! Source: POSIX.1-2017, pax.

use std::fs::{self, File, Metadata};
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::FromRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};
use serde_json::{Value, json};
use tar::{Archive, Builder, EntryType, Header};

use super::requests::{Failure, response};
use super::system;

const BUFFER_BYTES: usize = 64 << 10;
const LINKS_MAX: usize = 40;
/// What eleven octal digits hold.
const USTAR_BYTES_MAX: u64 = (1 << 33) - 1;
const USTAR_ID_MAX: u32 = (1 << 21) - 1;

/// Say what is at a path, or, with `follow`, where its last link leads. That nothing is there, but its folder, is an answer too.
pub fn look(path: &str, follow: bool) -> Result<Value, Failure> {
    let mut path = PathBuf::from(path);
    if !path.is_absolute() {
        return Err(Failure::invalid("the path is not absolute"));
    }
    for _ in 0..LINKS_MAX {
        let facts = match fs::symlink_metadata(&path) {
            Ok(facts) => Some(facts),
            Err(error) if error.kind() == io::ErrorKind::NotFound && has_folder(&path) => None,
            Err(error) => return Err(missing(&path, &error)),
        };
        match (&facts, path.parent()) {
            (Some(found), Some(folder)) if follow && found.is_symlink() => {
                let target = fs::read_link(&path).map_err(|error| missing(&path, &error))?;
                path = folder.join(target);
            }
            _ => {
                let (mode, n_bytes) = facts.as_ref().map_or((0, 0), |facts| (facts.mode() & 0o7777, facts.len()));
                return Ok(json!({"kind": kind(facts.as_ref()), "path": path.to_string_lossy(), "mode": mode, "n_bytes": n_bytes}));
            }
        }
    }
    Err(Failure::failed(&path.to_string_lossy(), io::Error::from_raw_os_error(libc::ELOOP)))
}

/// Whether what is missing could be made: its folder is there, and it is not said to be a folder.
fn has_folder(path: &Path) -> bool {
    !path.as_os_str().as_bytes().ends_with(b"/") && path.parent().is_some_and(Path::is_dir)
}

fn kind(facts: Option<&Metadata>) -> &'static str {
    match facts.map(Metadata::file_type) {
        None => "nothing",
        Some(kind) if kind.is_file() => "file",
        Some(kind) if kind.is_dir() => "folder",
        Some(kind) if kind.is_symlink() => "link",
        Some(_) => "other",
    }
}

/// Write the archive of a file or folder to stdout, after the answer.
pub fn archive(path: &str) -> Result<Value, Failure> {
    let path = Path::new(path);
    if !path.is_absolute() {
        return Err(Failure::invalid("the path is not absolute"));
    }
    let facts = fs::symlink_metadata(path).map_err(|error| missing(path, &error))?;
    let answer = json!({"mode": facts.mode() & 0o7777, "n_bytes": facts.len(), "is_folder": facts.is_dir()});
    let mut line = response(&Ok(answer.clone()));
    line.push(b'\n');
    rustix::io::write(system::borrow_stderr(), &line).map_err(|error| Failure::failed("the answer", error))?;
    let mut out = Builder::new(BufWriter::with_capacity(BUFFER_BYTES, standard(1)));
    let name = path.file_name().map_or(PathBuf::from("."), PathBuf::from);
    append(&mut out, path, &name, &facts)
        .and_then(|()| out.into_inner()?.flush())
        .map_err(|error| Failure::failed(&path.to_string_lossy(), error))?;
    Ok(answer)
}

/// Read an archive from stdin into a folder.
pub fn extract(path: &str) -> Result<Value, Failure> {
    let folder = Path::new(path);
    if !folder.is_absolute() {
        return Err(Failure::invalid("the path is not absolute"));
    }
    let facts = fs::metadata(folder).map_err(|error| missing(folder, &error))?;
    if !facts.is_dir() {
        return Err(Failure::invalid(format!("{path} is no folder")));
    }
    let mut archive = Archive::new(standard(0));
    archive.set_preserve_permissions(true);
    archive.set_preserve_ownerships(true);
    archive.set_preserve_mtime(true);
    archive.set_overwrite(true);
    let failed = |error: io::Error| Failure::failed("the archive", error);
    for entry in archive.entries().map_err(failed)? {
        let mut entry = entry.map_err(failed)?;
        let name = entry.path().map_err(failed)?.into_owned();
        if name.components().any(|part| part == Component::ParentDir) {
            return Err(Failure::invalid(format!("{} leads out of the folder", name.display())));
        }
        let placed = match entry.header().entry_type() {
            kind @ (EntryType::Fifo | EntryType::Char | EntryType::Block) => make_node(folder, &name, kind, entry.header()),
            _ => entry
                .unpack_in(folder)
                .and_then(|placed| placed.then_some(()).ok_or_else(|| io::Error::other("it leads out of the folder"))),
        };
        placed.map_err(|error| Failure::failed(&name.to_string_lossy(), causes(&error)))?;
    }
    Ok(json!({}))
}

fn append(out: &mut Builder<impl Write>, path: &Path, name: &Path, facts: &Metadata) -> io::Result<()> {
    let kind = facts.file_type();
    if kind.is_socket() {
        return Ok(());
    }
    let mut header = Header::new_ustar();
    let mut records: Vec<(&str, Vec<u8>)> = Vec::new();
    header.set_mode(facts.mode() & 0o7777);
    for (id, key, is_user) in [(facts.uid(), "uid", true), (facts.gid(), "gid", false)] {
        let fits = id <= USTAR_ID_MAX;
        let shown = u64::from(if fits { id } else { 0 });
        if is_user {
            header.set_uid(shown);
        } else {
            header.set_gid(shown);
        }
        if !fits {
            records.push((key, id.to_string().into_bytes()));
        }
    }
    header.set_mtime(u64::try_from(facts.mtime()).unwrap_or(0));
    if facts.mtime_nsec() != 0 {
        records.push(("mtime", format!("{}.{:09}", facts.mtime(), facts.mtime_nsec()).into_bytes()));
    }
    let n_bytes = if kind.is_file() { facts.len() } else { 0 };
    header.set_size(n_bytes.min(USTAR_BYTES_MAX));
    if n_bytes > USTAR_BYTES_MAX {
        records.push(("size", n_bytes.to_string().into_bytes()));
    }
    header.set_entry_type(if kind.is_dir() {
        EntryType::Directory
    } else if kind.is_symlink() {
        EntryType::Symlink
    } else if kind.is_fifo() {
        EntryType::Fifo
    } else if kind.is_char_device() {
        EntryType::Char
    } else if kind.is_block_device() {
        EntryType::Block
    } else {
        EntryType::Regular
    });
    if kind.is_char_device() || kind.is_block_device() {
        header.set_device_major(rustix::fs::major(facts.rdev()))?;
        header.set_device_minor(rustix::fs::minor(facts.rdev()))?;
    }
    if kind.is_symlink() {
        let target = fs::read_link(path)?;
        if header.set_link_name_literal(target.as_os_str().as_bytes()).is_err() {
            records.push(("linkpath", target.as_os_str().as_bytes().to_vec()));
        }
    }
    if header.set_path(name).is_err() {
        // The record is what counts; the field only must not be empty.
        header.set_path("long-name")?;
        records.push(("path", name.as_os_str().as_bytes().to_vec()));
    }
    header.set_cksum();
    if !records.is_empty() {
        out.append_pax_extensions(records.iter().map(|(key, value)| (*key, value.as_slice())))?;
    }
    if kind.is_file() {
        let file = File::options().read(true).custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK | libc::O_NOCTTY).open(path)?;
        return out.append(&header, file.take(n_bytes).chain(io::repeat(0)).take(n_bytes));
    }
    out.append(&header, io::empty())?;
    if kind.is_dir() { append_children(out, path, name) } else { Ok(()) }
}

fn append_children(out: &mut Builder<impl Write>, path: &Path, name: &Path) -> io::Result<()> {
    let mut children = fs::read_dir(path)?.map(|entry| Ok(entry?.file_name())).collect::<io::Result<Vec<_>>>()?;
    children.sort();
    for child in children {
        let path = path.join(&child);
        match fs::symlink_metadata(&path) {
            Ok(facts) => append(out, &path, &name.join(&child), &facts)?,
            // It went meanwhile.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Make a pipe or a device, which the library would make a file.
fn make_node(folder: &Path, name: &Path, kind: EntryType, header: &Header) -> io::Result<()> {
    let place = folder.join(name.strip_prefix("/").unwrap_or(name));
    let kind = match kind {
        EntryType::Fifo => FileType::Fifo,
        EntryType::Char => FileType::CharacterDevice,
        _ => FileType::BlockDevice,
    };
    // A pipe's numbers mean nothing, and some leave the fields empty.
    let is_pipe = kind == FileType::Fifo;
    let device = if is_pipe { 0 } else { makedev(header.device_major()?.unwrap_or(0), header.device_minor()?.unwrap_or(0)) };
    if let Some(parent) = place.parent() {
        fs::create_dir_all(parent)?;
    }
    let _ = fs::remove_file(&place);
    mknodat(CWD, &place, kind, Mode::from_raw_mode(header.mode()? & 0o7777), device)?;
    let owner = (u32::try_from(header.uid()?).unwrap_or(0), u32::try_from(header.gid()?).unwrap_or(0));
    std::os::unix::fs::lchown(&place, Some(owner.0), Some(owner.1))
}

fn missing(path: &Path, error: &io::Error) -> Failure {
    let is_missing = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory);
    Failure::new(if is_missing { "not_found" } else { "failed" }, format!("{}: {error}", path.display()))
}

/// The library tells the kernel's reason one level below.
fn causes(error: &io::Error) -> String {
    let inner = error.get_ref().and_then(std::error::Error::source);
    inner.map_or_else(|| error.to_string(), |inner| format!("{error}: {inner}"))
}

/// The child's stdin or stdout, unbuffered.
fn standard(number: i32) -> File {
    // SAFETY: the descriptor is open and nobody else's: the child uses neither in any other way.
    unsafe { File::from_raw_fd(number) }
}

#[cfg(test)]
mod tests {
    use super::look;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn what_is_at_a_path_and_where_its_links_lead() {
        let folder = std::env::temp_dir().join(format!("isopod-look-{}", std::process::id()));
        fs::create_dir_all(folder.join("in")).expect("a temporary folder");
        fs::write(folder.join("in/file"), "four").expect("a file");
        symlink("in/file", folder.join("link")).expect("a link");
        symlink("nowhere", folder.join("dead")).expect("a link");
        symlink("loop", folder.join("loop")).expect("a link");
        let at = |name: &str, follow: bool| {
            look(&format!("{}/{name}", folder.display()), follow).map(|facts| facts["kind"].as_str().expect("a word").to_owned())
        };
        for (name, follow, kind) in [
            ("in", true, "folder"),
            ("in/", true, "folder"),
            ("in/file", true, "file"),
            ("link", true, "file"),
            ("link", false, "link"),
            ("dead", true, "nothing"),
            ("in/new", true, "nothing"),
        ] {
            assert_eq!(at(name, follow).as_deref(), Ok(kind), "{name}");
        }
        for (name, code) in [("no/new", "not_found"), ("new/", "not_found"), ("in/file/x", "not_found"), ("loop", "failed")] {
            assert_eq!(at(name, true).expect_err(name).code, code, "{name}");
        }
        assert_eq!(look("in", true).expect_err("it is not absolute").code, "invalid");
        let found = look(&format!("{}/link", folder.display()), true).expect("it is there");
        assert_eq!((found["path"].as_str(), found["n_bytes"].as_u64()), (Some(folder.join("in/file").to_str().expect("text")), Some(4)));
        fs::remove_dir_all(folder).expect("it is ours");
    }
}
