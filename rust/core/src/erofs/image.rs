//! The index laid out: superblock, device table, inodes with what stands behind them, and blocks of what did not fit there.
//!
//! Inodes come folder by folder, all of the long form (64 bytes). Behind one stand its attributes, then either the chunks of a file or
//! the last piece of a folder's or link's data, which must not cross a block; whole blocks of data come after all inodes. Names in a
//! folder are sorted by their bytes, "." and ".." among them, and packed into blocks, each with a table in front.

use super::chunks::too_large;
use super::tree::{Id, Node, ROOT, Tree, What};
use super::{BLOCK_BITS, BLOCK_BYTES, xattrs};
use crate::error::Result;

const MAGIC: u32 = 0xe0f5_e1e2;
const SUPERBLOCK_AT: usize = 1024;
const SUPERBLOCK_BYTES: usize = 128;
const DEVICE_BYTES: usize = 128;
const DEVICES_AT: usize = SUPERBLOCK_AT + SUPERBLOCK_BYTES;
const INODES_AT: u64 = (DEVICES_AT + DEVICE_BYTES) as u64;
/// The superblock has a checksum; inodes have times of their own.
const COMPATIBLE: u32 = 1 | 2;
/// There are files of chunks, and a table of devices.
const INCOMPATIBLE: u32 = 4 | 8;
const SLOT_BYTES: u64 = 32;
const INODE_BYTES: u64 = 64;
const DIRENT_BYTES: usize = 12;
const CHUNK_BYTES: u64 = 8;
const LONG_FORM: u16 = 1;
const PLAIN: u16 = 0 << 1;
const INLINE: u16 = 2 << 1;
const CHUNKED: u16 = 4 << 1;
/// Chunks say which device they lie on.
const CHUNKS_WITH_DEVICE: u32 = 1 << 5;
const ARCHIVE_DEVICE: u16 = 1;
const NOWHERE: u32 = u32::MAX;

/// What the index is about.
#[derive(Debug, Clone, Copy)]
pub struct Archive<'a> {
    /// Its length in blocks.
    pub n_blocks: u32,
    /// The digest of its bytes, 64 hexadecimal digits.
    pub digest: &'a str,
}

/// Where a node's inode and data come to lie.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    /// Of the inode; 0 for nodes without a place.
    position: u64,
    /// Bytes of a folder's or link's data.
    n_data_bytes: usize,
    /// The first of its whole blocks.
    block: u32,
    /// Folders inside, of a folder.
    n_folders: u32,
}

/// Returns the index of a tree.
pub fn write(tree: &Tree, archive: Archive<'_>) -> Result<Vec<u8>> {
    let mut layout = Layout { tree, places: vec![Place::default(); tree.n_nodes()], order: vec![ROOT], end: INODES_AT };
    layout.place_inodes();
    let n_blocks = layout.place_blocks()?;
    let mut out = vec![0; usize::try_from(u64::from(n_blocks) * BLOCK_BYTES).map_err(|_| too_large())?];
    for (number, &id) in layout.order.iter().enumerate() {
        layout.write_inode(&mut out, id, number);
    }
    layout.write_superblock(&mut out, n_blocks, archive);
    Ok(out)
}

struct Layout<'a> {
    tree: &'a Tree,
    places: Vec<Place>,
    /// Nodes in the order of their inodes.
    order: Vec<Id>,
    end: u64,
}

