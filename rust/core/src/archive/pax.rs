//! PAX extended headers: records of "length key=value\n" that replace or add to a header's fields.

use std::collections::BTreeMap;

use super::header::Refusal;
use super::sparse;

/// What extended headers said about the next entry. None: nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Extended {
    /// The name.
    pub path: Option<Vec<u8>>,
    /// A link's target.
    pub link: Option<Vec<u8>>,
    /// Bytes of data.
    pub size: Option<u64>,
    /// Owner.
    pub uid: Option<u64>,
    /// Group.
    pub gid: Option<u64>,
    /// Seconds and nanoseconds since 1970.
    pub mtime: Option<(i64, u32)>,
    /// Extended attributes.
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Why the next entry is to be refused: told when its name is known.
    pub refusal: Option<Refusal>,
    /// The fields of GNU's sparse formats.
    pub sparse: sparse::Fields,
}

/// Key and value.
pub type Record<'a> = (&'a [u8], &'a [u8]);

const XATTR: &[u8] = b"SCHILY.xattr.";
/// Of one entry. File systems hold some dozens on a file; the kernel's own bound is on the list of names, 64 KiB.
const N_XATTRS_MAX: usize = 1024;
/// XATTR_NAME_MAX and XATTR_SIZE_MAX of the kernel.
const XATTR_NAME_BYTES_MAX: usize = 255;
const XATTR_VALUE_BYTES_MAX: usize = 64 << 10;

impl Extended {
    /// Takes over the records of an extended header; later ones win, an empty value takes back.
    pub fn apply(&mut self, bytes: &[u8]) -> Result<(), Refusal> {
        for record in records(bytes) {
            let (key, value) = record?;
            match key {
                b"path" => self.path = name(value)?,
                b"linkpath" => self.link = name(value)?,
                b"size" => self.size = optional(value, decimal)?,
                b"uid" => self.uid = optional(value, decimal)?,
                b"gid" => self.gid = optional(value, decimal)?,
                b"mtime" => self.mtime = optional(value, time)?,
                _ => self.apply_prefixed(key, value)?,
            }
        }
        Ok(())
    }

    fn apply_prefixed(&mut self, key: &[u8], value: &[u8]) -> Result<(), Refusal> {
        if let Some(attribute) = key.strip_prefix(XATTR) {
            self.apply_xattr(attribute, value);
        } else if let Some(field) = key.strip_prefix(b"GNU.sparse.") {
            self.sparse.apply(field, value)?;
        }
        Ok(())
    }

    fn apply_xattr(&mut self, name: &[u8], value: &[u8]) {
        if name.len() > XATTR_NAME_BYTES_MAX {
            self.refusal = Some("the name of an attribute is longer than 255 bytes");
        } else if value.len() > XATTR_VALUE_BYTES_MAX {
            self.refusal = Some("an attribute is larger than 64 KiB");
        } else if self.xattrs.len() >= N_XATTRS_MAX && !self.xattrs.contains_key(name) {
            self.refusal = Some("it has more than 1024 attributes");
        } else {
            self.xattrs.insert(name.to_vec(), value.to_vec());
        }
    }
}

/// Checks a global header. What it says about dates and owners is left aside, as other readers of layers do; names and
/// sizes for all entries at once can only be meant to confuse.
pub fn check_global(bytes: &[u8]) -> Result<(), Refusal> {
    for record in records(bytes) {
        let (key, _) = record?;
        if matches!(key, b"path" | b"linkpath" | b"size") || key.starts_with(XATTR) || key.starts_with(b"GNU.sparse.") {
            return Err("a global header sets names, sizes or attributes");
        }
    }
    Ok(())
}

/// Splits an extended header into (key, value).
pub fn records(mut bytes: &[u8]) -> impl Iterator<Item = Result<Record<'_>, Refusal>> {
    std::iter::from_fn(move || {
        if bytes.is_empty() {
            return None;
        }
        let Some((record, rest)) = split_record(bytes) else {
            bytes = &[];
            return Some(Err("an extended header is damaged"));
        };
        bytes = rest;
        Some(Ok(record))
    })
}

/// Writes one record. Its length counts its own digits.
pub fn append_record(target: &mut Vec<u8>, key: &[u8], value: &[u8]) {
    let n_rest = key.len() + value.len() + 3;
    let mut n_bytes = n_rest + 1;
    while n_rest + n_bytes.to_string().len() != n_bytes {
        n_bytes = n_rest + n_bytes.to_string().len();
    }
    target.extend_from_slice(format!("{n_bytes} ").as_bytes());
    for part in [key, b"=", value, b"\n"] {
        target.extend_from_slice(part);
    }
}

/// Reads decimal digits and nothing else.
pub fn decimal(text: &[u8]) -> Result<u64, Refusal> {
    if text.is_empty() || text.len() > 20 {
        return Err("a number is not decimal");
    }
    text.iter().try_fold(0_u64, |value, &digit| match digit {
        b'0'..=b'9' => value.checked_mul(10).and_then(|value| value.checked_add(u64::from(digit - b'0'))).ok_or("a number is too large"),
        _ => Err("a number is not decimal"),
    })
}

fn split_record(bytes: &[u8]) -> Option<(Record<'_>, &[u8])> {
    let space = bytes.iter().take(20).position(|&byte| byte == b' ')?;
    let n_bytes = usize::try_from(decimal(&bytes[..space]).ok()?).ok()?;
    let body = bytes.get(space + 1..n_bytes)?.strip_suffix(b"\n")?;
    let equals = body.iter().position(|&byte| byte == b'=')?;
    let (key, value) = (&body[..equals], &body[equals + 1..]);
    (!key.is_empty() && !key.contains(&0)).then_some(((key, value), &bytes[n_bytes..]))
}

