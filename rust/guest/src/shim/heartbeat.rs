//! Whether the guest still answers. Time is handed in; nothing here waits.

/// Between two questions, unless the patience is short.
const EVERY_MS: u64 = 5000;

/// What is due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Beat {
    /// Ask; the number is the question's payload.
    Ping(u64),
    /// Half of the patience is gone.
    Silent,
    /// All of it.
    Dead,
}

/// When the guest was heard last, and when it is asked next. It begins with the guest's first word.
pub struct Heartbeat {
    patience_ms: u64,
    heard_ms: u64,
    ask_ms: u64,
    n_asked: u64,
    is_held: bool,
    is_silent: bool,
    has_begun: bool,
}

impl Heartbeat {
    /// One for a guest that has not spoken yet.
    pub fn new(patience_ms: u64) -> Self {
        Self { patience_ms, heard_ms: 0, ask_ms: 0, n_asked: 0, is_held: false, is_silent: false, has_begun: false }
    }

    /// The guest spoke for the first time.
    pub fn begin(&mut self, now_ms: u64) {
        self.has_begun = true;
        self.is_silent = false;
        self.heard_ms = now_ms;
        self.ask_ms = now_ms + self.every_ms();
    }

    /// The connection is gone: there is nobody to ask.
    pub fn end(&mut self) {
        self.has_begun = false;
    }

    /// A frame came; return whether it ends a silence.
    pub fn hear(&mut self, now_ms: u64) -> bool {
        self.heard_ms = now_ms;
        std::mem::take(&mut self.is_silent)
    }

    /// The machine is paused, or goes on.
    pub fn hold(&mut self, is_held: bool, now_ms: u64) {
        if self.is_held && !is_held {
            self.heard_ms = now_ms;
            self.ask_ms = now_ms;
        }
        self.is_held = is_held;
    }

    /// Whether the machine is paused.
    pub fn is_held(&self) -> bool {
        self.is_held
    }

    /// Ask at once; return the question's number.
    pub fn ask(&mut self, now_ms: u64) -> u64 {
        self.ask_ms = now_ms + self.every_ms();
        self.n_asked += 1;
        self.n_asked
    }

    /// How long nothing was heard.
    pub fn silent_ms(&self, now_ms: u64) -> u64 {
        if self.has_begun && !self.is_held { now_ms.saturating_sub(self.heard_ms) } else { 0 }
    }

    /// What is due, one thing at a time.
    pub fn tick(&mut self, now_ms: u64) -> Option<Beat> {
        if !self.has_begun || self.is_held {
            return None;
        }
        if now_ms >= self.ask_ms {
            return Some(Beat::Ping(self.ask(now_ms)));
        }
        let silent_ms = self.silent_ms(now_ms);
        if silent_ms >= self.patience_ms {
            self.has_begun = false;
            return Some(Beat::Dead);
        }
        if !self.is_silent && silent_ms >= self.patience_ms / 2 {
            self.is_silent = true;
            return Some(Beat::Silent);
        }
        None
    }

    /// When something is due next.
    pub fn next_ms(&self) -> Option<u64> {
        if !self.has_begun || self.is_held {
            return None;
        }
        let patience_ms = if self.is_silent { self.patience_ms } else { self.patience_ms / 2 };
        Some(self.ask_ms.min(self.heard_ms + patience_ms))
    }

    fn every_ms(&self) -> u64 {
        EVERY_MS.min(self.patience_ms / 4).max(1)
    }
}

#[cfg(test)]
mod tests {
    use super::{Beat, Heartbeat};

    fn beats(heartbeat: &mut Heartbeat, until_ms: u64) -> Vec<(u64, Beat)> {
        let mut found = Vec::new();
        while let Some(due) = heartbeat.next_ms().filter(|due| *due <= until_ms) {
            while let Some(beat) = heartbeat.tick(due) {
                found.push((due, beat));
            }
        }
        found
    }

    #[test]
    fn a_guest_that_says_nothing_is_asked_then_reported_then_dead() {
        let mut heartbeat = Heartbeat::new(30_000);
        assert_eq!(heartbeat.next_ms(), None);
        heartbeat.begin(1000);
        let found = beats(&mut heartbeat, 100_000);
        let (pings, rest): (Vec<_>, Vec<_>) = found.into_iter().partition(|(_, beat)| matches!(beat, Beat::Ping(_)));
        assert_eq!(pings.iter().map(|(due, _)| *due).collect::<Vec<_>>(), [6000, 11_000, 16_000, 21_000, 26_000, 31_000]);
        assert_eq!(rest, [(16_000, Beat::Silent), (31_000, Beat::Dead)]);
        assert_eq!(heartbeat.next_ms(), None);
    }

    #[test]
    fn an_answer_ends_the_silence() {
        let mut heartbeat = Heartbeat::new(2000);
        heartbeat.begin(0);
        assert!(beats(&mut heartbeat, 1500).contains(&(1000, Beat::Silent)));
        assert!(heartbeat.hear(1600));
        assert!(!heartbeat.hear(1700));
        assert_eq!(heartbeat.silent_ms(2000), 300);
    }

    #[test]
    fn a_paused_machine_is_not_asked_and_has_all_its_time_again() {
        let mut heartbeat = Heartbeat::new(30_000);
        heartbeat.begin(0);
        heartbeat.hold(true, 1000);
        assert_eq!((heartbeat.next_ms(), heartbeat.tick(1_000_000), heartbeat.silent_ms(1_000_000)), (None, None, 0));
        heartbeat.hold(false, 1_000_000);
        assert_eq!(heartbeat.tick(1_000_000), Some(Beat::Ping(1)));
        assert_eq!(heartbeat.tick(1_000_000), None);
    }
}