impl Layout<'_> {
    fn place_inodes(&mut self) {
        let mut next = 0;
        while let Some(&id) = self.order.get(next) {
            next += 1;
            let node = self.tree.node(id);
            let n_data_bytes = match &node.what {
                What::Folder(folder) => {
                    for &child in folder.names.values() {
                        self.places[id].n_folders += u32::from(matches!(self.tree.node(child).what, What::Folder(_)));
                        // A file of several names has its place from the first one.
                        if self.places[child].position == 0 {
                            self.places[child].position = 1;
                            self.order.push(child);
                        }
                    }
                    n_bytes_of(&names_of(self.tree, id))
                }
                What::Symlink(target) => target.len(),
                _ => 0,
            };
            let position = self.take_room(node, n_data_bytes);
            let place = &mut self.places[id];
            (place.position, place.n_data_bytes) = (position, n_data_bytes);
        }
    }

    /// Returns where an inode goes with what stands behind it.
    fn take_room(&mut self, node: &Node, n_data_bytes: usize) -> u64 {
        let n_head_bytes = INODE_BYTES + xattrs_of(node).len() as u64;
        let n_tail_bytes = if is_inline(n_head_bytes, n_data_bytes) { tail_of(n_data_bytes) as u64 } else { 0 };
        let start = self.end.next_multiple_of(SLOT_BYTES);
        let left = BLOCK_BYTES - start % BLOCK_BYTES;
        let n_together = if n_tail_bytes > 0 { n_head_bytes + n_tail_bytes } else { INODE_BYTES };
        let position = if n_together > left { start + left } else { start };
        let head_end = position + n_head_bytes;
        self.end = match &node.what {
            What::File(content) => head_end.next_multiple_of(CHUNK_BYTES) + CHUNK_BYTES * content.starts.len() as u64,
            _ => head_end + n_tail_bytes,
        };
        position
    }

    /// Gives whole blocks to what needs them; returns how many blocks there are in all.
    fn place_blocks(&mut self) -> Result<u32> {
        let mut block = self.end.div_ceil(BLOCK_BYTES);
        for &id in &self.order {
            let n_head_bytes = INODE_BYTES + xattrs_of(self.tree.node(id)).len() as u64;
            let place = &mut self.places[id];
            let is_inline = is_inline(n_head_bytes, place.n_data_bytes);
            let n_bytes = place.n_data_bytes - if is_inline { tail_of(place.n_data_bytes) } else { 0 };
            place.block = if n_bytes == 0 { NOWHERE } else { u32::try_from(block).map_err(|_| too_large())? };
            block += (n_bytes as u64).div_ceil(BLOCK_BYTES);
        }
        u32::try_from(block).map_err(|_| too_large())
    }

    fn write_inode(&self, out: &mut [u8], id: Id, number: usize) {
        let (node, place) = (self.tree.node(id), self.places[id]);
        let attributes = xattrs_of(node);
        let n_head_bytes = INODE_BYTES + attributes.len() as u64;
        let at = bytes_of(place.position);
        let data = self.data_of(id);
        let (layout, size, detail) = match &node.what {
            What::File(content) if content.size > 0 => (CHUNKED, content.size, CHUNKS_WITH_DEVICE | (content.chunk_bits - BLOCK_BITS)),
            What::Folder(_) | What::Symlink(_) if is_inline(n_head_bytes, data.len()) => (INLINE, data.len() as u64, place.block),
            What::Folder(_) | What::Symlink(_) => (PLAIN, data.len() as u64, place.block),
            What::CharacterDevice(major, minor) | What::BlockDevice(major, minor) => (PLAIN, 0, device_number(*major, *minor)),
            What::File(_) => (PLAIN, 0, NOWHERE),
            What::Fifo | What::Whiteout | What::Gone => (PLAIN, 0, 0),
        };
        let n_links = if matches!(node.what, What::Folder(_)) { 2 + place.n_folders } else { node.n_names };
        put(out, at, &(LONG_FORM | layout).to_le_bytes());
        put(out, at + 2, &xattrs::count(&attributes).to_le_bytes());
        put(out, at + 4, &mode_of(node).to_le_bytes());
        put(out, at + 8, &size.to_le_bytes());
        put(out, at + 16, &detail.to_le_bytes());
        put(out, at + 20, &u32::try_from(number + 1).unwrap_or(NOWHERE).to_le_bytes());
        put(out, at + 24, &node.uid.to_le_bytes());
        put(out, at + 28, &node.gid.to_le_bytes());
        put(out, at + 32, &node.mtime.0.to_le_bytes());
        put(out, at + 40, &node.mtime.1.to_le_bytes());
        put(out, at + 44, &n_links.to_le_bytes());
        put(out, at + bytes_of(INODE_BYTES), &attributes);
        let behind = at + bytes_of(n_head_bytes);
        if let What::File(content) = &node.what {
            return write_chunks(out, behind, &content.starts);
        }
        let (blocks, tail) = data.split_at(data.len() - if layout == INLINE { tail_of(data.len()) } else { 0 });
        put(out, behind, tail);
        if !blocks.is_empty() {
            put(out, bytes_of(u64::from(place.block) * BLOCK_BYTES), blocks);
        }
    }

    /// Returns a link's target, or the names in a folder in their blocks.
    fn data_of(&self, id: Id) -> Vec<u8> {
        if let What::Symlink(target) = &self.tree.node(id).what {
            return target.to_vec();
        }
        let names = names_of(self.tree, id);
        let mut data = Vec::with_capacity(self.places[id].n_data_bytes);
        for block in blocks_of(&names) {
            data.resize(data.len().next_multiple_of(bytes_of(BLOCK_BYTES)), 0);
            let mut name_at = block.len() * DIRENT_BYTES;
            for (name, id) in block {
                data.extend_from_slice(&(self.places[*id].position / SLOT_BYTES).to_le_bytes());
                data.extend_from_slice(&u16::try_from(name_at).unwrap_or(u16::MAX).to_le_bytes());
                data.extend_from_slice(&[file_type(self.tree.node(*id)), 0]);
                name_at += name.len();
            }
            for (name, _) in block {
                data.extend_from_slice(name);
            }
        }
        data
    }

    fn write_superblock(&self, out: &mut [u8], n_blocks: u32, archive: Archive<'_>) {
        let at = SUPERBLOCK_AT;
        let root = u16::try_from(self.places[ROOT].position / SLOT_BYTES).unwrap_or(u16::MAX);
        put(out, at, &MAGIC.to_le_bytes());
        put(out, at + 8, &COMPATIBLE.to_le_bytes());
        put(out, at + 12, &[u8::try_from(BLOCK_BITS).unwrap_or(u8::MAX)]);
        put(out, at + 14, &root.to_le_bytes());
        put(out, at + 16, &(self.order.len() as u64).to_le_bytes());
        put(out, at + 36, &n_blocks.to_le_bytes());
        put(out, at + 48, &identifier(archive.digest));
        put(out, at + 80, &INCOMPATIBLE.to_le_bytes());
        put(out, at + 86, &ARCHIVE_DEVICE.to_le_bytes());
        put(out, at + 88, &u16::try_from(DEVICES_AT / DEVICE_BYTES).unwrap_or(u16::MAX).to_le_bytes());
        put(out, DEVICES_AT, archive.digest.as_bytes());
        put(out, DEVICES_AT + 64, &archive.n_blocks.to_le_bytes());
        // Where the archive would begin if it stood right behind the index.
        put(out, DEVICES_AT + 68, &n_blocks.to_le_bytes());
        let sum = !crc32c::crc32c(&out[at..at + bytes_of(BLOCK_BYTES)]);
        put(out, at + 4, &sum.to_le_bytes());
    }
}

