//! A body as lines: where they end, which are announcements, and which were torn on their way.

use memchr::memchr;

use super::sample;

/// Whether a body is in OpenMetrics, which ends with words of its own.
pub fn is_open_metrics(body: &[u8]) -> bool {
    let end = body.trim_ascii_end();
    end.strip_suffix(b"# EOF").is_some_and(|before| before.last().is_none_or(|byte| *byte == b'\n'))
}

/// What `# HELP` and `# TYPE` say. An empty name stands for one that is none.
pub struct Announcement<'a> {
    pub is_type: bool,
    pub name: &'a [u8],
    pub rest: &'a [u8],
}

impl<'a> Announcement<'a> {
    /// Returns None for other lines and comments.
    pub fn parse(line: &'a [u8]) -> Option<Self> {
        let (word, rest) = sample::token(sample::skip_blanks(sample::skip_blanks(line).strip_prefix(b"#")?));
        if word != b"TYPE" && word != b"HELP" {
            return None;
        }
        let (token, rest) = sample::token(rest);
        let name = sample::metric_name(token);
        Some(Self { is_type: word == b"TYPE", name: if name.len() == token.len() { name } else { b"" }, rest })
    }
}

/// One line of a body.
pub struct Line<'a> {
    /// Without what ends it.
    pub text: &'a [u8],
    /// It ends with a carriage return and a newline.
    is_crlf: bool,
    /// It ends with a newline.
    pub is_whole: bool,
}

impl Line<'_> {
    fn is_chunk_header(&self) -> bool {
        self.is_crlf && (1..=8).contains(&self.text.len()) && self.text.iter().all(u8::is_ascii_hexdigit)
    }
}

/// Iterates over a body's lines.
pub struct Lines<'a> {
    rest: &'a [u8],
}

impl<'a> Lines<'a> {
    pub fn new(rest: &'a [u8]) -> Self {
        Self { rest }
    }
}

impl<'a> Iterator for Lines<'a> {
    type Item = Line<'a>;

    fn next(&mut self) -> Option<Line<'a>> {
        if self.rest.is_empty() {
            return None;
        }
        let end = memchr(b'\n', self.rest);
        let line = &self.rest[..end.unwrap_or(self.rest.len())];
        self.rest = &self.rest[end.map_or(self.rest.len(), |end| end + 1)..];
        let cut = line.strip_suffix(b"\r");
        Some(Line { text: cut.unwrap_or(line), is_crlf: cut.is_some() && end.is_some(), is_whole: end.is_some() })
    }
}

/// Finds headers of HTTP's chunks that were left in a body, and the halves of the lines around them: numbers may be cut there unseen.
pub struct Tear {
    /// The body's own lines end with a newline alone.
    is_looking: bool,
    /// The line is a header.
    is_header: bool,
    /// The line is the second half of one.
    is_half: bool,
}

impl Tear {
    pub fn new(body: &[u8]) -> Self {
        let first = Lines::new(body).next();
        let is_header = first.as_ref().is_some_and(Line::is_chunk_header);
        Self { is_looking: is_header || first.is_none_or(|line| !line.is_crlf), is_header, is_half: false }
    }

    /// Returns whether a line is a header or torn by one.
    pub fn touches(&mut self, line: &Line<'_>, next: Option<&Line<'_>>) -> bool {
        if std::mem::take(&mut self.is_header) {
            return true;
        }
        self.is_header = self.is_looking && line.is_crlf && next.is_some_and(Line::is_chunk_header);
        let was_half = std::mem::replace(&mut self.is_half, false);
        // A header that comes behind a whole line leaves an empty one before it.
        self.is_half = self.is_header && (was_half || !line.text.is_empty());
        was_half || self.is_half
    }
}