fn name(value: &[u8]) -> Result<Option<Vec<u8>>, Refusal> {
    if value.contains(&0) {
        return Err("a name contains NUL");
    }
    Ok((!value.is_empty()).then(|| value.to_vec()))
}

fn optional<T>(value: &[u8], parse: impl FnOnce(&[u8]) -> Result<T, Refusal>) -> Result<Option<T>, Refusal> {
    if value.is_empty() { Ok(None) } else { parse(value).map(Some) }
}

/// "-12.5" is 12.5 s before 1970. Digits beyond nanoseconds are dropped.
fn time(value: &[u8]) -> Result<(i64, u32), Refusal> {
    let (is_negative, digits) = value.strip_prefix(b"-").map_or((false, value), |digits| (true, digits));
    let mut parts = digits.splitn(2, |&byte| byte == b'.');
    let seconds = i64::try_from(decimal(parts.next().unwrap_or_default())?).map_err(|_| "a time is out of range")?;
    let fraction = parts.next().unwrap_or_default();
    let padded: Vec<u8> = fraction.iter().copied().chain(std::iter::repeat(b'0')).take(9).collect();
    if !fraction.iter().all(u8::is_ascii_digit) {
        return Err("a time is not decimal");
    }
    let nanoseconds = u32::try_from(decimal(&padded)?).map_err(|_| "a time is out of range")?;
    match (is_negative, nanoseconds) {
        (false, _) => Ok((seconds, nanoseconds)),
        (true, 0) => Ok((-seconds, 0)),
        (true, _) => Ok((-seconds - 1, 1_000_000_000 - nanoseconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(records: &[(&str, &[u8])]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (key, value) in records {
            append_record(&mut bytes, key.as_bytes(), value);
        }
        bytes
    }

    #[test]
    fn records_read_back_at_every_length() {
        for n_bytes in (0..120).chain(980..1010) {
            let value = vec![b'x'; n_bytes];
            let bytes = written(&[("path", &value), ("uid", b"7")]);
            let found: Vec<_> = records(&bytes).map(Result::unwrap).collect();
            assert_eq!(found, [(&b"path"[..], &value[..]), (b"uid", b"7")]);
        }
    }

    #[test]
    fn the_known_keys_are_taken_over() {
        let mut extended = Extended::default();
        let bytes = written(&[
            ("path", b"a"),
            ("path", "h\u{f6}/\u{2713}".as_bytes()),
            ("size", b"8589934592"),
            ("gid", b""),
            ("mtime", b"-1.25"),
            ("SCHILY.xattr.user.k", b"\0=\n"),
            ("comment", b"whatever"),
        ]);
        extended.apply(&bytes).unwrap();
        assert_eq!(extended.path.as_deref(), Some("h\u{f6}/\u{2713}".as_bytes()));
        assert_eq!((extended.size, extended.gid, extended.mtime), (Some(1 << 33), None, Some((-2, 750_000_000))));
        assert_eq!(extended.xattrs, BTreeMap::from([(b"user.k".to_vec(), b"\0=\n".to_vec())]));
    }

    #[test]
    fn attributes_are_bounded_and_later_ones_win() {
        let name = |number: usize| format!("SCHILY.xattr.user.{number}").into_bytes();
        let mut bytes = Vec::new();
        for number in (0..N_XATTRS_MAX).chain(0..N_XATTRS_MAX) {
            append_record(&mut bytes, &name(number), b"first");
        }
        append_record(&mut bytes, &name(7), b"last");
        let mut extended = Extended::default();
        extended.apply(&bytes).unwrap();
        assert_eq!((extended.xattrs.len(), extended.refusal), (N_XATTRS_MAX, None));
        assert_eq!(extended.xattrs[&b"user.7"[..]], b"last");
        extended.apply(&written(&[("SCHILY.xattr.one more", b"")])).unwrap();
        assert_eq!((extended.xattrs.len(), extended.refusal.is_some()), (N_XATTRS_MAX, true));
        for (n_name, n_value, is_refused) in [(255, 1 << 16, false), (256, 0, true), (1, (1 << 16) + 1, true)] {
            let key = "SCHILY.xattr.".to_owned() + &"n".repeat(n_name);
            let mut extended = Extended::default();
            extended.apply(&written(&[(&key, &vec![0; n_value])])).unwrap();
            assert_eq!(extended.refusal.is_some(), is_refused, "{n_name} {n_value}");
        }
    }

    #[test]
    fn damage_is_refused() {
        for bad in [
            &b"12 path=abc"[..],
            b"99 path=a\n",
            b"x path=a\n",
            b"9 =aaaaa\n",
            b"3 a\n",
            b"00000000000000000000000012 a=b\n",
            b"11 path=a\0\n",
        ] {
            assert!(Extended::default().apply(bad).is_err(), "{}", String::from_utf8_lossy(bad));
        }
        for (key, value) in [("size", &b"-1"[..]), ("size", b"99999999999999999999"), ("mtime", b"1.x"), ("uid", b"0x1")] {
            assert!(Extended::default().apply(&written(&[(key, value)])).is_err(), "{key}");
        }
        assert!(check_global(&written(&[("comment", b"abc")])).is_ok());
        assert!(check_global(&written(&[("path", b"abc")])).is_err());
    }
}
