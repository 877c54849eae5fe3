//! Files that only grow until they are begun anew: the command's log, the console's log, and what the machine's program said.
//!
//! Rules: a piece is written whole or not at all. What a full disk does not take is dropped and counted, nobody waits for it, and the first
//! write that succeeds again is preceded by a line that says how much was lost. Over its limit a file is replaced by an empty one of the same
//! name (as conmon does, so that a follower sees it by the inode), or renamed to FILE.1; where the disk has no room even for that it is cut to
//! nothing in place.
//! Source: conmon(8) 2.1, `--log-size-max`; its size is that of the lines as written.

use std::fs::{File, OpenOptions, rename};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// Most bytes of text in one record, conmon's buffer.
const TEXT_BYTES_MAX: usize = 8192;

/// What happens to a file that is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Old {
    /// It is forgotten.
    Dropped,
    /// It is FILE.1 from then on.
    Kept,
}

/// A file that grows.
pub struct Sink {
    path: PathBuf,
    old: Old,
    bytes_max: Option<u64>,
    file: Option<File>,
    size: u64,
    n_lost: u64,
    why_lost: String,
}

impl Sink {
    /// Open it for appending; what it holds counts.
    pub fn open(path: &str, bytes_max: i64, old: Old) -> io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).read(true).mode(0o600).open(path)?;
        let size = file.metadata()?.len();
        let bytes_max = u64::try_from(bytes_max).ok().filter(|limit| *limit > 0);
        Ok(Self { path: path.into(), old, bytes_max, file: Some(file), size, n_lost: 0, why_lost: String::new() })
    }

    /// Whether so many more bytes, behind those that still wait, need a new file. A piece larger than the limit gets a file of its own.
    pub fn is_full_for(&self, n_waiting: usize, n_bytes: usize) -> bool {
        let size = self.size + n_waiting as u64;
        size > 0 && self.bytes_max.is_some_and(|limit| size + n_bytes as u64 > limit)
    }

    /// Append a piece that holds `n_payload` bytes of what somebody said, preceded by what `notice` makes of the loss there was.
    pub fn append(&mut self, piece: &[u8], n_payload: usize, notice: impl Fn(u64, &str) -> Vec<u8>) {
        if self.n_lost > 0 {
            let line = notice(self.n_lost, &self.why_lost);
            if self.write_whole(&line).is_ok() {
                self.n_lost = 0;
            }
        }
        // While the notice itself finds no room nothing else is tried: the order of what is there stays the order in which it was said.
        let outcome = if self.n_lost > 0 { Err(io::Error::other(self.why_lost.clone())) } else { self.write_whole(piece) };
        if let Err(error) = outcome {
            self.n_lost += n_payload as u64;
            self.why_lost = error.to_string();
        }
    }

    /// Begin anew.
    pub fn begin_anew(&mut self) {
        if self.replace().is_err() {
            let cut = self.file.as_ref().map_or_else(|| Err(io::Error::other("closed")), |file| file.set_len(0));
            if cut.is_ok() {
                self.size = 0;
            }
        }
    }

    /// Return the last `n_bytes` that were written, fewer if there are fewer.
    pub fn tail(&self, n_bytes: usize) -> Vec<u8> {
        let mut found = read_tail(&self.path, n_bytes);
        if found.len() < n_bytes && self.old == Old::Kept {
            let mut earlier = read_tail(&numbered(&self.path), n_bytes - found.len());
            earlier.extend_from_slice(&found);
            found = earlier;
        }
        found
    }

    fn replace(&mut self) -> io::Result<()> {
        let mut options = OpenOptions::new();
        options.create(true).append(true).read(true).mode(0o600);
        let fresh = match self.old {
            Old::Dropped => {
                let temporary = with_suffix(&self.path, ".tmp");
                let file = options.open(&temporary)?;
                file.set_len(0)?;
                rename(&temporary, &self.path)?;
                file
            }
            Old::Kept => {
                rename(&self.path, numbered(&self.path))?;
                options.open(&self.path).or_else(|error| {
                    rename(numbered(&self.path), &self.path)?; // no room for one more file: the full one is cut instead
                    Err(error)
                })?
            }
        };
        self.file = Some(fresh);
        self.size = 0;
        Ok(())
    }

    fn write_whole(&mut self, data: &[u8]) -> io::Result<()> {
        let Some(file) = self.file.as_mut() else { return Err(io::Error::other("closed")) };
        match file.write_all(data) {
            Ok(()) => {
                self.size += data.len() as u64;
                Ok(())
            }
            Err(error) => {
                let _ = file.set_len(self.size); // half a record is damage; shrinking needs no room
                Err(error)
            }
        }
    }
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(suffix);
    name.into()
}

fn numbered(path: &Path) -> PathBuf {
    with_suffix(path, ".1")
}

