//! Sets of keys, to find one that was there before.
//!
//! Bodies come sorted for the most part: as long as each key of a set is above the one before it, it is new, and no more is needed than to
//! remember it. With the first that is not, the set is hashed. Hashes are keyed at random, so that nobody can send keys that collide; keys
//! with equal hashes are compared, so that the answers depend on the keys alone. Each key is hashed at most once.

use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, Hasher, RandomState};
use std::ops::Range;

pub struct Series {
    random: RandomState,
    keys: Vec<u8>,
    entries: Vec<Entry>,
    /// The last key of each set, and whether the set is hashed.
    sets: Vec<(Option<u32>, bool)>,
    heads: HashMap<u64, u32, BuildHasherDefault<AsIs>>,
    /// How many keys were compared.
    pub n_comparisons: usize,
}

struct Entry {
    set: usize,
    key: Range<usize>,
    /// The key before it in the set.
    previous: Option<u32>,
    /// Another one with the same hash.
    next: Option<u32>,
}

impl Series {
    pub fn new(n_bytes: usize, n_keys: usize) -> Self {
        Self {
            random: RandomState::new(),
            keys: Vec::with_capacity(n_bytes),
            entries: Vec::with_capacity(n_keys),
            sets: Vec::new(),
            heads: HashMap::default(),
            n_comparisons: 0,
        }
    }

    /// Adds a key to a set. Returns its number among all keys, and whether it is new.
    pub fn add(&mut self, set: usize, key: &[u8]) -> (usize, bool) {
        if self.sets.len() <= set {
            self.sets.resize(set + 1, (None, false));
        }
        let (last, is_hashed) = self.sets[set];
        if !is_hashed {
            self.n_comparisons += 1;
            if last.is_none_or(|last| *key > self.keys[self.entries[last as usize].key.clone()]) {
                return (self.push(set, key), true);
            }
            self.hash_set(set, last);
        }
        let hash = self.hash(set, key);
        if let Some(other) = self.find(hash, set, key) {
            return (other, false);
        }
        let number = self.push(set, key);
        self.enter(hash, number);
        (number, true)
    }

    fn push(&mut self, set: usize, key: &[u8]) -> usize {
        let number = self.entries.len();
        let start = self.keys.len();
        self.keys.extend_from_slice(key);
        let (last, _) = &mut self.sets[set];
        let previous = last.replace(u32::try_from(number).expect("fewer lines than 2^32 are kept"));
        self.entries.push(Entry { set, key: start..self.keys.len(), previous, next: None });
        number
    }

    fn hash_set(&mut self, set: usize, last: Option<u32>) {
        self.sets[set].1 = true;
        let mut at = last;
        while let Some(number) = at {
            let entry = &self.entries[number as usize];
            at = entry.previous;
            let hash = self.hash(set, &self.keys[entry.key.clone()]);
            self.enter(hash, number as usize);
        }
    }

    fn hash(&self, set: usize, key: &[u8]) -> u64 {
        let mut hasher = self.random.build_hasher();
        hasher.write_usize(set);
        hasher.write(key);
        hasher.finish()
    }

    fn find(&mut self, hash: u64, set: usize, key: &[u8]) -> Option<usize> {
        let mut at = self.heads.get(&hash).copied();
        while let Some(number) = at {
            self.n_comparisons += 1;
            let entry = &self.entries[number as usize];
            if entry.set == set && self.keys[entry.key.clone()] == *key {
                return Some(number as usize);
            }
            at = entry.next;
        }
        None
    }

    fn enter(&mut self, hash: u64, number: usize) {
        let head = u32::try_from(number).expect("fewer lines than 2^32 are kept");
        self.entries[number].next = self.heads.insert(hash, head);
    }
}

/// The keys of the map are hashes already.
#[derive(Default)]
struct AsIs(u64);

impl Hasher for AsIs {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, _: &[u8]) {
        unreachable!("only u64 are hashed");
    }

    fn write_u64(&mut self, hash: u64) {
        self.0 = hash;
    }
}
