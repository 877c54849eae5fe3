//! A tar as entries: long names, extended headers and sparse maps already put together.

use super::BLOCK_BYTES;
use super::header::{self, Header};
use super::pax::{self, Extended};
use super::sparse::{Map, MapInData, OldMap};
use super::stream::{Stream, truncated};
use crate::error::{Error, Result};

/// Of one long name or extended header.
const EXTENSION_BYTES_MAX: u64 = 1 << 20;
/// Of all that stand before one entry.
const N_EXTENSIONS_MAX: usize = 16;
/// The kernel's device numbers have twelve and twenty bits; mknod(2) cuts off what is above, which could leave 0/0.
const MAJOR_MAX: u32 = (1 << 12) - 1;
const MINOR_MAX: u32 = (1 << 20) - 1;

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// A file, its data following.
    File,
    /// A file of which the archive holds parts.
    SparseFile(Map),
    /// Another name of an earlier entry.
    HardLink,
    /// A symbolic link.
    Symlink,
    /// A character device.
    CharacterDevice,
    /// A block device.
    BlockDevice,
    /// A folder.
    Folder,
    /// A named pipe.
    Fifo,
}

/// One entry. Its data is read from the reader that returned it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// As the archive has it.
    pub name: Vec<u8>,
    /// What it is.
    pub kind: Kind,
    /// The target of a link.
    pub link: Vec<u8>,
    /// Permissions with set-id and sticky bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds since 1970.
    pub mtime: (i64, u32),
    /// Bytes of data in the archive.
    pub n_data_bytes: u64,
    /// Major and minor number.
    pub device: (u32, u32),
    /// Extended attributes, sorted by name.
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

/// Reads entries from a stream.
pub struct Reader<S> {
    stream: S,
    /// Of the current entry: data bytes not read yet, and padding after them.
    left: u64,
    padding: u64,
    entry_name: Vec<u8>,
}

impl<S: Stream> Reader<S> {
    /// Starts at the first header.
    pub fn new(stream: S) -> Self {
        Self { stream, left: 0, padding: 0, entry_name: Vec::new() }
    }

    /// Returns the next entry, passing over what is left of the current one; None at the end of the archive.
    pub fn next_entry(&mut self) -> Result<Option<Entry>> {
        self.skip_rest().map_err(|error| self.named(error))?;
        self.entry_name.clear();
        self.read_entry().map_err(|error| self.named(error))
    }

    /// Returns the entry's next data; empty when there is no more.
    pub fn data(&mut self) -> Result<&[u8]> {
        if self.left == 0 {
            return Ok(&[]);
        }
        let name = &self.entry_name;
        let bytes = self.stream.fill().map_err(|error| with_name(error, name))?;
        if bytes.is_empty() {
            return Err(with_name(truncated(), name));
        }
        let n_bytes = usize::try_from(self.left).map_or(bytes.len(), |left| left.min(bytes.len()));
        Ok(&bytes[..n_bytes])
    }

    /// Takes data that `data` returned.
    pub fn consume(&mut self, n_bytes: usize) {
        self.stream.consume(n_bytes);
        self.left -= n_bytes as u64;
    }

    /// Returns the stream.
    pub fn stream(&self) -> &S {
        &self.stream
    }

    /// Returns the stream, to read on after the archive's end.
    pub fn stream_mut(&mut self) -> &mut S {
        &mut self.stream
    }

    /// Names the current entry in an error that has none.
    pub fn named(&self, error: Error) -> Error {
        with_name(error, &self.entry_name)
    }

