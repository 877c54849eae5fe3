//! One tar header block: its checksum, numbers and strings.

use super::BLOCK_BYTES;

/// Why a header is refused.
pub type Refusal = &'static str;

/// Where a field lies in the block.
type Field = std::ops::Range<usize>;

const NAME: Field = 0..100;
const MODE: Field = 100..108;
const UID: Field = 108..116;
const GID: Field = 116..124;
const SIZE: Field = 124..136;
const MTIME: Field = 136..148;
const CHECKSUM: Field = 148..156;
const KIND: usize = 156;
const LINK: Field = 157..257;
const MAGIC: Field = 257..265;
const MAJOR: Field = 329..337;
const MINOR: Field = 337..345;
const PREFIX: Field = 345..500;

/// A header's fields, in the widths they are written with.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Header {
    /// The type byte.
    pub kind: u8,
    /// The name, a ustar prefix included.
    pub name: Vec<u8>,
    /// A link's target.
    pub link: Vec<u8>,
    /// Permission bits, perhaps more.
    pub mode: u64,
    /// Owner.
    pub uid: u64,
    /// Group.
    pub gid: u64,
    /// Bytes of data that follow.
    pub size: u64,
    /// Seconds since 1970.
    pub mtime: i64,
    /// Device numbers.
    pub device: (u64, u64),
}

/// Parses a block; None for a block of zeros, which is the archive's end.
pub fn parse(block: &[u8; BLOCK_BYTES]) -> Result<Option<Header>, Refusal> {
    if block.iter().all(|&byte| byte == 0) {
        return Ok(None);
    }
    if !checksum_matches(block) {
        return Err("the header's checksum is wrong");
    }
    let is_posix = block[MAGIC] == *b"ustar\x0000";
    let is_gnu = block[MAGIC] == *b"ustar  \0";
    let device = if is_posix || is_gnu { (unsigned(&block[MAJOR])?, unsigned(&block[MINOR])?) } else { (0, 0) };
    // GNU's format keeps times where ustar has the prefix.
    let prefix = if is_posix { text(&block[PREFIX]) } else { b"" };
    Ok(Some(Header {
        kind: block[KIND],
        name: joined(prefix, text(&block[NAME])),
        link: text(&block[LINK]).to_vec(),
        mode: unsigned(&block[MODE])?,
        uid: unsigned(&block[UID])?,
        gid: unsigned(&block[GID])?,
        size: unsigned(&block[SIZE])?,
        mtime: number(&block[MTIME])?,
        device,
    }))
}

/// Returns the name a block gives, to be shown with an error; none if it does not look like a header at all.
#[must_use]
pub fn claimed_name(block: &[u8; BLOCK_BYTES]) -> Vec<u8> {
    if block[MAGIC].starts_with(b"ustar") { text(&block[NAME]).to_vec() } else { Vec::new() }
}

/// Reads a number of at most 63 bits that is not negative.
pub fn unsigned(field: &[u8]) -> Result<u64, Refusal> {
    u64::try_from(number(field)?).map_err(|_| "a number is negative")
}

/// Sums a block's bytes as the checksum does: its own field counts as spaces.
#[must_use]
pub fn checksum(block: &[u8; BLOCK_BYTES]) -> u32 {
    block.iter().enumerate().map(|(at, &byte)| if CHECKSUM.contains(&at) { 32 } else { u32::from(byte) }).sum()
}

fn checksum_matches(block: &[u8; BLOCK_BYTES]) -> bool {
    // Some old writers summed signed bytes.
    let signed: i64 =
        block.iter().enumerate().map(|(at, &byte)| if CHECKSUM.contains(&at) { 32 } else { i64::from(i8::from_ne_bytes([byte])) }).sum();
    number(&block[CHECKSUM]).is_ok_and(|written| written == i64::from(checksum(block)) || written == signed)
}

fn number(field: &[u8]) -> Result<i64, Refusal> {
    if field[0] & 0x80 == 0 { octal(field) } else { base256(field) }
}

