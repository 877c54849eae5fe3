//! The files of a layer, in memory: what unpacking its archive would make, down to the order in which entries replace each other.
//!
//! The rules are those of `archive::unpack`, where the kernel does half of the work; here it is done by hand: links on the way to an
//! entry are followed inside the layer's root, the last part of a name never is. Memory is bounded; what is larger is kept as a folder.

use std::collections::BTreeMap;

use super::chunks::Content;
use super::xattrs::{self, Holder, Xattrs};
use crate::archive::reader::{Entry, Kind};
use crate::archive::root::split;
use crate::archive::rules::{self, Hiding, refused};
use crate::error::{Error, Result};

/// A file's place in the tree.
pub type Id = usize;
/// The layer's root.
pub const ROOT: Id = 0;

const NAME_BYTES_MAX: usize = 255;
/// symlink(2) takes a path of less than PATH_MAX.
const TARGET_BYTES_MAX: usize = 4095;
/// What the kernel follows on the way to one file.
const N_LINKS_MAX: usize = 40;
const PERMISSIONS: u32 = 0o7777;
const FOLDER_MODE: u32 = 0o755;
const SYMLINK_MODE: u32 = 0o777;
/// Of all nodes with their names. About a million and a half files.
const MEMORY_BYTES_MAX: usize = 512 << 20;
/// What a name costs in its folder's map.
const NAME_BYTES_MORE: usize = 48;

/// What a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum What {
    /// A file.
    File(Content),
    /// A symbolic link.
    Symlink(Box<[u8]>),
    /// A folder.
    Folder(Folder),
    /// A character device.
    CharacterDevice(u32, u32),
    /// A block device.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
    /// Hides a name of lower layers.
    Whiteout,
    /// Replaced by a later entry.
    Gone,
}

/// A folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Folder {
    /// What it holds, by name.
    pub names: BTreeMap<Box<[u8]>, Id>,
    /// Where it lies; the root lies in itself.
    pub parent: Id,
    /// Whether it hides all that lower layers have in it.
    pub is_opaque: bool,
}

/// A file, folder, link, device or pipe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Node {
    /// What it is.
    pub what: What,
    /// Permissions with set-id and sticky bits.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds and nanoseconds since 1970.
    pub mtime: (i64, u32),
    /// How many names it has.
    pub n_names: u32,
    /// Extended attributes.
    pub xattrs: Xattrs,
}

impl Node {
    fn new(what: What, mode: u32) -> Self {
        Self { what, mode, uid: 0, gid: 0, mtime: (0, 0), n_names: 1, xattrs: Xattrs::new() }
    }

    fn folder(parent: Id, mode: u32) -> Self {
        Self::new(What::Folder(Folder { names: BTreeMap::new(), parent, is_opaque: false }), mode)
    }
}

/// Why a path leads to no folder.
#[derive(Debug, PartialEq, Eq)]
enum Lost {
    Missing,
    NotFolder,
    TooManyLinks,
    NameTooLong,
}

/// A layer's files.
pub struct Tree {
    nodes: Vec<Node>,
    /// The last folder an entry lay in: entries come folder by folder.
    last: Option<(Vec<u8>, Id)>,
    n_bytes: usize,
}

impl Default for Tree {
    fn default() -> Self {
        Self { nodes: vec![Node::folder(ROOT, FOLDER_MODE)], last: None, n_bytes: 0 }
    }
}

impl Tree {
    /// Returns a node.
    #[must_use]
    pub fn node(&self, id: Id) -> &Node {
        &self.nodes[id]
    }

    /// Returns how many nodes there ever were; ids are below it.
    #[must_use]
    pub fn n_nodes(&self) -> usize {
        self.nodes.len()
    }

    /// Takes an entry over, whose data begins at `position` of the archive.
    pub fn apply(&mut self, entry: &Entry, position: u64) -> Result<()> {
        let parts = split(&entry.name).map_err(refused)?;
        let Some((&name, folders)) = parts.split_last() else {
            return if entry.kind == Kind::Folder { self.dress(ROOT, entry) } else { Err(refused("the root must be a folder")) };
        };
        rules::check_folders(folders)?;
        let parent = self.find_or_make(folders)?;
        match rules::hiding(entry, name)? {
            Hiding::Folder => self.folder_mut(parent).is_opaque = true,
            Hiding::Name(hidden) => self.hide(parent, hidden)?,
            Hiding::Nothing => self.create(entry, parent, name, position)?,
        }
        Ok(())
    }

