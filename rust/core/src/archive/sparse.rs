//! GNU's sparse files: which parts of a file the archive holds. Four formats, one map.

use super::BLOCK_BYTES;
use super::header::{Refusal, unsigned};
use super::pax::decimal;

/// Sixteen bytes each in memory; real files stay far below.
pub const N_SEGMENTS_MAX: usize = 1 << 18;
const OLD_HEADER_MAP: std::ops::Range<usize> = 386..482;
const OLD_HEADER_CONTINUES: usize = 482;
const OLD_HEADER_REAL_SIZE: std::ops::Range<usize> = 483..495;
const OLD_BLOCK_MAP: std::ops::Range<usize> = 0..504;
const OLD_BLOCK_CONTINUES: usize = 504;
const OLD_SEGMENT_BYTES: usize = 24;

/// A part of a file that is data: (offset, bytes).
pub type Segment = (u64, u64);

/// What a sparse file is made of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Map {
    /// In order, not overlapping, each inside the file.
    pub segments: Vec<Segment>,
    /// The file's size, holes included.
    pub size: u64,
}

/// The PAX fields of formats 0.0, 0.1 and 1.0.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fields {
    /// The file's real name (0.1, 1.0).
    pub name: Option<Vec<u8>>,
    major: Option<u64>,
    size: Option<u64>,
    map: Vec<u64>,
}

impl Fields {
    /// Takes over the record "GNU.sparse.`key`".
    pub fn apply(&mut self, key: &[u8], value: &[u8]) -> Result<(), Refusal> {
        match key {
            b"name" if value.contains(&0) => return Err("a name contains NUL"),
            b"name" => self.name = Some(value.to_vec()),
            b"major" => self.major = Some(decimal(value)?),
            b"size" | b"realsize" => self.size = Some(decimal(value)?),
            // 0.0 repeats these two in turn; 0.1 gives all of them at once.
            b"offset" | b"numbytes" => self.push(decimal(value)?)?,
            b"map" => {
                self.map = value.split(|&byte| byte == b',').filter(|text| !text.is_empty()).map(decimal).collect::<Result<_, _>>()?;
            }
            _ => {}
        }
        Ok(())
    }

    /// Whether the entry is a sparse file.
    #[must_use]
    pub fn is_present(&self) -> bool {
        self.size.is_some() || self.major.is_some() || !self.map.is_empty()
    }

    /// Whether the map stands before the data (1.0).
    #[must_use]
    pub fn has_map_in_data(&self) -> bool {
        self.major == Some(1)
    }

    /// Returns the map of formats 0.0 and 0.1.
    pub fn map(&self, n_data_bytes: u64) -> Result<Map, Refusal> {
        self.checked(&self.map, n_data_bytes)
    }

    /// Returns the map of format 1.0 from its numbers.
    pub fn map_of(&self, numbers: &[u64], n_data_bytes: u64) -> Result<Map, Refusal> {
        self.checked(numbers, n_data_bytes)
    }

    fn push(&mut self, number: u64) -> Result<(), Refusal> {
        if self.map.len() >= 2 * N_SEGMENTS_MAX {
            return Err("a sparse file has too many parts");
        }
        self.map.push(number);
        Ok(())
    }

    fn checked(&self, numbers: &[u64], n_data_bytes: u64) -> Result<Map, Refusal> {
        let size = self.size.ok_or("a sparse file has no size")?;
        if numbers.len() % 2 != 0 {
            return Err("a sparse map is incomplete");
        }
        check(Map { segments: numbers.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect(), size }, n_data_bytes)
    }
}

/// Reads format 1.0's map: decimal lines at the start of the data, the first saying how many pairs follow.
#[derive(Debug, Default)]
pub struct MapInData {
    numbers: Vec<u64>,
    line: Vec<u8>,
    n_wanted: Option<usize>,
}

impl MapInData {
    /// Takes a block; returns the numbers once the last one is complete. What follows it in its block is padding.
    pub fn feed(&mut self, block: &[u8]) -> Result<Option<Vec<u64>>, Refusal> {
        for &byte in block {
            if byte != b'\n' {
                self.line.push(byte);
                if self.line.len() > 20 {
                    return Err("a sparse map is damaged");
                }
                continue;
            }
            let number = decimal(&std::mem::take(&mut self.line))?;
            match self.n_wanted {
                None => self.n_wanted = Some(pairs(number)?),
                Some(_) => self.numbers.push(number),
            }
            if self.n_wanted == Some(self.numbers.len()) {
                return Ok(Some(std::mem::take(&mut self.numbers)));
            }
        }
        Ok(None)
    }
}

