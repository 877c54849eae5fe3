//! EROFS indexes: a layer's archive made mountable without unpacking it.
//!
//! The archive stays as it is, uncompressed, in one file. The index beside it is a read-only file system of metadata only: names,
//! owners, times, attributes, and for each file where in the archive its bytes lie. The kernel mounts the two together, from
//! files (Linux 6.12) or, in a guest, from two disks. `tree` puts entries together by the rules that `archive::unpack` has;
//! `chunks` says where bytes lie, `xattrs` writes attributes, `image` lays all of it out, `index` does it in one pass.
//!
//! The form is that of `mkfs.erofs --tar=i`: blocks of 512 bytes, since that is what data in a tar is aligned to, one extra
//! device (the archive), files of layout "chunk based" whose chunks lie on that device. What layers hide is in overlayfs form:
//! devices 0/0 and `trusted.overlay.opaque`.
//!
//! Source: the on-disk format as documented by the kernel (`Documentation/filesystems/erofs.rst`) and the EROFS project
//! (erofs.docs.kernel.org, "EROFS On-Disk Format"); what the kernel demands beyond that, by mounting what comes out.

pub mod chunks;
pub mod image;
pub mod index;
pub mod tree;
pub mod xattrs;

/// Blocks of the file system, and what tars are aligned to.
pub const BLOCK_BYTES: u64 = 512;
const BLOCK_BITS: u32 = 9;