    fn create(&mut self, entry: &Entry, parent: Id, name: &[u8], position: u64) -> Result<()> {
        let what = match &entry.kind {
            Kind::File => What::File(Content::whole(position, entry.n_data_bytes)?),
            Kind::SparseFile(map) => What::File(Content::sparse(position, map)?),
            Kind::HardLink => return self.link(entry, parent, name),
            Kind::Symlink => What::Symlink(target_of(entry)?),
            Kind::Folder => {
                let id = self.make_folder(parent, name)?;
                return self.dress(id, entry);
            }
            Kind::CharacterDevice => What::CharacterDevice(entry.device.0, entry.device.1),
            Kind::BlockDevice => What::BlockDevice(entry.device.0, entry.device.1),
            Kind::Fifo => What::Fifo,
        };
        let id = self.put(parent, name, Node::new(what, 0))?;
        self.dress(id, entry)
    }

    fn dress(&mut self, id: Id, entry: &Entry) -> Result<()> {
        let node = &mut self.nodes[id];
        let (holder, mode) = match node.what {
            What::Symlink(_) => (Holder::Symlink, SYMLINK_MODE),
            What::File(_) | What::Folder(_) => (Holder::FileOrFolder, entry.mode),
            _ => (Holder::Special, entry.mode),
        };
        (node.mode, node.uid, node.gid, node.mtime) = (mode & PERMISSIONS, entry.uid, entry.gid, entry.mtime);
        xattrs::merge(&mut node.xattrs, &entry.xattrs, holder)?;
        let n_bytes = entry.xattrs.iter().map(|(name, value)| name.len() + value.len() + NAME_BYTES_MORE).sum();
        self.count(n_bytes)
    }

    /// Gives an earlier file another name. The entry's own facts are not looked at.
    fn link(&mut self, entry: &Entry, parent: Id, name: &[u8]) -> Result<()> {
        let parts = split(&entry.link).map_err(|why| refused(&format!("the link's target is refused: {why}")))?;
        let missing = || refused("the link's target is no earlier entry");
        let (&target, folders) = parts.split_last().ok_or_else(missing)?;
        let target_parent = self.find(folders)?.ok_or_else(missing)?;
        let id = self.child(target_parent, target).ok_or_else(missing)?;
        match self.nodes[id].what {
            What::Whiteout => return Err(missing()),
            What::Folder(_) => return Err(refused("the link's target is a folder")),
            _ => {}
        }
        if self.child(parent, name) == Some(id) {
            return Ok(());
        }
        self.clear(parent, name);
        // Making room for the name may have removed the folder that the target was in.
        if self.child(target_parent, target) != Some(id) {
            return Err(missing());
        }
        self.nodes[id].n_names += 1;
        self.name(parent, name, id)
    }

    /// Hides a lower layer's entry of this name. What this layer itself has under the name stays.
    fn hide(&mut self, parent: Id, name: &[u8]) -> Result<()> {
        match self.child(parent, name) {
            None => self.put(parent, name, Node::new(What::Whiteout, 0)).map(|_| ()),
            Some(id) => {
                if let What::Folder(folder) = &mut self.nodes[id].what {
                    folder.is_opaque = true;
                }
                Ok(())
            }
        }
    }

    /// Makes or keeps a folder. Where the archive hid the name before, the folder hides what lower layers have in it.
    fn make_folder(&mut self, parent: Id, name: &[u8]) -> Result<Id> {
        let hides = match self.child(parent, name).map(|id| (id, &self.nodes[id].what)) {
            Some((id, What::Folder(_))) => return Ok(id),
            Some((_, What::Whiteout)) => true,
            _ => false,
        };
        let id = self.put(parent, name, Node::folder(parent, FOLDER_MODE))?;
        self.folder_mut(id).is_opaque = hides;
        Ok(id)
    }

    /// Puts a new node in place of what has the name.
    fn put(&mut self, parent: Id, name: &[u8], node: Node) -> Result<Id> {
        self.clear(parent, name);
        let n_bytes = match &node.what {
            What::File(content) => content.starts.len() * size_of::<u32>(),
            What::Symlink(target) => target.len(),
            _ => 0,
        };
        self.count(size_of::<Node>() + n_bytes)?;
        let id = self.nodes.len();
        self.nodes.push(node);
        self.name(parent, name, id)?;
        Ok(id)
    }

    fn name(&mut self, parent: Id, name: &[u8], id: Id) -> Result<()> {
        if name.len() > NAME_BYTES_MAX {
            return Err(unresolved(&Lost::NameTooLong));
        }
        self.count(name.len() + NAME_BYTES_MORE)?;
        self.folder_mut(parent).names.insert(name.into(), id);
        Ok(())
    }

