//! One line taken apart. What is returned points into the line, but for values of labels with escapes that the format does not have.

use std::borrow::Cow;

use super::Reason;

/// A label: its name, and its value with the format's escapes and no others.
#[derive(Clone, Debug)]
pub struct Label<'a> {
    pub name: &'a [u8],
    pub value: Cow<'a, [u8]>,
    /// How often [`EXPORTED`] is put before the name.
    pub n_exported: usize,
}

impl Label<'_> {
    /// The name as it is written out.
    pub fn full_name(&self) -> Cow<'_, [u8]> {
        match self.n_exported {
            0 => Cow::Borrowed(self.name),
            n => Cow::Owned([EXPORTED.repeat(n).as_slice(), self.name].concat()),
        }
    }

    pub fn write(&self, out: &mut Vec<u8>) {
        for _ in 0..self.n_exported {
            out.extend_from_slice(EXPORTED);
        }
        out.extend_from_slice(self.name);
        out.extend_from_slice(b"=\"");
        out.extend_from_slice(&self.value);
        out.push(b'"');
    }
}

/// What comes before the name of a label that the sandbox has and we have too.
pub const EXPORTED: &[u8] = b"exported_";

/// What follows the name of a sample, but for its labels.
#[derive(Debug)]
pub struct Sample<'a> {
    /// As it is written out.
    pub value: &'a [u8],
    pub figure: f64,
    /// Milliseconds since the epoch.
    pub timestamp: Option<i64>,
    /// What stands behind `#`.
    pub exemplar: Option<&'a [u8]>,
}

const METRIC_START: u8 = 1;
const METRIC: u8 = 2;
const LABEL_START: u8 = 4;
const LABEL: u8 = 8;
const CLASSES: [u8; 256] = classes();

const fn classes() -> [u8; 256] {
    let mut table = [0; 256];
    let mut byte = 0_u8;
    while byte < 128 {
        table[byte as usize] = match byte {
            b'a'..=b'z' | b'A'..=b'Z' | b'_' => METRIC_START | METRIC | LABEL_START | LABEL,
            b'0'..=b'9' => METRIC | LABEL,
            b':' => METRIC_START | METRIC,
            _ => 0,
        };
        byte += 1;
    }
    table
}

/// Returns the name of a metric at the beginning, empty if there is none.
pub fn metric_name(text: &[u8]) -> &[u8] {
    name(text, METRIC_START, METRIC)
}

fn name(text: &[u8], start: u8, rest: u8) -> &[u8] {
    if text.first().is_none_or(|byte| CLASSES[*byte as usize] & start == 0) {
        return &[];
    }
    let end = text.iter().position(|byte| CLASSES[*byte as usize] & rest == 0);
    &text[..end.unwrap_or(text.len())]
}

pub fn is_blank(byte: u8) -> bool {
    byte == b' ' || byte == b'\t'
}

pub fn skip_blanks(text: &[u8]) -> &[u8] {
    let start = text.iter().position(|byte| !is_blank(*byte));
    &text[start.unwrap_or(text.len())..]
}

/// Returns what stands before the next blank, and what follows that.
pub fn token(text: &[u8]) -> (&[u8], &[u8]) {
    let end = text.iter().position(|byte| is_blank(*byte)).unwrap_or(text.len());
    (&text[..end], skip_blanks(&text[end..]))
}

/// Returns the number that a text is for every parser: Go's grammar without hexadecimal digits and underscores, and within its range.
pub fn number(text: &[u8]) -> Option<f64> {
    if let Some(whole) = whole_number(text) {
        return Some(whole);
    }
    let figure: f64 = std::str::from_utf8(text).ok()?.parse().ok()?;
    if figure.is_finite() {
        return Some(figure);
    }
    if figure.is_nan() {
        return (text.len() == 3).then_some(figure); // with a sign it is none for Go
    }
    // Digits that are too much for 64 bits end a whole scrape with Go's parser.
    text.iter().find(|byte| byte.is_ascii_alphanumeric()).is_some_and(u8::is_ascii_alphabetic).then_some(figure)
}

/// Most numbers are a few digits; these are exact in 64 bits.
fn whole_number(text: &[u8]) -> Option<f64> {
    if text.is_empty() || text.len() > 9 {
        return None;
    }
    let mut figure = 0_u32;
    for byte in text {
        figure = figure * 10 + u32::from(byte.is_ascii_digit().then_some(byte - b'0')?);
    }
    Some(f64::from(figure))
}

/// Returns a number as it is written out: as it came, but for the three that have many spellings.
pub fn spelling(text: &[u8], figure: f64) -> &[u8] {
    match figure {
        f64::INFINITY => b"+Inf",
        f64::NEG_INFINITY => b"-Inf",
        _ if figure.is_nan() => b"NaN",
        _ => text,
    }
}