/// Returns the sorted names in a folder with what they lead to; none for anything else.
fn names_of(tree: &Tree, id: Id) -> Vec<(&[u8], Id)> {
    let What::Folder(folder) = &tree.node(id).what else { return Vec::new() };
    let mut names: Vec<(&[u8], Id)> = folder.names.iter().map(|(name, &id)| (&**name, id)).collect();
    names.extend([(&b"."[..], id), (b"..", folder.parent)]);
    names.sort_unstable();
    names
}

/// Returns how long the data of a folder is: whole blocks, and what the last one holds.
fn n_bytes_of(names: &[(&[u8], Id)]) -> usize {
    let in_block = |block: &[(&[u8], Id)]| block.iter().map(|(name, _)| DIRENT_BYTES + name.len()).sum::<usize>();
    blocks_of(names).fold(0, |n_bytes, block| n_bytes.next_multiple_of(bytes_of(BLOCK_BYTES)) + in_block(block))
}

/// Whether the last piece of data may stand behind its inode.
fn is_inline(n_head_bytes: u64, n_data_bytes: usize) -> bool {
    let n_tail_bytes = tail_of(n_data_bytes) as u64;
    n_tail_bytes > 0 && n_head_bytes + n_tail_bytes <= BLOCK_BYTES
}

fn tail_of(n_data_bytes: usize) -> usize {
    n_data_bytes % bytes_of(BLOCK_BYTES)
}

