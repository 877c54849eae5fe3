//! Finds the kernel's last words in what the console says.

const WORDS: &[u8] = b"Kernel panic - not syncing: ";
/// A longer line is no panic.
const LINE_BYTES_MAX: usize = 512;

/// Looks at lines as they come.
#[derive(Default)]
pub struct Scanner {
    line: Vec<u8>,
}

impl Scanner {
    /// Look at more bytes; return the text of a panic whose line is complete.
    pub fn feed(&mut self, data: &[u8]) -> Option<String> {
        let mut found = None;
        for piece in data.split_inclusive(|byte| *byte == b'\n') {
            let room = LINE_BYTES_MAX.saturating_sub(self.line.len());
            self.line.extend_from_slice(&piece[..piece.len().min(room)]);
            if piece.ends_with(b"\n") {
                found = found.or_else(|| text_of(&self.line));
                self.line.clear();
            }
        }
        found
    }
}

/// Only the kernel's own form counts: at the beginning of a line, behind a time stamp or nothing. Firmware may have left escape
/// sequences on the first line; a panic is not on that.
fn text_of(line: &[u8]) -> Option<String> {
    let start = line.strip_prefix(b"[").and_then(|rest| rest.iter().position(|byte| *byte == b']')).map_or(0, |end| end + 3);
    let text = line.get(start..)?.strip_prefix(WORDS)?;
    let printable: String = String::from_utf8_lossy(text).chars().map(|letter| if letter.is_control() { ' ' } else { letter }).collect();
    Some(printable.split_whitespace().collect::<Vec<_>>().join(" "))
}

#[cfg(test)]
mod tests {
    use super::Scanner;

    #[test]
    fn the_kernels_words_are_found_however_they_are_cut() {
        let console = b"\x1b[2Jboot\r\n[    1.203948] Kernel panic - not syncing: No working init found.\r\n[    1.2] CPU: 0\r\n";
        for step in 1..console.len() {
            let mut scanner = Scanner::default();
            let found: Vec<String> = console.chunks(step).filter_map(|piece| scanner.feed(piece)).collect();
            assert_eq!(found, ["No working init found."]);
        }
    }

    #[test]
    fn what_only_looks_like_it_is_not_taken() {
        let mut scanner = Scanner::default();
        for line in ["grep 'Kernel panic - not syncing: x'\n", "[Kernel panic - not syncing: \n", "[\n", "[]\n", "\n", "Kernel panic\n"] {
            assert_eq!(scanner.feed(line.as_bytes()), None, "{line}");
        }
        assert_eq!(scanner.feed(&[b'x'; 10_000]), None);
        assert_eq!(scanner.feed(b"Kernel panic - not syncing: too late in the line\n"), None);
        assert_eq!(scanner.feed(b"Kernel panic - not syncing: a\x07b\n"), Some("a b".into()));
    }
}
