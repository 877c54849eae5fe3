//! Headers of a tar being written: ustar where it can say it, an extended header for the rest.
//!
//! Of GNU's forms only that for sparse files is used, which POSIX lacks (1.0, in extended headers); any reader of the last
//! fifteen years reads what comes out. The ustar prefix is not used either: where to cut a name is a matter of taste.

use super::BLOCK_BYTES;
use super::header::checksum;
use super::pax::append_record;

const NAME_BYTES_MAX: usize = 100;
/// What seven and eleven octal digits hold.
const ID_MAX: u64 = 0o7_777_777;
const LONG_MAX: u64 = 0o77_777_777_777;
const EXTENDED_NAME: &[u8] = b"PaxHeaders/0";

/// What is to be written about an entry.
#[derive(Debug, Clone, Copy, Default)]
pub struct Record<'a> {
    /// Name; folders end in a slash.
    pub name: &'a [u8],
    /// The type byte.
    pub kind: u8,
    /// A link's target.
    pub link: &'a [u8],
    /// Permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of data that will follow.
    pub size: u64,
    /// Seconds and nanoseconds since 1970.
    pub mtime: (i64, u32),
    /// Device numbers.
    pub device: (u32, u32),
    /// Extended attributes, in the order to write.
    pub xattrs: &'a [(Vec<u8>, Vec<u8>)],
    /// The size of a sparse file, holes included, if it is one: `size` bytes of map and data will follow.
    pub real_size: Option<u64>,
}

/// Appends an entry's header, and before it the extended one if it needs one.
pub fn append_header(target: &mut Vec<u8>, record: &Record<'_>) {
    let name = record.name;
    let stand_in = record.real_size.map(|_| stand_in_name(record.name));
    let record = &Record { name: stand_in.as_deref().unwrap_or(record.name), ..*record };
    let mut extended = extended_records(record);
    if let Some(real_size) = record.real_size {
        // Behind the stand-in's name: some readers take the later one.
        append_sparse_records(&mut extended, name, real_size);
    }
    if !extended.is_empty() {
        let size = extended.len() as u64;
        append_block(target, &Record { name: EXTENDED_NAME, kind: b'x', mode: 0o644, size, ..Record::default() });
        target.extend_from_slice(&extended);
        append_padding(target, size);
    }
    append_block(target, record);
}

/// Appends zeros up to the end of a block.
pub fn append_padding(target: &mut Vec<u8>, n_bytes: u64) {
    let block = BLOCK_BYTES as u64;
    let n_missing = (block - n_bytes % block) % block;
    target.resize(target.len() + usize::try_from(n_missing).unwrap_or(0), 0);
}

/// GNU's sparse format 1.0.
fn append_sparse_records(bytes: &mut Vec<u8>, name: &[u8], real_size: u64) {
    append_record(bytes, b"GNU.sparse.major", b"1");
    append_record(bytes, b"GNU.sparse.minor", b"0");
    append_record(bytes, b"GNU.sparse.name", name);
    append_record(bytes, b"GNU.sparse.realsize", real_size.to_string().as_bytes());
}

/// What readers that know no sparse files are to unpack the map and the data as: not as the file.
fn stand_in_name(name: &[u8]) -> Vec<u8> {
    let start = name.iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
    [&name[..start], b"GNUSparseFile.0/", &name[start..]].concat()
}

fn extended_records(record: &Record<'_>) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut add = |is_needed: bool, key: &str, value: &[u8]| {
        if is_needed {
            append_record(&mut bytes, key.as_bytes(), value);
        }
    };
    let (seconds, nanoseconds) = record.mtime;
    let time_fits = nanoseconds == 0 && u64::try_from(seconds).is_ok_and(|seconds| seconds <= LONG_MAX);
    add(record.name.len() > NAME_BYTES_MAX, "path", record.name);
    add(record.link.len() > NAME_BYTES_MAX, "linkpath", record.link);
    add(record.size > LONG_MAX, "size", record.size.to_string().as_bytes());
    add(u64::from(record.uid) > ID_MAX, "uid", record.uid.to_string().as_bytes());
    add(u64::from(record.gid) > ID_MAX, "gid", record.gid.to_string().as_bytes());
    add(!time_fits, "mtime", time_text(record.mtime).as_bytes());
    for (name, value) in record.xattrs {
        append_record(&mut bytes, &[b"SCHILY.xattr.", name.as_slice()].concat(), value);
    }
    bytes
}