    /// Removes whatever has this name, with all that is in it.
    fn clear(&mut self, parent: Id, name: &[u8]) {
        let Some(id) = self.folder_mut(parent).names.remove(name) else { return };
        // The folder that was looked up last may be the one that goes, or be reached through the link that goes.
        self.last = None;
        let mut removed = vec![id];
        while let Some(id) = removed.pop() {
            let node = &mut self.nodes[id];
            node.n_names -= 1;
            if node.n_names == 0 {
                node.xattrs = Xattrs::new();
                if let What::Folder(folder) = std::mem::replace(&mut node.what, What::Gone) {
                    removed.extend(folder.names.into_values());
                }
            }
        }
    }

    fn count(&mut self, n_bytes: usize) -> Result<()> {
        self.n_bytes += n_bytes;
        if self.n_bytes > MEMORY_BYTES_MAX {
            return Err(Error::not_indexable("its list of files takes more than 512 MiB"));
        }
        Ok(())
    }

    fn child(&self, parent: Id, name: &[u8]) -> Option<Id> {
        match &self.nodes[parent].what {
            What::Folder(folder) => folder.names.get(name).copied(),
            _ => None,
        }
    }

    /// Whoever holds the id of a folder holds it from a look-up; folders that were removed are looked up no more.
    fn folder_mut(&mut self, id: Id) -> &mut Folder {
        match &mut self.nodes[id].what {
            What::Folder(folder) => folder,
            other => unreachable!("{other:?} was looked up as a folder"),
        }
    }

    fn find(&self, parts: &[&[u8]]) -> Result<Option<Id>> {
        match self.resolve(parts) {
            Ok(id) => Ok(Some(id)),
            Err(Lost::Missing) => Ok(None),
            Err(lost) => Err(unresolved(&lost)),
        }
    }

    fn find_or_make(&mut self, parts: &[&[u8]]) -> Result<Id> {
        let path = parts.join(&b'/');
        if let Some((_, id)) = self.last.as_ref().filter(|(last, _)| *last == path) {
            return Ok(*id);
        }
        let id = match self.resolve(parts) {
            Ok(id) => id,
            Err(Lost::Missing | Lost::NotFolder) => self.make(parts)?,
            Err(lost) => return Err(unresolved(&lost)),
        };
        self.last = Some((path, id));
        Ok(id)
    }

    fn make(&mut self, parts: &[&[u8]]) -> Result<Id> {
        let (n_existing, mut parent) = self.deepest(parts)?;
        for name in &parts[n_existing..] {
            if self.child(parent, name).is_some_and(|id| self.nodes[id].what != What::Whiteout) {
                return Err(unresolved(&Lost::NotFolder));
            }
            parent = self.make_folder(parent, name)?;
        }
        Ok(parent)
    }

    /// Returns the deepest folder on the way that exists, and how many parts lead to it. Found by halving: one part at a time would
    /// look at a path of thousands of parts thousands of times.
    fn deepest(&self, parts: &[&[u8]]) -> Result<(usize, Id)> {
        let mut found = (0, ROOT);
        let mut n_missing = parts.len();
        while found.0 + 1 < n_missing {
            let n_parts = usize::midpoint(found.0, n_missing);
            match self.resolve(&parts[..n_parts]) {
                Ok(id) => found = (n_parts, id),
                Err(Lost::Missing | Lost::NotFolder) => n_missing = n_parts,
                Err(lost) => return Err(unresolved(&lost)),
            }
        }
        Ok(found)
    }

    /// Walks to a folder as the kernel would with this tree as its root: links and ".." are followed and end at the root.
    fn resolve(&self, parts: &[&[u8]]) -> std::result::Result<Id, Lost> {
        let mut here = ROOT;
        let mut todo: Vec<&[u8]> = parts.iter().rev().copied().collect();
        let mut n_links = 0;
        while let Some(part) = todo.pop() {
            let What::Folder(folder) = &self.nodes[here].what else { return Err(Lost::NotFolder) };
            match part {
                b"" | b"." => continue,
                b".." => {
                    here = folder.parent;
                    continue;
                }
                _ if part.len() > NAME_BYTES_MAX => return Err(Lost::NameTooLong),
                _ => {}
            }
            let child = folder.names.get(part).copied().ok_or(Lost::Missing)?;
            match &self.nodes[child].what {
                What::Folder(_) => here = child,
                What::Symlink(target) => {
                    n_links += 1;
                    if n_links > N_LINKS_MAX {
                        return Err(Lost::TooManyLinks);
                    }
                    if target.starts_with(b"/") {
                        here = ROOT;
                    }
                    todo.extend(target.split(|&byte| byte == b'/').rev());
                }
                _ => return Err(Lost::NotFolder),
            }
        }
        Ok(here)
    }
}

