//! Metrics as text: what a shim exposes is read, checked, labelled and put in order, once for each body.
//!
//! A body comes from a sandbox, which nobody has to trust: it may be cut, mixed up, or made to hurt. [`read`] keeps each valid line and
//! counts the others by [`Reason`]; what it returns is valid whatever came in, in both text formats. Work and memory grow with the length
//! of the body, never with its square: lines, series and announced families have upper bounds, and series are found by a keyed hash.
//!
//! `lines` cuts a body, `declarations` knows which line belongs to which family, `sample` takes one apart, `series` finds what came twice,
//! `reader` goes through all, `groups` puts histograms and summaries in order, `coding` compresses, `protobuf` encodes. Sources: the
//! exposition formats of Prometheus (text 0.0.4) and OpenMetrics 1.0.0; Go's `strconv.ParseFloat` for what a number may look like.

pub mod coding;
mod declarations;
mod groups;
mod lines;
pub mod protobuf;
mod reader;
mod sample;
mod series;

#[cfg(test)]
mod tests;

use std::borrow::Cow;
use std::ops::Range;

pub use reader::read;

/// The type of a family, as text 0.0.4 knows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only rises.
    Counter,
    /// Rises and falls.
    Gauge,
    /// Counts by limits.
    Histogram,
    /// Quantiles.
    Summary,
    /// Nobody said.
    Untyped,
}

impl Kind {
    /// Each of them.
    pub const ALL: [Self; 5] = [Self::Counter, Self::Gauge, Self::Histogram, Self::Summary, Self::Untyped];

    /// The word behind `# TYPE name`.
    pub fn word(self) -> &'static str {
        match self {
            Self::Counter => "counter",
            Self::Gauge => "gauge",
            Self::Histogram => "histogram",
            Self::Summary => "summary",
            Self::Untyped => "untyped",
        }
    }
}

/// Why a line was left out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It does not begin with the name of a metric.
    Name,
    /// Its labels are damaged, named twice, or have names that are not allowed.
    Labels,
    /// Its value is none, or none that every parser reads.
    Value,
    /// What follows the value is no point in time.
    Timestamp,
    /// The line is kept, but not the exemplar behind it.
    Exemplar,
    /// Another line has said the same series.
    Duplicate,
    /// The value is that of an unsigned number which went below zero.
    Wrapped,
    /// A counter below zero, or not a number.
    Counter,
    /// A bucket without a valid limit.
    Bucket,
    /// A quantile that is no number from 0 to 1.
    Quantile,
    /// A line that a family of this type cannot have.
    Suffix,
    /// A family whose name is that of another one's lines.
    TypeConflict,
    /// The line is longer than allowed.
    TooLong,
    /// More series or announcements than allowed.
    TooMany,
    /// Bytes that are no UTF-8.
    Utf8,
    /// The body ends within the line.
    NoNewline,
    /// Around the header of a chunk, which someone forgot to take out: values may be cut there.
    Chunk,
    /// An announcement of a type that there is not.
    Type,
    /// A second announcement of a type or help.
    Metadata,
    /// Left out of OpenMetrics alone: of a histogram or summary whose lines contradict each other.
    Incoherent,
}

impl Reason {
    /// How many there are.
    pub const N: usize = 20;
    /// In the order of declaration.
    pub const WORDS: [&'static str; Self::N] = [
        "name",
        "labels",
        "value",
        "timestamp",
        "exemplar",
        "duplicate",
        "wrapped",
        "counter",
        "bucket",
        "quantile",
        "suffix",
        "type_conflict",
        "too_long",
        "too_many",
        "utf8",
        "no_newline",
        "chunk",
        "type",
        "metadata",
        "incoherent",
    ];
}

/// What is asked of the reader.
pub struct Rules<'a> {
    /// Longer lines are left out.
    pub line_bytes_max: usize,
    /// Lines kept; also how many families may be announced.
    pub series_max: usize,
    /// Beginnings of names and what stands in their place.
    pub renames: Vec<(&'a [u8], &'a [u8])>,
    /// Values from here on are unsigned numbers that went below zero.
    pub wrapped_min: f64,
    /// The labels that come first in each line, as they stand there.
    pub block: &'a [u8],
    /// Their names.
    pub names: Vec<&'a [u8]>,
    /// Families whose figures are returned, with the labels whose values go with them.
    pub wanted: Vec<(&'a [u8], Vec<&'a [u8]>)>,
}

/// Values of the labels that were asked for, and the figure.
pub type Figure<'a> = (Vec<Cow<'a, [u8]>>, f64);

/// One family, ready to be sent.
pub struct Family<'a> {
    /// After renaming.
    pub name: Cow<'a, [u8]>,
    /// Its type.
    pub kind: Kind,
    /// With the escapes of text 0.0.4.
    pub help: Cow<'a, [u8]>,
    /// Where its lines are in [`Reading::text`].
    pub text: Range<usize>,
    /// Its lines.
    pub n_series: usize,
    /// The same in OpenMetrics, if that differs.
    pub open_text: Option<Range<usize>>,
    /// None if the family was not asked for.
    pub figures: Option<Vec<Figure<'a>>>,
}

/// What a body held. Families come in the order of their names.
pub struct Reading<'a> {
    /// Those that have lines.
    pub families: Vec<Family<'a>>,
    /// What families point into.
    pub text: Vec<u8>,
    /// Lines kept.
    pub n_series: usize,
    /// By the numbers of [`Reason`].
    pub dropped: [usize; Reason::N],
    /// How many keys were compared to find series and labels named twice: what a test of the bounds counts.
    pub n_comparisons: usize,
}