/// Decimal, with as many digits as there are: "-1.5" is 1.5 s before 1970.
fn time_text((seconds, nanoseconds): (i64, u32)) -> String {
    let total = i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds);
    let sign = if total < 0 { "-" } else { "" };
    let (whole, fraction) = (total.unsigned_abs() / 1_000_000_000, total.unsigned_abs() % 1_000_000_000);
    if fraction == 0 {
        return format!("{sign}{whole}");
    }
    format!("{sign}{whole}.{fraction:09}").trim_end_matches('0').to_owned()
}

fn append_block(target: &mut Vec<u8>, record: &Record<'_>) {
    let mut block = [0; BLOCK_BYTES];
    put_text(&mut block[0..100], record.name);
    put_octal(&mut block[100..108], u64::from(record.mode));
    put_octal(&mut block[108..116], capped(u64::from(record.uid), ID_MAX));
    put_octal(&mut block[116..124], capped(u64::from(record.gid), ID_MAX));
    put_octal(&mut block[124..136], capped(record.size, LONG_MAX));
    put_octal(&mut block[136..148], capped(u64::try_from(record.mtime.0).unwrap_or(0), LONG_MAX));
    block[156] = record.kind;
    put_text(&mut block[157..257], record.link);
    block[257..265].copy_from_slice(b"ustar\x0000");
    put_octal(&mut block[329..337], u64::from(record.device.0));
    put_octal(&mut block[337..345], u64::from(record.device.1));
    let sum = checksum(&block);
    put_octal(&mut block[148..155], u64::from(sum));
    block[155] = b' ';
    target.extend_from_slice(&block);
}

/// What does not fit stands in the extended header; the field is then zero.
fn capped(value: u64, max: u64) -> u64 {
    if value > max { 0 } else { value }
}

fn put_text(field: &mut [u8], text: &[u8]) {
    let n_bytes = text.len().min(field.len());
    field[..n_bytes].copy_from_slice(&text[..n_bytes]);
}

/// Zero-padded octal digits and a NUL.
fn put_octal(field: &mut [u8], value: u64) {
    let n_digits = field.len() - 1;
    let digits = format!("{value:0n_digits$o}");
    field[..n_digits].copy_from_slice(&digits.as_bytes()[digits.len() - n_digits..]);
}

#[cfg(test)]
mod tests {
    use super::super::reader::{Kind, Reader};
    use super::super::stream::Stream;
    use super::*;
    use crate::error::Result;

    struct Bytes(Vec<u8>, usize);

    impl Stream for Bytes {
        fn fill(&mut self) -> Result<&[u8]> {
            Ok(&self.0[self.1..])
        }

        fn consume(&mut self, n_bytes: usize) {
            self.1 += n_bytes;
        }
    }

    #[test]
    fn what_is_written_reads_back() {
        let name = vec![b'n'; 300];
        let link = vec![b'l'; 101];
        let xattrs = [(b"security.capability".to_vec(), vec![1; 20]), (b"user.k".to_vec(), vec![0, 255, b'\n'])];
        for (mtime, uid, size) in [((0, 0), 0, 0), ((-2, 750_000_000), u32::MAX - 1, 9 << 30), ((1 << 40, 1), 0o7_777_777, 1)] {
            let record = Record {
                name: &name,
                kind: b'0',
                link: &link,
                mode: 0o4755,
                uid,
                gid: 5,
                size,
                mtime,
                xattrs: &xattrs,
                ..Record::default()
            };
            let mut bytes = Vec::new();
            append_header(&mut bytes, &record);
            assert_eq!(bytes.len() % BLOCK_BYTES, 0);
            let entry = Reader::new(Bytes(bytes, 0)).next_entry().unwrap().unwrap();
            assert_eq!((entry.name, entry.link, entry.kind), (name.clone(), link.clone(), Kind::File));
            assert_eq!((entry.mode, entry.uid, entry.gid, entry.n_data_bytes, entry.mtime), (0o4755, uid, 5, size, mtime));
            assert_eq!(entry.xattrs, xattrs);
        }
    }

    #[test]
    fn plain_entries_need_no_extended_header() {
        let mut bytes = Vec::new();
        append_header(&mut bytes, &Record { name: b"a", kind: b'3', device: (1, 3), mtime: (1_700_000_000, 0), ..Record::default() });
        assert_eq!(bytes.len(), BLOCK_BYTES);
        let entry = Reader::new(Bytes(bytes, 0)).next_entry().unwrap().unwrap();
        assert_eq!((entry.kind, entry.device, entry.mtime), (Kind::CharacterDevice, (1, 3), (1_700_000_000, 0)));
    }

    #[test]
    fn times_are_written_in_full() {
        assert_eq!(time_text((12, 500_000_000)), "12.5");
        assert_eq!(time_text((-2, 750_000_000)), "-1.25");
        assert_eq!(time_text((-3, 0)), "-3");
        assert_eq!(time_text((0, 1)), "0.000000001");
    }
}