    fn skip_rest(&mut self) -> Result<()> {
        self.stream.skip(self.left)?;
        self.stream.skip(self.padding)?;
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    fn read_entry(&mut self) -> Result<Option<Entry>> {
        let mut extended = Extended::default();
        let mut long_name = None;
        let mut long_link = None;
        for _ in 0..N_EXTENSIONS_MAX {
            let mut block = [0; BLOCK_BYTES];
            self.stream.read_exact(&mut block)?;
            self.entry_name = header::claimed_name(&block);
            let Some(header) = header::parse(&block).map_err(refused)? else {
                return Self::end(&extended).map(|()| None);
            };
            match header.kind {
                b'L' => long_name = Some(self.long_text(&header)?),
                b'K' => long_link = Some(self.long_text(&header)?),
                b'x' => extended.apply(&self.extension(&header)?).map_err(refused)?,
                b'g' => pax::check_global(&self.extension(&header)?).map_err(refused)?,
                _ => {
                    let header = merged(header, &mut extended, long_name, long_link);
                    self.entry_name.clone_from(&header.name);
                    if let Some(why) = extended.refusal {
                        return Err(refused(why));
                    }
                    return self.entry(&block, header, extended).map(Some);
                }
            }
        }
        Err(refused("too many extended headers before one entry"))
    }

    /// A block of zeros ends the archive. A second one should follow, but some writers leave it out.
    fn end(extended: &Extended) -> Result<()> {
        if *extended == Extended::default() { Ok(()) } else { Err(refused("the archive ends after an extended header")) }
    }

    fn extension(&mut self, header: &Header) -> Result<Vec<u8>> {
        if header.size > EXTENSION_BYTES_MAX {
            return Err(refused("an extended header is too large"));
        }
        let n_bytes = usize::try_from(header.size).map_err(|_| refused("an extended header is too large"))?;
        let mut bytes = vec![0; n_bytes];
        self.stream.read_exact(&mut bytes)?;
        self.stream.skip(padding_of(header.size))?;
        Ok(bytes)
    }

    fn long_text(&mut self, header: &Header) -> Result<Vec<u8>> {
        let mut text = self.extension(header)?;
        while text.last() == Some(&0) {
            text.pop();
        }
        if text.contains(&0) { Err(refused("a name contains NUL")) } else { Ok(text) }
    }

    fn entry(&mut self, block: &[u8; BLOCK_BYTES], header: Header, extended: Extended) -> Result<Entry> {
        if header.name.is_empty() {
            return Err(refused("an entry has no name"));
        }
        let kind = self.kind(block, &header, &extended)?;
        let has_data = matches!(kind, Kind::File | Kind::SparseFile(_));
        // Other entries have no data, whatever their size says: so other readers of layers have it.
        self.padding = if has_data { padding_of(header.size) } else { 0 };
        if !has_data {
            self.left = 0;
        }
        Ok(Entry {
            mode: u32::try_from(header.mode & 0o7777).unwrap_or(0),
            uid: id(header.uid)?,
            gid: id(header.gid)?,
            mtime: extended.mtime.unwrap_or((header.mtime, 0)),
            n_data_bytes: self.left,
            device: (device_number(header.device.0, MAJOR_MAX)?, device_number(header.device.1, MINOR_MAX)?),
            xattrs: extended.xattrs.into_iter().collect(),
            name: header.name,
            link: header.link,
            kind,
        })
    }

    /// Tells what an entry is. Leaves the reader at its data, `left` bytes of it.
    fn kind(&mut self, block: &[u8; BLOCK_BYTES], header: &Header, extended: &Extended) -> Result<Kind> {
        self.left = header.size;
        if matches!(header.kind, 0 | b'0') && extended.sparse.is_present() {
            return self.pax_sparse(extended).map(Kind::SparseFile);
        }
        Ok(match header.kind {
            // Before POSIX, folders were files whose name ends in a slash.
            0 if header.name.ends_with(b"/") => Kind::Folder,
            0 | b'0' | b'7' => Kind::File,
            b'1' => Kind::HardLink,
            b'2' => Kind::Symlink,
            b'3' => Kind::CharacterDevice,
            b'4' => Kind::BlockDevice,
            b'5' => Kind::Folder,
            b'6' => Kind::Fifo,
            b'S' => Kind::SparseFile(self.old_sparse(block)?),
            other => return Err(Error::archive(b"", format!("entries of type {:?} are not supported", char::from(other)))),
        })
    }

    fn pax_sparse(&mut self, extended: &Extended) -> Result<Map> {
        if !extended.sparse.has_map_in_data() {
            return extended.sparse.map(self.left).map_err(refused);
        }
        let mut map = MapInData::default();
        loop {
            let mut block = [0; BLOCK_BYTES];
            self.left = self.left.checked_sub(BLOCK_BYTES as u64).ok_or_else(|| refused("a sparse map is incomplete"))?;
            self.stream.read_exact(&mut block)?;
            if let Some(numbers) = map.feed(&block).map_err(refused)? {
                return extended.sparse.map_of(&numbers, self.left).map_err(refused);
            }
        }
    }

    /// The map's blocks do not count as data here.
    fn old_sparse(&mut self, block: &[u8; BLOCK_BYTES]) -> Result<Map> {
        let mut map = OldMap::from_header(block).map_err(refused)?;
        while map.continues {
            let mut block = [0; BLOCK_BYTES];
            self.stream.read_exact(&mut block)?;
            map.feed(&block).map_err(refused)?;
        }
        map.finish(self.left).map_err(refused)
    }
}

/// Puts together what stands in the header and before it.
fn merged(mut header: Header, extended: &mut Extended, long_name: Option<Vec<u8>>, long_link: Option<Vec<u8>>) -> Header {
    let sparse_name = extended.sparse.name.take();
    if let Some(name) = sparse_name.or(extended.path.take()).or(long_name) {
        header.name = name;
    }
    if let Some(link) = extended.link.take().or(long_link) {
        header.link = link;
    }
    header.size = extended.size.unwrap_or(header.size);
    header.uid = extended.uid.unwrap_or(header.uid);
    header.gid = extended.gid.unwrap_or(header.gid);
    header
}

fn padding_of(n_bytes: u64) -> u64 {
    let block = BLOCK_BYTES as u64;
    (block - n_bytes % block) % block
}

fn id(number: u64) -> Result<u32> {
    u32::try_from(number).ok().filter(|&id| id != u32::MAX).ok_or_else(|| refused("a user or group id is out of range"))
}

fn device_number(number: u64, max: u32) -> Result<u32> {
    u32::try_from(number).ok().filter(|&number| number <= max).ok_or_else(|| refused("a device number is out of range"))
}

fn refused(why: &str) -> Error {
    Error::archive(b"", why)
}

fn with_name(error: Error, name: &[u8]) -> Error {
    match error {
        Error::Archive { entry, why } if entry.is_empty() => Error::Archive { entry: name.to_vec(), why },
        other => other,
    }
}
