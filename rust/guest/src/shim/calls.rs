//! How long the agent took to answer, by operation: a histogram as Prometheus has it.

/// The operations that are measured; what a guest may know beside them is not.
const OPERATIONS: [&str; 9] = ["archive", "configure", "exec", "extract", "metrics", "poweroff", "prepare", "renew", "sync"];
/// Upper bounds of the buckets in milliseconds, those of Kata.
pub const BOUNDS_MS: [u64; 10] = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512];

/// The counts of one operation.
#[derive(Clone, Copy, Default)]
pub struct Counts {
    /// Answers within each bound, not those of the bound before; the last are those beyond all bounds.
    buckets: [u64; BOUNDS_MS.len() + 1],
    /// Milliseconds of all answers.
    pub sum_ms: u64,
}

impl Counts {
    /// Answers within each bound and those before it; the last are all.
    pub fn cumulative(&self) -> impl Iterator<Item = u64> {
        self.buckets.iter().scan(0, |sum, count| {
            *sum += count;
            Some(*sum)
        })
    }
}

/// The counts of all operations.
#[derive(Default)]
pub struct Calls {
    counts: [Counts; OPERATIONS.len()],
}

impl Calls {
    /// The place of an operation; None for one that is not measured.
    pub fn index(operation: &str) -> Option<usize> {
        OPERATIONS.iter().position(|known| *known == operation)
    }

    /// Count an answer.
    pub fn observe(&mut self, index: Option<usize>, taken_ms: u64) {
        if let Some(counts) = index.and_then(|index| self.counts.get_mut(index)) {
            counts.buckets[BOUNDS_MS.iter().position(|bound| taken_ms <= *bound).unwrap_or(BOUNDS_MS.len())] += 1;
            counts.sum_ms += taken_ms;
        }
    }

    /// The operations that were answered, and their counts.
    pub fn observed(&self) -> impl Iterator<Item = (&'static str, &Counts)> {
        OPERATIONS.into_iter().zip(&self.counts).filter(|(_, counts)| counts.buckets.iter().any(|count| *count > 0))
    }
}

#[cfg(test)]
mod tests {
    use super::Calls;

    #[test]
    fn answers_are_counted_by_their_time() {
        let mut calls = Calls::default();
        for taken_ms in [0, 1, 3, 512, 513] {
            calls.observe(Calls::index("exec"), taken_ms);
        }
        calls.observe(Calls::index("no such thing"), 1);
        let found: Vec<_> = calls.observed().collect();
        assert_eq!(found.len(), 1);
        assert_eq!((found[0].0, found[0].1.sum_ms), ("exec", 1029));
        assert_eq!(found[0].1.cumulative().collect::<Vec<_>>(), [2, 2, 3, 3, 3, 3, 3, 3, 3, 4, 5]);
    }
}
