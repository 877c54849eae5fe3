//! One family as the message `io.prometheus.client.MetricFamily`, made of its text. Source: the numbers of fields in `metrics.proto` of
//! Prometheus' client model; the encoding is that of Protocol Buffers.

use super::Kind;
use super::sample::{self, Label};

/// Numbers of fields, by message.
mod field {
    pub mod family {
        pub const NAME: u8 = 1;
        pub const HELP: u8 = 2;
        pub const KIND: u8 = 3;
        pub const METRIC: u8 = 4;
    }
    pub mod metric {
        pub const LABEL: u8 = 1;
        pub const GAUGE: u8 = 2;
        pub const COUNTER: u8 = 3;
        pub const SUMMARY: u8 = 4;
        pub const UNTYPED: u8 = 5;
        pub const TIMESTAMP_MS: u8 = 6;
        pub const HISTOGRAM: u8 = 7;
    }
    /// Of a histogram and a summary: the count, the sum, then buckets or quantiles, whose two fields are the limit and what is there.
    pub const COUNT: u8 = 1;
    pub const SUM: u8 = 2;
    pub const PART: u8 = 3;
    pub const FIRST: u8 = 1;
    pub const SECOND: u8 = 2;
}

/// Encodes a family with its length before it. Lines of `texts` that are none are left out.
pub fn family(name: &[u8], kind: Kind, help: &[u8], texts: &[&[u8]]) -> Vec<u8> {
    let mut message = Vec::new();
    put_bytes(&mut message, field::family::NAME, name);
    put_bytes(&mut message, field::family::HELP, &sample::unescaped(&help.into()));
    put_number(&mut message, field::family::KIND, number(kind));
    for text in texts {
        metrics(&mut message, name, kind, text);
    }
    let mut result = Vec::with_capacity(message.len() + 10);
    put_varint(&mut result, message.len() as u64);
    result.extend_from_slice(&message);
    result
}

fn number(kind: Kind) -> u64 {
    match kind {
        Kind::Counter => 0,
        Kind::Gauge => 1,
        Kind::Summary => 2,
        Kind::Untyped => 3,
        Kind::Histogram => 4,
    }
}

/// A metric in the making: for a histogram or summary, of several lines.
#[derive(Default)]
struct Metric {
    labels: Vec<u8>,
    timestamp: Option<i64>,
    body: Vec<u8>,
}

fn metrics(message: &mut Vec<u8>, name: &[u8], kind: Kind, text: &[u8]) {
    let mut labels = Vec::new();
    let mut open: Option<Metric> = None;
    for line in text.split(|byte| *byte == b'\n') {
        let full_name = sample::metric_name(line);
        let Some(suffix) = full_name.strip_prefix(name) else { continue };
        let Ok(parsed) = sample::parse(&line[full_name.len()..], &mut labels, false) else { continue };
        let limit_name: &[u8] = match kind {
            Kind::Histogram => b"le",
            Kind::Summary => b"quantile",
            _ => b"",
        };
        let encoded = encode_labels(&labels, limit_name);
        let is_same = open.as_ref().is_some_and(|metric| metric.labels == encoded && metric.timestamp == parsed.timestamp);
        if !is_same || limit_name.is_empty() {
            put_metric(message, kind, open.take());
        }
        let metric = open.get_or_insert_with(|| Metric { labels: encoded, timestamp: parsed.timestamp, body: Vec::new() });
        let limit = labels.iter().find(|label| label.name == limit_name).and_then(|label| sample::number(&label.value));
        put_figure(&mut metric.body, kind, suffix, (limit.unwrap_or(f64::NAN), parsed.figure));
    }
    put_metric(message, kind, open);
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "counts are whole numbers from 0 on; others become the nearest"
)]
fn put_figure(body: &mut Vec<u8>, kind: Kind, suffix: &[u8], (limit, figure): (f64, f64)) {
    let mut part = Vec::new();
    match (kind, suffix) {
        (Kind::Histogram | Kind::Summary, b"_sum") => put_double(body, field::SUM, figure),
        (Kind::Histogram | Kind::Summary, b"_count") => put_number(body, field::COUNT, figure as u64),
        (Kind::Histogram, _) => {
            put_number(&mut part, field::FIRST, figure as u64);
            put_double(&mut part, field::SECOND, limit);
            put_bytes(body, field::PART, &part);
        }
        (Kind::Summary, _) => {
            put_double(&mut part, field::FIRST, limit);
            put_double(&mut part, field::SECOND, figure);
            put_bytes(body, field::PART, &part);
        }
        _ => put_double(body, field::FIRST, figure),
    }
}

fn encode_labels(labels: &[Label<'_>], without: &[u8]) -> Vec<u8> {
    let mut result = Vec::new();
    for label in labels.iter().filter(|label| label.name != without) {
        let mut pair = Vec::new();
        put_bytes(&mut pair, field::FIRST, label.name);
        put_bytes(&mut pair, field::SECOND, &sample::unescaped(&label.value));
        put_bytes(&mut result, field::metric::LABEL, &pair);
    }
    result
}

fn put_metric(message: &mut Vec<u8>, kind: Kind, metric: Option<Metric>) {
    let Some(Metric { mut labels, timestamp, body }) = metric else { return };
    let field = match kind {
        Kind::Counter => field::metric::COUNTER,
        Kind::Gauge => field::metric::GAUGE,
        Kind::Histogram => field::metric::HISTOGRAM,
        Kind::Summary => field::metric::SUMMARY,
        Kind::Untyped => field::metric::UNTYPED,
    };
    put_bytes(&mut labels, field, &body);
    if let Some(time) = timestamp {
        put_number(&mut labels, field::metric::TIMESTAMP_MS, u64::from_le_bytes(time.to_le_bytes()));
    }
    put_bytes(message, field::family::METRIC, &labels);
}

fn put_varint(out: &mut Vec<u8>, mut number: u64) {
    while number > 0x7f {
        out.push(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    out.push(number.to_le_bytes()[0]);
}

fn put_number(out: &mut Vec<u8>, field: u8, number: u64) {
    out.push(field << 3);
    put_varint(out, number);
}

fn put_double(out: &mut Vec<u8>, field: u8, number: f64) {
    out.push(field << 3 | 1);
    out.extend_from_slice(&number.to_le_bytes());
}

fn put_bytes(out: &mut Vec<u8>, field: u8, bytes: &[u8]) {
    out.push(field << 3 | 2);
    put_varint(out, bytes.len() as u64);
    out.extend_from_slice(bytes);
}