/// Takes apart what follows a name. `labels` is emptied first. `seconds`: whether timestamps are those of OpenMetrics.
pub fn parse<'a>(text: &'a [u8], labels: &mut Vec<Label<'a>>, seconds: bool) -> Result<Sample<'a>, Reason> {
    labels.clear();
    let mut rest = skip_blanks(text);
    if rest.first() == Some(&b'{') {
        rest = skip_blanks(parse_labels(&rest[1..], labels)?);
    } else if rest.len() == text.len() && !text.is_empty() {
        return Err(Reason::Name); // something else than a blank ended the name
    }
    let (value, rest) = token(rest);
    let figure = number(value).ok_or(Reason::Value)?;
    let (timestamp, exemplar) = parse_tail(rest, seconds)?;
    Ok(Sample { value: spelling(value, figure), figure, timestamp, exemplar })
}

/// Takes `[timestamp] [# exemplar]` apart.
fn parse_tail(rest: &[u8], seconds: bool) -> Result<(Option<i64>, Option<&[u8]>), Reason> {
    match rest.first() {
        None => return Ok((None, None)),
        Some(b'#') => return Ok((None, Some(&rest[1..]))),
        Some(_) => {}
    }
    let (time, rest) = token(rest);
    let time = milliseconds(time, seconds).ok_or(Reason::Timestamp)?;
    match rest.first() {
        None => Ok((Some(time), None)),
        Some(b'#') => Ok((Some(time), Some(&rest[1..]))),
        Some(_) => Err(Reason::Timestamp),
    }
}

fn milliseconds(text: &[u8], seconds: bool) -> Option<i64> {
    if !seconds {
        return std::str::from_utf8(text).ok()?.parse().ok();
    }
    if let Some(time) = decimal_milliseconds(text) {
        return Some(time);
    }
    let figure = (number(text)? * 1000.0).round();
    // 2^63 and more does not fit; the comparison also refuses what is not a number.
    #[expect(clippy::cast_possible_truncation, reason = "it is in range")]
    (figure.abs() < 9.2e18).then_some(figure as i64)
}

/// Reads seconds without an exponent, exactly; what is below a millisecond is cut.
fn decimal_milliseconds(text: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let digits: String = fraction.chars().chain("000".chars()).take(3).collect();
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) || !whole.ends_with(|last: char| last.is_ascii_digit()) {
        return None;
    }
    format!("{whole}{digits}").parse().ok()
}

/// Takes labels up to the closing brace apart and returns what follows it. Names may be there once, and not begin with two underscores.
pub fn parse_labels<'a>(text: &'a [u8], labels: &mut Vec<Label<'a>>) -> Result<&'a [u8], Reason> {
    let mut rest = skip_blanks(text);
    loop {
        if rest.first() == Some(&b'}') {
            return Ok(&rest[1..]);
        }
        let name = name(rest, LABEL_START, LABEL);
        if name.is_empty() || name.starts_with(b"__") {
            return Err(Reason::Labels);
        }
        rest = skip_blanks(&rest[name.len()..]);
        rest = skip_blanks(rest.strip_prefix(b"=").ok_or(Reason::Labels)?);
        let (value, after) = quoted(rest.strip_prefix(b"\"").ok_or(Reason::Labels)?)?;
        labels.push(Label { name, value, n_exported: 0 });
        rest = skip_blanks(after);
        match rest.first() {
            Some(b',') => rest = skip_blanks(&rest[1..]),
            Some(b'}') => {}
            _ => return Err(Reason::Labels),
        }
    }
}

/// Returns a value up to the closing quote and what follows that.
fn quoted(text: &[u8]) -> Result<(Cow<'_, [u8]>, &[u8]), Reason> {
    let mut at = 0;
    let mut is_regular = true;
    loop {
        match text.get(at) {
            Some(b'"') => break,
            Some(b'\\') => {
                is_regular &= matches!(text.get(at + 1), Some(b'\\' | b'"' | b'n'));
                at += 2;
            }
            Some(_) => at += 1,
            None => return Err(Reason::Labels),
        }
    }
    let value = &text[..at];
    Ok((if is_regular { Cow::Borrowed(value) } else { regular(value, b"\\\"n") }, &text[at + 1..]))
}

/// Doubles each backslash that begins none of the escapes, which is what parsers take it for that do not refuse it.
pub fn regular<'a>(text: &'a [u8], escapes: &[u8]) -> Cow<'a, [u8]> {
    let mut result = Vec::new();
    let mut done = 0;
    let mut at = 0;
    while at < text.len() {
        if text[at] != b'\\' {
            at += 1;
        } else if text.get(at + 1).is_some_and(|next| escapes.contains(next)) {
            at += 2;
        } else {
            result.extend_from_slice(&text[done..=at]);
            done = at;
            at += 1;
        }
    }
    if result.is_empty() {
        return Cow::Borrowed(text);
    }
    result.extend_from_slice(&text[done..]);
    Cow::Owned(result)
}

/// Undoes the escapes of a label's value.
pub fn unescaped<'a>(value: &Cow<'a, [u8]>) -> Cow<'a, [u8]> {
    if !value.contains(&b'\\') {
        return value.clone();
    }
    let mut result = Vec::with_capacity(value.len());
    let mut bytes = value.iter();
    while let Some(&byte) = bytes.next() {
        result.push(match byte {
            b'\\' => match bytes.next() {
                Some(b'n') => b'\n',
                Some(&other) => other,
                None => b'\\',
            },
            _ => byte,
        });
    }
    Cow::Owned(result)
}