fn octal(field: &[u8]) -> Result<i64, Refusal> {
    let is_blank = |byte: &u8| *byte == b' ' || *byte == 0;
    let start = field.iter().position(|byte| !is_blank(byte)).unwrap_or(field.len());
    let digits = &field[start..];
    let end = digits.iter().position(is_blank).unwrap_or(digits.len());
    if !digits[end..].iter().all(is_blank) {
        return Err("a number has trailing characters");
    }
    digits[..end].iter().try_fold(0_i64, |value, &digit| match digit {
        b'0'..=b'7' => Ok(value * 8 + i64::from(digit - b'0')),
        _ => Err("a number is not octal"),
    })
}

/// GNU's form for what octal digits cannot hold: big-endian two's complement, the first bit being the mark.
fn base256(field: &[u8]) -> Result<i64, Refusal> {
    let is_negative = field[0] & 0x40 != 0;
    let first = if is_negative { i128::from(field[0]) - 0x100 } else { i128::from(field[0] & 0x7f) };
    let value = field[1..].iter().fold(first, |value, &byte| (value << 8) | i128::from(byte));
    i64::try_from(value).map_err(|_| "a number is too large")
}

fn text(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

fn joined(prefix: &[u8], name: &[u8]) -> Vec<u8> {
    if prefix.is_empty() { name.to_vec() } else { [prefix, name].join(&b'/') }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(change: impl FnOnce(&mut [u8; BLOCK_BYTES])) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        block[..5].copy_from_slice(b"a/b.c");
        block[MODE].copy_from_slice(b"0000644\0");
        block[SIZE].copy_from_slice(b"00000000017\0");
        block[KIND] = b'0';
        block[MAGIC].copy_from_slice(b"ustar\x0000");
        change(&mut block);
        let sum = format!("{:06o}\0 ", checksum(&block));
        block[CHECKSUM].copy_from_slice(sum.as_bytes());
        block
    }

    #[test]
    fn a_ustar_header_is_read() {
        let header = parse(&block(|block| block[PREFIX][..3].copy_from_slice(b"x/y"))).unwrap().unwrap();
        assert_eq!((header.name.as_slice(), header.mode, header.size, header.kind), (&b"x/y/a/b.c"[..], 0o644, 15, b'0'));
    }

    #[test]
    fn gnu_times_are_no_prefix() {
        let gnu = block(|block| {
            block[MAGIC].copy_from_slice(b"ustar  \0");
            block[PREFIX][..11].copy_from_slice(b"14000000000");
        });
        assert_eq!(parse(&gnu).unwrap().unwrap().name, b"a/b.c");
    }

    #[test]
    fn zeros_are_the_end_and_a_flipped_bit_is_refused() {
        assert_eq!(parse(&[0; BLOCK_BYTES]), Ok(None));
        let good = block(|_| ());
        for at in [0, 99, 130, 156, 300, 511] {
            let mut bad = good;
            bad[at] ^= 0x10;
            assert!(parse(&bad).is_err(), "{at}");
        }
    }

    #[test]
    fn numbers() {
        for (field, value) in [
            (&b"0000644\0"[..], 0o644),
            (b"   644 \0", 0o644),
            (b"\0\0\0\0\0\0\0\0", 0),
            (b"        ", 0),
            (b"77777777777 ", 0o77_777_777_777),
            (b"\x80\0\0\0\0\0\0\0\0\0\x01\x02", 0x102),
            (b"\xff\xff\xff\xff\xff\xff\xff\xff", -1),
            (b"\x80\0\0\0\x7f\xff\xff\xff\xff\xff\xff\xff", i64::MAX),
        ] {
            assert_eq!(number(field), Ok(value), "{field:?}");
        }
        for bad in [
            &b"0000684\0"[..],
            b"12 34  \0",
            b"-1     \0",
            b"\x80\0\0\0\x80\0\0\0\0\0\0\0",
            b"\xbf\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff",
        ] {
            assert!(number(bad).is_err(), "{bad:?}");
        }
        assert!(unsigned(b"\xff\xff\xff\xff\xff\xff\xff\xff").is_err());
    }
}
