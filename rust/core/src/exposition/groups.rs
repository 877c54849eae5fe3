//! Histograms and summaries: their lines are put in order, and what OpenMetrics would refuse of them is found. Exemplars, too.

use super::Kind;
use super::declarations::Role;
use super::reader::Kept;
use super::sample;

/// How a line stands in OpenMetrics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Form {
    Same,
    /// Without its timestamp, which the others of its group do not share.
    Timeless,
    Left,
}

/// The characters of an exemplar's labels may be that many.
const EXEMPLAR_CHARACTERS_MAX: usize = 128;

/// Puts lines one group behind another, in the order in which groups came first: buckets or quantiles by their limits, sum, count.
pub(super) fn arrange(kept: &[Kept], lines: &mut [usize]) {
    lines.sort_by(|a, b| {
        let (a, b) = (&kept[*a], &kept[*b]);
        (a.group, a.role).cmp(&(b.group, b.role)).then(a.limit.total_cmp(&b.limit))
    });
}

/// Returns how each of a family's arranged lines stands in OpenMetrics.
pub(super) fn forms(kept: &[Kept], lines: &[usize], kind: Kind) -> Vec<Form> {
    let mut forms = Vec::with_capacity(lines.len());
    for group in lines.chunk_by(|a, b| kept[*a].group == kept[*b].group) {
        let group: Vec<&Kept> = group.iter().map(|number| &kept[*number]).collect();
        let is_coherent = if kind == Kind::Histogram { is_histogram(&group) } else { is_summary(&group) };
        let form = match is_coherent {
            false => Form::Left,
            true if group.iter().any(|line| line.timestamp != group[0].timestamp) => Form::Timeless,
            true => Form::Same,
        };
        forms.extend(std::iter::repeat_n(form, group.len()));
    }
    forms
}

fn figure(group: &[&Kept], role: Role) -> Option<f64> {
    group.iter().find(|line| line.role == role).map(|line| line.figure)
}

/// Whether buckets rise up to one without limit, and sum and count are both there or not and fit them.
fn is_histogram(group: &[&Kept]) -> bool {
    let buckets: Vec<&&Kept> = group.iter().filter(|line| line.role == Role::Bucket).collect();
    let (Some(first), Some(last)) = (buckets.first(), buckets.last()) else { return false };
    let rises = buckets.windows(2).all(|pair| pair[0].limit < pair[1].limit && pair[0].figure <= pair[1].figure);
    let fits = match (figure(group, Role::Sum), figure(group, Role::Count)) {
        (None, None) => true,
        #[expect(clippy::float_cmp, reason = "counts are whole numbers")]
        (Some(sum), Some(count)) => sum >= 0.0 && first.limit >= 0.0 && count == last.figure,
        _ => false,
    };
    rises && fits && last.limit == f64::INFINITY
}

/// Whether nothing that only grows is below zero.
fn is_summary(group: &[&Kept]) -> bool {
    group.iter().all(|line| match line.role {
        Role::Sum => line.figure >= 0.0,
        _ => line.figure.is_nan() || line.figure >= 0.0,
    })
}

/// Returns the exemplar behind a line's `#` as OpenMetrics has it, None if it has none that every parser reads.
///
/// Quotes in its labels are such: the parser in Python's client counts them without looking at escapes.
pub(super) fn exemplar(text: &[u8]) -> Option<Box<[u8]>> {
    let mut labels = Vec::new();
    let rest = sample::parse_labels(sample::skip_blanks(text).strip_prefix(b"{")?, &mut labels).ok()?;
    let mut names: Vec<&[u8]> = labels.iter().map(|label| label.name).collect();
    names.sort_unstable();
    let n_characters: usize =
        labels.iter().map(|label| label.name.len() + String::from_utf8_lossy(&sample::unescaped(&label.value)).chars().count()).sum();
    if names.windows(2).any(|pair| pair[0] == pair[1]) || n_characters > EXEMPLAR_CHARACTERS_MAX {
        return None;
    }
    if labels.iter().any(|label| label.value.contains(&b'"')) {
        return None;
    }
    let (value, rest) = sample::token(sample::skip_blanks(rest));
    let figure = sample::number(value)?;
    let (time, rest) = sample::token(rest);
    if !rest.is_empty() || (!time.is_empty() && !sample::number(time)?.is_finite()) {
        return None;
    }
    let mut result = vec![b'{'];
    for (number, label) in labels.iter().enumerate() {
        if number > 0 {
            result.push(b',');
        }
        label.write(&mut result);
    }
    result.extend_from_slice(b"} ");
    result.extend_from_slice(sample::spelling(value, figure));
    if !time.is_empty() {
        result.push(b' ');
        result.extend_from_slice(time);
    }
    Some(result.into())
}