fn read_tail(path: &Path, n_bytes: usize) -> Vec<u8> {
    let mut found = Vec::new();
    if let Ok(mut file) = File::open(path) {
        let size = file.metadata().map_or(0, |metadata| metadata.len());
        if file.seek(SeekFrom::Start(size.saturating_sub(n_bytes as u64))).is_ok() {
            let _ = file.take(n_bytes as u64).read_to_end(&mut found);
        }
    }
    found
}

/// The log of the main command.
pub struct Log(pub Sink);

impl Log {
    /// Write what a command wrote, as records of one time.
    pub fn write(&mut self, is_stderr: bool, data: &[u8], now: SystemTime) {
        let head = record_head(is_stderr, now);
        let mut batch = Vec::with_capacity(data.len() + 2 * (head.len() + 3));
        let mut n_payload = 0;
        for piece in pieces(data) {
            let is_partial = piece.last() != Some(&b'\n');
            let n_bytes = head.len() + 2 + piece.len() + usize::from(is_partial);
            if self.0.is_full_for(batch.len(), n_bytes) {
                self.flush(&mut batch, &mut n_payload, now);
                self.0.begin_anew();
            }
            batch.extend_from_slice(&head);
            batch.extend_from_slice(if is_partial { b"P " } else { b"F " });
            batch.extend_from_slice(piece);
            if is_partial {
                batch.push(b'\n');
            }
            n_payload += piece.len();
        }
        self.flush(&mut batch, &mut n_payload, now);
    }

    fn flush(&mut self, batch: &mut Vec<u8>, n_payload: &mut usize, now: SystemTime) {
        if !batch.is_empty() {
            self.0.append(batch, *n_payload, |n_lost, why| {
                let mut line = record_head(true, now);
                line.extend_from_slice(format!("F isopod: {n_lost} bytes of the output were lost: {why}\n").as_bytes());
                line
            });
            batch.clear();
            *n_payload = 0;
        }
    }
}

/// The log of the console: what it said, byte by byte.
pub struct ConsoleLog(pub Sink);

impl ConsoleLog {
    /// Write what it said.
    pub fn write(&mut self, data: &[u8]) {
        if self.0.is_full_for(0, data.len()) {
            self.0.begin_anew();
        }
        self.0.append(data, data.len(), |n_lost, why| format!("\n[isopod: {n_lost} bytes of the console were lost: {why}]\n").into_bytes());
    }
}

/// What the machine's program itself says: its last line is the reason when it ends at once.
pub struct Words {
    sink: Sink,
    line: Vec<u8>,
    last: String,
}

/// The last words that are kept of a line.
const WORDS_BYTES_MAX: usize = 1000;
/// Size of the file.
const WORDS_FILE_BYTES_MAX: i64 = 64 << 10;

impl Words {
    /// Begin the file anew.
    pub fn open(path: &str) -> io::Result<Self> {
        let mut sink = Sink::open(path, WORDS_FILE_BYTES_MAX, Old::Dropped)?;
        sink.begin_anew();
        Ok(Self { sink, line: Vec::new(), last: String::new() })
    }

    /// Keep what it said in the file.
    pub fn write(&mut self, data: &[u8]) {
        for piece in data.chunks(4096) {
            if self.sink.is_full_for(0, piece.len()) {
                self.sink.begin_anew();
            }
            self.sink.append(piece, piece.len(), |_, _| Vec::new());
        }
        self.hear(data);
    }

    /// Keep the last line only.
    pub fn hear(&mut self, data: &[u8]) {
        for piece in data.split_inclusive(|byte| *byte == b'\n') {
            let room = WORDS_BYTES_MAX.saturating_sub(self.line.len());
            self.line.extend_from_slice(&piece[..piece.len().min(room)]);
            if piece.ends_with(b"\n") {
                self.end_line();
            }
        }
    }

    /// The last line that said something.
    pub fn last(&mut self) -> &str {
        self.end_line();
        &self.last
    }

    fn end_line(&mut self) {
        let text = String::from_utf8_lossy(&self.line).split_whitespace().collect::<Vec<_>>().join(" ");
        if !text.is_empty() {
            self.last = text;
        }
        self.line.clear();
    }
}

/// Cut into what one record holds: a line with its newline, or a part of one.
fn pieces(data: &[u8]) -> impl Iterator<Item = &[u8]> {
    data.split_inclusive(|byte| *byte == b'\n').flat_map(|line| {
        // A line of exactly the limit keeps its newline.
        let n_whole = if line.len() <= TEXT_BYTES_MAX + 1 && line.ends_with(b"\n") { line.len() } else { TEXT_BYTES_MAX };
        line.chunks(n_whole.max(1))
    })
}

fn record_head(is_stderr: bool, now: SystemTime) -> Vec<u8> {
    format!("{} {} ", stamp(now), if is_stderr { "stderr" } else { "stdout" }).into_bytes()
}