fn xattrs_of(node: &Node) -> Vec<u8> {
    xattrs::encoded(&node.xattrs, matches!(&node.what, What::Folder(folder) if folder.is_opaque))
}

/// The type in the bits of stat(2).
fn mode_of(node: &Node) -> u16 {
    let kind = match node.what {
        What::Fifo => 0o010_000,
        What::CharacterDevice(..) | What::Whiteout | What::Gone => 0o020_000,
        What::Folder(_) => 0o040_000,
        What::BlockDevice(..) => 0o060_000,
        What::File(_) => 0o100_000,
        What::Symlink(_) => 0o120_000,
    };
    u16::try_from(kind | node.mode).unwrap_or(0)
}

/// The type as names in folders carry it.
fn file_type(node: &Node) -> u8 {
    match node.what {
        What::File(_) => 1,
        What::Folder(_) => 2,
        What::CharacterDevice(..) | What::Whiteout | What::Gone => 3,
        What::BlockDevice(..) => 4,
        What::Fifo => 5,
        What::Symlink(_) => 7,
    }
}

/// Packed as the kernel does it: eight bits of the minor number, twelve of the major one, the rest of the minor one.
fn device_number(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

fn write_chunks(out: &mut [u8], behind: usize, starts: &[u32]) {
    let first = behind.next_multiple_of(bytes_of(CHUNK_BYTES));
    for (number, start) in starts.iter().enumerate() {
        let at = first + number * bytes_of(CHUNK_BYTES);
        put(out, at + 2, &ARCHIVE_DEVICE.to_le_bytes());
        put(out, at + 4, &start.to_le_bytes());
    }
}

/// The file system's number follows from the archive: the same layer gives the same index.
fn identifier(digest: &str) -> Vec<u8> {
    let byte = |number: usize| digest.get(2 * number..2 * number + 2).and_then(|pair| u8::from_str_radix(pair, 16).ok()).unwrap_or(0);
    (0..16).map(byte).collect()
}

/// Cuts sorted names into what fits a block each.
fn blocks_of<'a, T>(names: &'a [(&'a [u8], T)]) -> impl Iterator<Item = &'a [(&'a [u8], T)]> {
    let mut rest = names;
    std::iter::from_fn(move || {
        let mut n_bytes = 0;
        let fits = |(name, _): &&(&[u8], T)| {
            n_bytes += DIRENT_BYTES + name.len();
            n_bytes <= bytes_of(BLOCK_BYTES)
        };
        let (block, after) = rest.split_at(rest.iter().take_while(fits).count());
        rest = after;
        (!block.is_empty()).then_some(block)
    })
}

fn put(out: &mut [u8], at: usize, bytes: &[u8]) {
    out[at..at + bytes.len()].copy_from_slice(bytes);
}

fn bytes_of(number: u64) -> usize {
    // A position in a vector, or a small constant.
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::reader::{Entry, Kind};

    const ARCHIVE: Archive<'static> = Archive { n_blocks: 8, digest: "00112233445566778899aabbccddeeff0123456789abcdef0123456789abcdef" };

    fn tree(names: &[&str]) -> Tree {
        let mut tree = Tree::default();
        for name in names {
            let entry = Entry {
                name: name.split('>').next().unwrap_or_default().into(),
                kind: if name.contains('>') { Kind::Symlink } else { Kind::File },
                link: name.split('>').nth(1).unwrap_or_default().into(),
                mode: 0o644,
                uid: 1,
                gid: 2,
                mtime: (3, 4),
                n_data_bytes: 5,
                device: (0, 0),
                xattrs: Vec::new(),
            };
            tree.apply(&entry, 512).unwrap();
        }
        tree
    }

    fn number<const N: usize>(out: &[u8], at: usize) -> u64 {
        let mut bytes = [0; 8];
        bytes[..N].copy_from_slice(&out[at..at + N]);
        u64::from_le_bytes(bytes)
    }

    #[test]
    fn the_superblock_is_summed_and_names_the_archive() {
        let out = write(&tree(&["a"]), ARCHIVE).unwrap();
        assert_eq!((number::<4>(&out, 1024), number::<2>(&out, 1038), number::<8>(&out, 1040)), (u64::from(MAGIC), 40, 2));
        let mut block = out[1024..1536].to_vec();
        block[4..8].fill(0);
        assert_eq!(number::<4>(&out, 1028), u64::from(!crc32c::crc32c(&block)));
        assert_eq!(out[1072..1088], [0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff]);
        assert_eq!((&out[1152..1216], number::<4>(&out, 1216)), (ARCHIVE.digest.as_bytes(), 8));
        assert_eq!(out.len() as u64, number::<4>(&out, 1060) * BLOCK_BYTES);
    }

    #[test]
    fn names_are_sorted_and_never_cross_a_block() {
        let names: Vec<String> = (0..300).map(|number| format!("{}{number}", "n".repeat(number % 250))).collect();
        let mut all: Vec<&str> = names.iter().map(String::as_str).collect();
        all.extend(["-before", "!before"]);
        let found = tree(&all);
        let out = write(&found, ARCHIVE).unwrap();
        let names = names_of(&found, ROOT);
        assert_eq!(names.iter().map(|(name, _)| *name).take(4).collect::<Vec<_>>(), [&b"!before"[..], b"-before", b".", b".."]);
        let root = bytes_of(number::<2>(&out, 1038) * SLOT_BYTES);
        assert_eq!(number::<8>(&out, root + 8), n_bytes_of(&names) as u64);
        for block in blocks_of(&names) {
            let n_bytes: usize = block.iter().map(|(name, _)| DIRENT_BYTES + name.len()).sum();
            assert!(n_bytes <= 512 && !block.is_empty());
        }
        assert_eq!(blocks_of(&names).map(<[_]>::len).sum::<usize>(), 304);
    }

    #[test]
    fn what_stands_behind_an_inode_stays_in_its_block() {
        let names: Vec<String> = (0..2000).map(|number| format!("{number}>{}", "t".repeat(1 + number * 7 % 1500))).collect();
        let found = tree(&names.iter().map(String::as_str).collect::<Vec<_>>());
        let mut layout = Layout { tree: &found, places: vec![Place::default(); found.n_nodes()], order: vec![ROOT], end: INODES_AT };
        layout.place_inodes();
        let mut end = INODES_AT;
        for &id in &layout.order {
            let place = layout.places[id];
            let tail = if is_inline(INODE_BYTES, place.n_data_bytes) { tail_of(place.n_data_bytes) as u64 } else { 0 };
            assert!(place.position >= end && place.position % SLOT_BYTES == 0);
            end = place.position + INODE_BYTES + tail;
            assert_eq!(place.position / BLOCK_BYTES, (end - 1) / BLOCK_BYTES);
        }
    }

    #[test]
    fn device_numbers_are_packed() {
        assert_eq!((device_number(1, 3), device_number(0xfff, 0xf_ffff)), (0x103, 0xffff_ffff));
    }
}