/// The map of the old GNU format, type 'S': in the header and in blocks after it.
#[derive(Debug)]
pub struct OldMap {
    segments: Vec<Segment>,
    size: u64,
    /// Whether another block of the map follows.
    pub continues: bool,
}

impl OldMap {
    /// Starts with the header.
    pub fn from_header(block: &[u8; BLOCK_BYTES]) -> Result<Self, Refusal> {
        let size = unsigned(&block[OLD_HEADER_REAL_SIZE])?;
        let mut map = Self { segments: Vec::new(), size, continues: block[OLD_HEADER_CONTINUES] != 0 };
        map.extend(&block[OLD_HEADER_MAP])?;
        Ok(map)
    }

    /// Goes on with the next block.
    pub fn feed(&mut self, block: &[u8; BLOCK_BYTES]) -> Result<(), Refusal> {
        let n_before = self.segments.len();
        self.continues = block[OLD_BLOCK_CONTINUES] != 0;
        self.extend(&block[OLD_BLOCK_MAP])?;
        // Otherwise a map of nothing could go on for ever.
        if self.segments.len() == n_before { Err("a sparse map is empty") } else { Ok(()) }
    }

    /// Returns the map.
    pub fn finish(self, n_data_bytes: u64) -> Result<Map, Refusal> {
        check(Map { segments: self.segments, size: self.size }, n_data_bytes)
    }

    fn extend(&mut self, fields: &[u8]) -> Result<(), Refusal> {
        for field in fields.chunks_exact(OLD_SEGMENT_BYTES) {
            if field[0] == 0 {
                break;
            }
            if self.segments.len() >= N_SEGMENTS_MAX {
                return Err("a sparse file has too many parts");
            }
            self.segments.push((unsigned(&field[..12])?, unsigned(&field[12..])?));
        }
        Ok(())
    }
}

fn pairs(number: u64) -> Result<usize, Refusal> {
    usize::try_from(number)
        .ok()
        .filter(|&n_pairs| n_pairs <= N_SEGMENTS_MAX)
        .map(|n_pairs| 2 * n_pairs)
        .ok_or("a sparse file has too many parts")
}

fn check(map: Map, n_data_bytes: u64) -> Result<Map, Refusal> {
    if map.segments.len() > N_SEGMENTS_MAX {
        return Err("a sparse file has too many parts");
    }
    let mut end = 0;
    let mut n_bytes = 0_u64;
    for &(offset, n_segment_bytes) in &map.segments {
        if offset < end {
            return Err("the parts of a sparse file overlap");
        }
        end = offset.checked_add(n_segment_bytes).filter(|&end| end <= map.size).ok_or("a part lies outside its sparse file")?;
        n_bytes += n_segment_bytes;
    }
    if n_bytes == n_data_bytes { Ok(map) } else { Err("a sparse file's parts do not add up to its data") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(records: &[(&str, &str)]) -> Fields {
        let mut fields = Fields::default();
        for (key, value) in records {
            fields.apply(key.as_bytes(), value.as_bytes()).unwrap();
        }
        fields
    }

    #[test]
    fn the_pax_formats_give_the_same_map() {
        let expected = Map { segments: vec![(0, 10), (100, 5)], size: 200 };
        let zero =
            fields(&[("size", "200"), ("numblocks", "2"), ("offset", "0"), ("numbytes", "10"), ("offset", "100"), ("numbytes", "5")]);
        assert_eq!(zero.map(15), Ok(expected.clone()));
        let one = fields(&[("size", "200"), ("map", "0,10,100,5")]);
        assert_eq!(one.map(15), Ok(expected.clone()));
        let two = fields(&[("major", "1"), ("minor", "0"), ("realsize", "200")]);
        let mut map = MapInData::default();
        assert_eq!(map.feed(b"2\n0\n10\n10"), Ok(None));
        let numbers = map.feed(b"0\n5\n\0\0\0\0").unwrap().unwrap();
        assert_eq!(two.map_of(&numbers, 15), Ok(expected));
        assert_eq!(MapInData::default().feed(b"0\n\0\0"), Ok(Some(vec![])));
    }

    #[test]
    fn impossible_maps_are_refused() {
        for (map, n_data_bytes) in [("0,10,5,5", 15), ("0,10,195,10", 20), ("0,10", 11), ("0,10,20", 10), ("18446744073709551615,1", 1)] {
            assert!(fields(&[("size", "200"), ("map", map)]).map(n_data_bytes).is_err(), "{map}");
        }
        assert!(fields(&[("map", "0,10")]).map(10).is_err());
        assert!(MapInData::default().feed(b"99999999\n").is_err());
        assert!(MapInData::default().feed(&[b'1'; 30]).is_err());
        assert!(MapInData::default().feed(b"2\nx\n").is_err());
    }
}