/// An RFC 3339 time stamp with nine decimals, in UTC.
pub fn stamp(now: SystemTime) -> String {
    let since = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (n_days, second) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    let (year, month, day) = civil(n_days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:09}+00:00", since.subsec_nanos())
}

/// Year, month and day of a day since 1970-01-01, by counting from 1 March of the year 0 so that a leap day is a year's last.
fn civil(n_days: u64) -> (u64, u64, u64) {
    let days = n_days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::{ConsoleLog, Log, Old, Sink, Words, civil, pieces, stamp};
    use std::fs::{read, read_to_string, remove_dir_all};
    use std::time::{Duration, UNIX_EPOCH};

    struct Folder(String);

    impl Folder {
        fn new(name: &str) -> Self {
            let path = format!("{}/isopod-shim-{}-{name}", std::env::temp_dir().display(), std::process::id());
            std::fs::create_dir(&path).expect("nobody else has this name");
            Self(path)
        }
    }

    impl Drop for Folder {
        fn drop(&mut self) {
            let _ = remove_dir_all(&self.0);
        }
    }

    #[test]
    fn days_become_dates() {
        for (n_days, date) in
            [(0, (1970, 1, 1)), (59, (1970, 3, 1)), (11_016, (2000, 2, 29)), (20_779, (2026, 11, 22)), (47_540, (2100, 2, 28))]
        {
            assert_eq!(civil(n_days), date);
        }
        assert_eq!(stamp(UNIX_EPOCH + Duration::new(951_826_805, 7)), "2000-02-29T12:20:05.000000007+00:00");
    }

    #[test]
    fn a_record_holds_a_line_or_a_part_of_one() {
        let long = vec![b'x'; 20_000];
        let sizes: Vec<usize> = pieces(&long).map(<[u8]>::len).collect();
        assert_eq!(sizes, [8192, 8192, 3616]);
        assert_eq!(pieces(b"a\nb").collect::<Vec<_>>(), [&b"a\n"[..], b"b"]);
        assert_eq!(pieces(b"").count(), 0);
        let mut line = vec![b'x'; 8192];
        line.push(b'\n');
        assert_eq!(pieces(&line).count(), 1);
    }

    #[test]
    fn the_log_looks_as_conmon_writes_it() {
        let folder = Folder::new("log");
        let path = format!("{}/log", folder.0);
        let mut log = Log(Sink::open(&path, 0, Old::Dropped).expect("it opens"));
        log.write(false, b"one\nhalf", UNIX_EPOCH);
        log.write(true, b" bad\n", UNIX_EPOCH);
        let stamp = "1970-01-01T00:00:00.000000000+00:00";
        let expected = format!("{stamp} stdout F one\n{stamp} stdout P half\n{stamp} stderr F  bad\n");
        assert_eq!(read_to_string(&path).expect("it is text"), expected);
    }

    #[test]
    fn a_full_log_is_begun_anew_and_a_full_console_keeps_one_file() {
        let folder = Folder::new("full");
        let (path, console) = (format!("{}/log", folder.0), format!("{}/console", folder.0));
        let mut log = Log(Sink::open(&path, 200, Old::Dropped).expect("it opens"));
        for number in 0..40 {
            log.write(false, format!("number {number}\n").as_bytes(), UNIX_EPOCH);
            assert!(read(&path).expect("it is there").len() <= 200);
        }
        assert!(read_to_string(&path).expect("it is text").ends_with("F number 39\n"));
        log.write(false, b"a much longer text, in lines\nof which not all\ncan be in one file\nof that size\n", UNIX_EPOCH);
        assert!(read(&path).expect("it is there").len() <= 200);
        let mut console_log = ConsoleLog(Sink::open(&console, 10, Old::Kept).expect("it opens"));
        for word in ["one two ", "three ", "four", " five"] {
            console_log.write(word.as_bytes());
        }
        assert_eq!(read_to_string(&console).expect("it is text"), " five");
        assert_eq!(read_to_string(format!("{console}.1")).expect("it is text"), "three four");
        assert_eq!(console_log.0.tail(9), b"four five");
        assert_eq!(console_log.0.tail(100), b"three four five");
    }

    #[test]
    fn the_last_line_that_says_something_is_kept() {
        let folder = Folder::new("words");
        let mut words = Words::open(&format!("{}/vmm.log", folder.0)).expect("it opens");
        words.write(b"qemu: warming up\nqemu: no such ");
        words.write(b"device\n\n");
        assert_eq!(words.last(), "qemu: no such device");
        words.write(&vec![b'y'; 200_000]);
        assert!(read(format!("{}/vmm.log", folder.0)).expect("it is there").len() <= 64 << 10);
        assert_eq!(words.last().len(), 1000);
    }
}
