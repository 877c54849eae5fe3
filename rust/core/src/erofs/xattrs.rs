//! Extended attributes as the file system stores them, and which of an archive's it takes: those that the kernel would have set.

use std::collections::BTreeMap;

use crate::archive::rules::refused;
use crate::error::{Error, Result};

/// Attributes by name.
pub type Xattrs = BTreeMap<Vec<u8>, Vec<u8>>;

/// Prefixes that the format has numbers for; of the two for access lists nothing remains to be written.
const PREFIXES: [(&[u8], u8); 5] =
    [(b"user.", 1), (b"system.posix_acl_access", 2), (b"system.posix_acl_default", 3), (b"trusted.", 4), (b"security.", 6)];
const ACCESS_LISTS: [u8; 2] = [2, 3];
const USER: u8 = 1;
/// Before the first attribute of an inode stand a filter, a count of shared ones, and reserved bytes.
const HEADER_BYTES: usize = 12;
const VALUE_BYTES_MAX: usize = u16::MAX as usize;
/// What all of an inode's take, in units of four bytes, fits 16 bits.
const ALL_BYTES_MAX: usize = 4 * (u16::MAX as usize - 1);

/// What an attribute is put on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Holder {
    /// May have attributes of users.
    FileOrFolder,
    /// Has no permissions, hence no access lists.
    Symlink,
    /// Devices and pipes.
    Special,
}

/// Takes over attributes of an entry; some are left out, as when unpacking.
pub fn merge(target: &mut Xattrs, source: &[(Vec<u8>, Vec<u8>)], holder: Holder) -> Result<()> {
    for (name, value) in source {
        if is_kept(name, value, holder)? {
            target.insert(name.clone(), value.clone());
        }
    }
    if encoded(target, false).len() > ALL_BYTES_MAX {
        return Err(Error::not_indexable("its attributes take more than 256 KiB"));
    }
    Ok(())
}

/// Returns what stands behind an inode; nothing if there are no attributes.
#[must_use]
pub fn encoded(xattrs: &Xattrs, is_opaque: bool) -> Vec<u8> {
    if xattrs.is_empty() && !is_opaque {
        return Vec::new();
    }
    let mut bytes = vec![0; HEADER_BYTES];
    let opaque: Option<(&[u8], &[u8])> = is_opaque.then_some((b"trusted.overlay.opaque", b"y"));
    let all = xattrs.iter().map(|(name, value)| (name.as_slice(), value.as_slice())).chain(opaque);
    for (name, value) in all {
        let Some((rest, number)) = split(name) else { continue };
        bytes.push(u8::try_from(rest.len()).unwrap_or(u8::MAX));
        bytes.push(number);
        bytes.extend_from_slice(&u16::try_from(value.len()).unwrap_or(u16::MAX).to_le_bytes());
        bytes.extend_from_slice(rest);
        bytes.extend_from_slice(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
    }
    bytes
}

/// Returns the number that says how long `encoded` is.
#[must_use]
pub fn count(encoded: &[u8]) -> u16 {
    if encoded.is_empty() { 0 } else { u16::try_from((encoded.len() - HEADER_BYTES) / 4 + 1).unwrap_or(u16::MAX) }
}

fn split(name: &[u8]) -> Option<(&[u8], u8)> {
    PREFIXES.iter().find_map(|&(prefix, number)| {
        let rest = name.strip_prefix(prefix)?;
        // The names of access lists are whole.
        (rest.is_empty() || !ACCESS_LISTS.contains(&number)).then_some((rest, number))
    })
}

fn is_kept(name: &[u8], value: &[u8], holder: Holder) -> Result<bool> {
    let Some((rest, number)) = split(name) else {
        return if name.is_empty() { Err(senseless(name)) } else { Ok(false) };
    };
    let is_list = ACCESS_LISTS.contains(&number);
    if (number == USER && holder != Holder::FileOrFolder) || (is_list && holder == Holder::Symlink) {
        return Ok(false);
    }
    if (rest.is_empty() && !is_list) || (is_list && !is_access_list(value)) || (name == b"security.capability" && !is_capability(value)) {
        return Err(senseless(name));
    }
    if value.len() > VALUE_BYTES_MAX {
        return Err(Error::not_indexable("an attribute is larger than 65535 bytes"));
    }
    Ok(true)
}

fn senseless(name: &[u8]) -> Error {
    refused(&format!("its attribute {:?} cannot be set", String::from_utf8_lossy(name)))
}

/// Version 2 or 3 in its length; version 3 names a user: capabilities(7).
fn is_capability(value: &[u8]) -> bool {
    let user = value.get(20..24);
    matches!((value.get(3), value.len()), (Some(2), 20) | (Some(3), 24)) && user != Some(&[0xff; 4][..])
}

/// Version 2, then eight bytes per line: acl(5), `linux/posix_acl_xattr.h`.
fn is_access_list(value: &[u8]) -> bool {
    value.starts_with(&[2, 0, 0, 0]) && value.len() % 8 == 4
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(name: &str, value: &[u8], holder: Holder) -> Result<bool> {
        let mut found = Xattrs::new();
        merge(&mut found, &[(name.as_bytes().to_vec(), value.to_vec())], holder)?;
        Ok(!found.is_empty())
    }

    #[test]
    fn what_the_kernel_would_set_is_kept() {
        use Holder::{FileOrFolder, Special, Symlink};
        let capability = [&[1, 0, 0, 2][..], &[0; 16]].concat();
        assert_eq!(kept("user.a", b"1", FileOrFolder), Ok(true));
        assert_eq!(kept("user.a", b"1", Symlink), Ok(false));
        assert_eq!(kept("user.a", b"1", Special), Ok(false));
        assert_eq!(kept("trusted.a", b"1", Symlink), Ok(true));
        assert_eq!(kept("com.example.a", b"1", FileOrFolder), Ok(false));
        assert_eq!(kept("system.posix_acl_access_", b"1", FileOrFolder), Ok(false));
        assert_eq!(kept("security.capability", &capability, FileOrFolder), Ok(true));
        assert_eq!(kept("system.posix_acl_access", &[2, 0, 0, 0], FileOrFolder), Ok(true));
        for (name, value) in [("", &b"1"[..]), ("user.", b"1"), ("security.capability", b"y"), ("system.posix_acl_access", b"yes")] {
            assert!(matches!(kept(name, value, FileOrFolder), Err(Error::Archive { .. })), "{name}");
        }
        assert!(matches!(kept("user.a", &vec![0; 65_536], FileOrFolder), Err(Error::NotIndexable { .. })));
    }

    #[test]
    fn attributes_are_padded_and_counted() {
        let xattrs = Xattrs::from([(b"user.ab".to_vec(), b"xyz".to_vec())]);
        let bytes = encoded(&xattrs, true);
        assert_eq!(&bytes[12..24], b"\x02\x01\x03\0abxyz\0\0\0");
        assert_eq!(&bytes[24..44], b"\x0e\x04\x01\0overlay.opaquey\0");
        assert_eq!((bytes.len(), count(&bytes), count(&[])), (44, 9, 0));
    }

    #[test]
    fn all_of_them_are_bounded() {
        let many: Vec<_> = (0..5).map(|number| (format!("user.{number}").into_bytes(), vec![0; 60_000])).collect();
        assert!(matches!(merge(&mut Xattrs::new(), &many, Holder::FileOrFolder), Err(Error::NotIndexable { .. })));
    }
}
