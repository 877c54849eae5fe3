//! What every reader of layers asks of an entry, whatever it makes of it: bounds, and which names and attributes are refused.

use super::reader::{Entry, Kind};
use crate::error::{Error, Result};

/// Begins the name of a file that hides another.
pub const WHITEOUT: &[u8] = b".wh.";
const RESERVED: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
const OVERLAY_XATTR: &[u8] = b"trusted.overlay.";

/// Bounds on what an archive may become.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Of the uncompressed archive, and of all files' sizes, holes included.
    pub unpacked_bytes_max: u64,
    /// Entries.
    pub n_entries_max: u64,
    /// Of one file, holes included.
    pub entry_bytes_max: u64,
    /// Of one name or link target.
    pub path_bytes_max: u64,
    /// Unpacked over packed bytes, once 64 MiB came out.
    pub ratio_max: u64,
}

/// What a layer was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Summary {
    /// Of the bytes as they were given.
    pub blob_digest: String,
    /// Of the uncompressed archive.
    pub diff_id: String,
    /// Bytes given.
    pub n_blob_bytes: u64,
    /// Bytes of the uncompressed archive.
    pub n_unpacked_bytes: u64,
    /// Entries.
    pub n_entries: u64,
}

/// Counts entries and their bytes against the bounds.
pub struct Rules {
    limits: Limits,
    n_entries: u64,
    n_file_bytes: u64,
}

impl Rules {
    /// Starts with nothing counted.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, n_entries: 0, n_file_bytes: 0 }
    }

    /// Returns how many entries were let in, or refused.
    #[must_use]
    pub fn n_entries(&self) -> u64 {
        self.n_entries
    }

    /// Counts an entry; refuses it if it is over a bound or meant to act on lower layers behind other readers' backs.
    pub fn admit(&mut self, entry: &Entry) -> Result<()> {
        self.n_entries += 1;
        let size = if let Kind::SparseFile(map) = &entry.kind { map.size } else { entry.n_data_bytes };
        self.n_file_bytes = self.n_file_bytes.saturating_add(size);
        let limits = &self.limits;
        let n_path_bytes = entry.name.len().max(entry.link.len()) as u64;
        let over = [
            (self.n_entries > limits.n_entries_max, "entries", limits.n_entries_max),
            (size > limits.entry_bytes_max, "bytes in one file", limits.entry_bytes_max),
            (self.n_file_bytes > limits.unpacked_bytes_max, "bytes in all files", limits.unpacked_bytes_max),
            (n_path_bytes > limits.path_bytes_max, "bytes in a name", limits.path_bytes_max),
        ];
        if let Some((_, what, max)) = over.iter().find(|(is_over, ..)| *is_over) {
            return Err(refused(&format!("more than {max} {what}")));
        }
        if let Some((name, _)) = entry.xattrs.iter().find(|(name, _)| name.starts_with(OVERLAY_XATTR)) {
            return Err(refused(&format!("it sets the attribute {}", String::from_utf8_lossy(name))));
        }
        if matches!(entry.kind, Kind::CharacterDevice | Kind::BlockDevice) && entry.device == (0, 0) {
            return Err(refused("it is a device 0/0, which overlayfs takes for a whiteout"));
        }
        Ok(())
    }
}

/// What a name says about lower layers.
#[derive(Debug, PartialEq, Eq)]
pub enum Hiding<'a> {
    /// Nothing: an entry of this layer.
    Nothing,
    /// All that lower layers have in the folder.
    Folder,
    /// This one name.
    Name(&'a [u8]),
}

/// Tells what the last part of an entry's name hides.
pub fn hiding<'a>(entry: &Entry, name: &'a [u8]) -> Result<Hiding<'a>> {
    let Some(hidden) = name.strip_prefix(WHITEOUT) else { return Ok(Hiding::Nothing) };
    if entry.kind != Kind::File {
        return Err(refused("a whiteout must be a file"));
    }
    if name == OPAQUE {
        return Ok(Hiding::Folder);
    }
    if name.starts_with(RESERVED) || matches!(hidden, b"" | b"." | b"..") {
        return Err(refused("the name is reserved for whiteouts"));
    }
    Ok(Hiding::Name(hidden))
}

/// Checks the folders that an entry lies in.
pub fn check_folders(folders: &[&[u8]]) -> Result<()> {
    if folders.iter().any(|part| part.starts_with(WHITEOUT)) {
        return Err(refused("it lies in a folder whose name is reserved for whiteouts"));
    }
    Ok(())
}

/// An entry is refused; whoever knows its name adds it.
#[must_use]
pub fn refused(why: &str) -> Error {
    Error::archive(b"", why)
}