fn target_of(entry: &Entry) -> Result<Box<[u8]>> {
    if entry.link.is_empty() || entry.link.contains(&0) {
        return Err(refused("the link has no target"));
    }
    if entry.link.len() > TARGET_BYTES_MAX {
        return Err(unresolved(&Lost::NameTooLong));
    }
    Ok(entry.link.as_slice().into())
}

fn unresolved(lost: &Lost) -> Error {
    refused(match lost {
        Lost::Missing | Lost::NotFolder => "a parent is neither a folder nor a link to one inside the root",
        Lost::TooManyLinks => "its folder lies behind too many links",
        Lost::NameTooLong => "the name is too long",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(name: &str, kind: Kind, link: &str) -> Entry {
        Entry {
            name: name.into(),
            kind,
            link: link.into(),
            mode: 0o644,
            uid: 1,
            gid: 2,
            mtime: (3, 4),
            n_data_bytes: 0,
            device: (1, 3),
            xattrs: Vec::new(),
        }
    }

    fn tree(entries: &[(&str, Kind, &str)]) -> Tree {
        let mut tree = Tree::default();
        for (name, kind, link) in entries {
            tree.apply(&entry(name, kind.clone(), link), 512).unwrap();
        }
        tree
    }

    fn at<'a>(tree: &'a Tree, path: &str) -> Option<&'a Node> {
        let parts = split(path.as_bytes()).unwrap();
        let (name, folders) = parts.split_last()?;
        Some(tree.node(tree.child(tree.resolve(folders).ok()?, name)?))
    }

    #[test]
    fn links_lead_inside_the_root() {
        let found = tree(&[
            ("usr/lib", Kind::Folder, ""),
            ("lib", Kind::Symlink, "../../usr/lib"),
            ("usr/back", Kind::Symlink, "/lib/.."),
            ("lib/a", Kind::File, ""),
            ("usr/back/b", Kind::Fifo, ""),
        ]);
        assert!(matches!(at(&found, "usr/lib/a").unwrap().what, What::File(_)));
        assert_eq!(at(&found, "usr/b").unwrap().what, What::Fifo);
        assert_eq!(at(&found, "usr").map(|node| (node.mode, node.uid, node.mtime)), Some((0o755, 0, (0, 0))));
    }

    #[test]
    fn later_entries_replace_earlier_ones() {
        let found = tree(&[
            ("a/b/c", Kind::File, ""),
            ("d", Kind::HardLink, "a/b/c"),
            ("a", Kind::File, ""),
            ("e", Kind::Folder, ""),
            ("e/f", Kind::File, ""),
            ("e", Kind::Folder, ""),
        ]);
        assert!(matches!(at(&found, "a").unwrap().what, What::File(_)));
        assert_eq!(at(&found, "d").unwrap().n_names, 1);
        assert!(at(&found, "e/f").is_some());
    }

    #[test]
    fn whiteouts_act_on_lower_layers_only() {
        let found = tree(&[
            (".wh.a", Kind::File, ""),
            ("a/b", Kind::File, ""),
            ("c", Kind::File, ""),
            (".wh.c", Kind::File, ""),
            ("d/.wh..wh..opq", Kind::File, ""),
            (".wh.e", Kind::File, ""),
        ]);
        let opaque = |path| matches!(&at(&found, path).unwrap().what, What::Folder(folder) if folder.is_opaque);
        assert!(opaque("a") && opaque("d"));
        assert!(matches!(at(&found, "c").unwrap().what, What::File(_)));
        assert_eq!(at(&found, "e").unwrap().what, What::Whiteout);
    }

    #[test]
    fn memory_is_bounded() {
        let mut found = Tree { n_bytes: MEMORY_BYTES_MAX - size_of::<Node>(), ..Tree::default() };
        let refused = found.apply(&entry("f", Kind::File, ""), 512);
        assert!(matches!(refused, Err(Error::NotIndexable { .. })), "{refused:?}");
    }

    #[test]
    fn loops_and_files_on_the_way_are_refused() {
        for (before, name) in [("b", "a/f"), ("a", "a/f"), ("/missing", "a/f")] {
            let mut found = tree(&[("a", Kind::Symlink, before), ("b", Kind::Symlink, "a")]);
            assert!(found.apply(&entry(name, Kind::File, ""), 0).is_err());
        }
        assert!(tree(&[("f", Kind::File, "")]).apply(&entry("f/g", Kind::File, ""), 0).is_err());
        assert!(Tree::default().apply(&entry(&"n".repeat(256), Kind::File, ""), 0).is_err());
    }
}
