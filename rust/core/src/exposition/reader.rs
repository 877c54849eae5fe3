//! The way through a body: announcements first, then samples, then the families in order.

use std::ops::Range;

use memchr::memchr_iter;

use super::declarations::{Declarations, Role, Target};
use super::groups::{self, Form};
use super::lines::{Announcement, Lines, Tear, is_open_metrics};
use super::sample::{self, EXPORTED, Label, Sample};
use super::series::Series;
use super::{Family, Figure, Kind, Reading, Reason, Rules};

/// How the names of limits of processes end, of which 2^64 - 1 is no wrapped number: it says that there is none.
const UNLIMITED: [&[u8]; 2] = [b"_max_bytes", b"_max_fds"];

/// A line that is kept, in the text that is written.
#[derive(Clone)]
pub(super) struct Kept {
    pub family: usize,
    pub role: Role,
    pub start: usize,
    /// Behind the value.
    pub value_end: usize,
    /// Behind the newline.
    pub end: usize,
    pub figure: f64,
    /// Of a bucket or quantile.
    pub limit: f64,
    /// Which lines of a histogram or summary belong together.
    pub group: usize,
    pub timestamp: Option<i64>,
    /// As OpenMetrics has it, without what separates it from the value.
    pub exemplar: Option<Box<[u8]>>,
}

/// Reads one body.
pub fn read<'a>(body: &'a [u8], rules: &Rules<'a>) -> Reading<'a> {
    let body = body.strip_prefix(b"\xef\xbb\xbf").unwrap_or(body);
    let mut reader = Reader::new(body, rules);
    reader.read_announcements();
    reader.read_samples();
    reader.finish()
}

struct Reader<'a, 'r> {
    body: &'a [u8],
    rules: &'r Rules<'a>,
    is_utf8: bool,
    /// Timestamps are in seconds.
    is_open: bool,
    declarations: Declarations<'a>,
    series: Series,
    groups: Series,
    labels: Vec<Label<'a>>,
    order: Vec<usize>,
    key: Vec<u8>,
    kept: Vec<Kept>,
    text: Vec<u8>,
    /// By family: which of those asked for it is, and its figures.
    figures: Vec<Option<(usize, Vec<Figure<'a>>)>>,
    dropped: [usize; Reason::N],
    n_comparisons: usize,
}

impl<'a, 'r> Reader<'a, 'r> {
    fn new(body: &'a [u8], rules: &'r Rules<'a>) -> Self {
        let n_lines = memchr_iter(b'\n', body).take(rules.series_max).count();
        Self {
            body,
            rules,
            is_utf8: std::str::from_utf8(body).is_ok(),
            is_open: is_open_metrics(body),
            declarations: Declarations::new(rules, is_open_metrics(body)),
            series: Series::new(body.len(), n_lines),
            groups: Series::new(0, 0),
            labels: Vec::new(),
            order: Vec::new(),
            key: Vec::new(),
            kept: Vec::with_capacity(n_lines),
            text: Vec::with_capacity(body.len() + n_lines * (rules.block.len() + 3)),
            figures: Vec::new(),
            dropped: [0; Reason::N],
            n_comparisons: 0,
        }
    }

    fn drop_line(&mut self, reason: Reason) {
        self.dropped[reason as usize] += 1;
    }

    fn read_announcements(&mut self) {
        for line in Lines::new(self.body).filter(|line| line.is_whole && line.text.len() <= self.rules.line_bytes_max) {
            let Some(announcement) = Announcement::parse(line.text) else { continue };
            let done = match announcement {
                _ if !self.is_utf8 && std::str::from_utf8(line.text).is_err() => Err(Reason::Utf8),
                Announcement { name: b"", .. } => Err(Reason::Name),
                Announcement { is_type: true, name, rest } => self.declarations.kind(name, rest.trim_ascii_end()),
                Announcement { is_type: false, name, rest } => self.declarations.help(name, rest),
            };
            if let Err(reason) = done {
                self.drop_line(reason);
            }
        }
    }

    fn read_samples(&mut self) {
        let mut context: &[u8] = b"";
        let mut tear = Tear::new(self.body);
        let mut lines = Lines::new(self.body).peekable();
        while let Some(line) = lines.next() {
            if tear.touches(&line, lines.peek()) {
                if !line.text.is_empty() {
                    self.drop_line(Reason::Chunk);
                }
                continue;
            }
            let text = sample::skip_blanks(line.text);
            let Some(first) = text.first() else { continue };
            let announcement = if *first == b'#' { Announcement::parse(text) } else { None };
            if *first == b'#' && announcement.is_none() {
                continue; // a comment
            }
            let done = if line.text.len() > self.rules.line_bytes_max {
                Err(Reason::TooLong)
            } else if !line.is_whole {
                Err(Reason::NoNewline)
            } else if let Some(announcement) = announcement {
                context = announcement.name;
                Ok(())
            } else {
                self.read_sample(text, context)
            };
            if let Err(reason) = done {
                self.drop_line(reason);
            }
        }
    }

    fn read_sample(&mut self, line: &'a [u8], context: &'a [u8]) -> Result<(), Reason> {
        if self.kept.len() >= self.rules.series_max {
            return Err(Reason::TooMany);
        }
        let name = sample::metric_name(line);
        if name.is_empty() {
            return Err(Reason::Name);
        }
        if !self.is_utf8 && std::str::from_utf8(line).is_err() {
            return Err(Reason::Utf8);
        }
        let parsed = sample::parse(&line[name.len()..], &mut self.labels, self.is_open)?;
        let is_limit = UNLIMITED.iter().any(|end| name.ends_with(end));
        if parsed.figure >= self.rules.wrapped_min && parsed.figure.is_finite() && !is_limit {
            return Err(Reason::Wrapped);
        }
        let (family, role) = self.declarations.route(name, context)?;
        let kind = self.declarations.targets[family].kind;
        let limit = check(kind, role, parsed.figure, &mut self.labels)?;
        self.sort_labels()?;
        self.make_key(b"");
        if !self.series.add(family * Role::N + role as usize, &self.key).1 {
            return Err(Reason::Duplicate);
        }
        let group = match kind {
            Kind::Histogram => self.group(family, b"le"),
            Kind::Summary => self.group(family, b"quantile"),
            _ => 0,
        };
        let exemplar = parsed.exemplar.and_then(|text| self.read_exemplar(text, family, role));
        self.note_figure(family, role, parsed.figure);
        let Sample { figure, timestamp, value, .. } = parsed;
        self.write(value, Kept { family, role, start: 0, value_end: 0, end: 0, figure, limit, group, timestamp, exemplar });
        Ok(())
    }

    /// Orders the labels by the names they are written with, and gives those that are also ours another one.
    fn sort_labels(&mut self) -> Result<(), Reason> {
        let Self { labels, order, n_comparisons, .. } = self;
        order.clear();
        order.extend(0..labels.len());
        let mut sort = |labels: &[Label<'a>]| {
            order.sort_unstable_by(|a, b| {
                *n_comparisons += 1;
                match (&labels[*a], &labels[*b]) {
                    (a, b) if a.n_exported + b.n_exported == 0 => a.name.cmp(b.name),
                    (a, b) => a.full_name().cmp(&b.full_name()),
                }
            });
            order.windows(2).any(|pair| labels[pair[0]].name == labels[pair[1]].name)
        };
        if labels.len() > 1 && sort(labels) {
            return Err(Reason::Labels);
        }
        if !labels.iter().any(|label| self.rules.names.contains(&label.name)) {
            return Ok(());
        }
        for number in 0..labels.len() {
            if self.rules.names.contains(&labels[number].name) {
                let n_exported = free_prefixes(labels, labels[number].name, &self.rules.names);
                labels[number].n_exported = n_exported;
            }
        }
        sort(labels);
        Ok(())
    }

    /// Makes the key of the line's series, or of its group: labels without a value are as good as none.
    fn make_key(&mut self, without: &[u8]) {
        self.key.clear();
        for number in &self.order {
            let label = &self.labels[*number];
            if !label.value.is_empty() && label.name != without {
                label.write(&mut self.key);
                self.key.push(b',');
            }
        }
    }

    fn group(&mut self, family: usize, without: &[u8]) -> usize {
        self.make_key(without);
        self.groups.add(family, &self.key).0
    }

    fn read_exemplar(&mut self, text: &[u8], family: usize, role: Role) -> Option<Box<[u8]>> {
        let target = &self.declarations.targets[family];
        let is_allowed =
            role == Role::Bucket || (target.kind == Kind::Counter && target.name.ends_with(b"_total") && target.name.len() > 6);
        let exemplar = is_allowed.then(|| groups::exemplar(text)).flatten();
        if exemplar.is_none() {
            self.drop_line(Reason::Exemplar);
        }
        exemplar
    }

    fn note_figure(&mut self, family: usize, role: Role, figure: f64) {
        while self.figures.len() <= family {
            let name = &self.declarations.targets[self.figures.len()].name;
            let number = self.rules.wanted.iter().position(|(wanted, _)| *wanted == name.as_ref());
            self.figures.push(number.map(|number| (number, Vec::new())));
        }
        if let (Some((number, figures)), Role::Value) = (&mut self.figures[family], role) {
            let value = |name: &&[u8]| self.labels.iter().find(|label| label.name == *name).map(|label| sample::unescaped(&label.value));
            let (_, names) = &self.rules.wanted[*number];
            figures.push((names.iter().map(|name| value(name).unwrap_or_default()).collect(), figure));
        }
    }

    fn write(&mut self, value: &[u8], kept: Kept) {
        let text = &mut self.text;
        let start = text.len();
        let family = &self.declarations.targets[kept.family];
        text.extend_from_slice(&family.name);
        text.extend_from_slice(kept.role.suffix());
        if !self.rules.block.is_empty() || !self.labels.is_empty() {
            text.push(b'{');
            text.extend_from_slice(self.rules.block);
            let mut separate = !self.rules.block.is_empty();
            for label in &self.labels {
                if std::mem::replace(&mut separate, true) {
                    text.push(b',');
                }
                label.write(text);
            }
            text.push(b'}');
        }
        text.push(b' ');
        text.extend_from_slice(value);
        let value_end = text.len();
        if let Some(time) = kept.timestamp {
            text.push(b' ');
            text.extend_from_slice(time.to_string().as_bytes());
        }
        text.push(b'\n');
        self.kept.push(Kept { start, value_end, end: text.len(), ..kept });
    }

    fn finish(mut self) -> Reading<'a> {
        let mut members = vec![Vec::new(); self.declarations.targets.len()];
        for (number, line) in self.kept.iter().enumerate() {
            members[line.family].push(number);
        }
        self.drop_clashes(&mut members);
        let mut order: Vec<usize> = (0..members.len()).filter(|family| !members[*family].is_empty()).collect();
        let targets = &self.declarations.targets;
        order.sort_unstable_by(|a, b| targets[*a].name.cmp(&targets[*b].name));
        let has_lines: Vec<bool> = members.iter().map(|lines| !lines.is_empty()).collect();
        let families: Vec<_> =
            order.into_iter().map(|family| self.finish_family(family, std::mem::take(&mut members[family]), &has_lines)).collect();
        Reading {
            n_series: families.iter().map(|family| family.n_series).sum(),
            families,
            text: self.text,
            dropped: self.dropped,
            n_comparisons: self.n_comparisons + self.series.n_comparisons + self.groups.n_comparisons,
        }
    }

    /// Empties families whose names are those of lines in a histogram or summary: side by side they would be one for who reads them.
    fn drop_clashes(&mut self, members: &mut [Vec<usize>]) {
        let suffixes: [&[u8]; 4] = [b"_bucket", b"_sum", b"_count", b"_created"];
        for family in 0..members.len() {
            let Target { name, kind, .. } = &self.declarations.targets[family];
            let first = match kind {
                Kind::Histogram => 0,
                Kind::Summary => 1,
                _ => continue,
            };
            if members[family].is_empty() {
                continue;
            }
            for suffix in &suffixes[first..] {
                if let Some(other) = self.declarations.number(&[name.as_ref(), suffix].concat()) {
                    self.dropped[Reason::TypeConflict as usize] += members[other].len();
                    members[other].clear();
                }
            }
        }
    }

    fn finish_family(&mut self, number: usize, mut lines: Vec<usize>, has_lines: &[bool]) -> Family<'a> {
        let Target { name, kind, help } = &mut self.declarations.targets[number];
        let (name, kind, help) = (name.clone(), *kind, std::mem::take(help));
        let mut forms = vec![Form::Same; lines.len()];
        if matches!(kind, Kind::Histogram | Kind::Summary) {
            groups::arrange(&self.kept, &mut lines);
            forms = groups::forms(&self.kept, &lines, kind);
            self.dropped[Reason::Incoherent as usize] += forms.iter().filter(|form| **form == Form::Left).count();
        }
        // OpenMetrics takes `_total` off the family's name; where that is taken, the family goes without a type, and so without exemplars.
        let is_taken = |suffix: &[u8]| {
            let base = name.strip_suffix(b"_total").map(|base| [base, suffix].concat());
            base.and_then(|base| self.declarations.number(&base)).is_some_and(|other| has_lines[other])
        };
        let with_exemplars = kind == Kind::Histogram || !(is_taken(b"") || is_taken(b"_created"));
        let text = self.join(&lines);
        let is_same = |(number, form): (&usize, &Form)| {
            let line = &self.kept[*number];
            *form == Form::Same && line.timestamp.is_none() && (line.exemplar.is_none() || !with_exemplars)
        };
        let open_text = (!lines.iter().zip(&forms).all(is_same)).then(|| self.join_open(&lines, &forms, with_exemplars));
        let figures = self.figures.get_mut(number).and_then(Option::take).map(|(_, figures)| figures);
        Family { name, kind, help, text, n_series: lines.len(), open_text, figures }
    }

    /// Returns where lines stand one behind another; where they do not, they are put so at the end.
    fn join(&mut self, lines: &[usize]) -> Range<usize> {
        if lines.windows(2).all(|pair| self.kept[pair[0]].end == self.kept[pair[1]].start) {
            return self.kept[lines[0]].start..self.kept[lines[lines.len() - 1]].end;
        }
        let start = self.text.len();
        for number in lines {
            let line = &self.kept[*number];
            self.text.extend_from_within(line.start..line.end);
        }
        start..self.text.len()
    }

    fn join_open(&mut self, lines: &[usize], forms: &[Form], with_exemplars: bool) -> Range<usize> {
        let start = self.text.len();
        for (number, form) in lines.iter().zip(forms) {
            if *form == Form::Left {
                continue;
            }
            let line = &self.kept[*number];
            self.text.extend_from_within(line.start..line.value_end);
            if let Some(time) = line.timestamp.filter(|_| *form == Form::Same) {
                let sign = if time < 0 { "-" } else { "" };
                let (seconds, rest) = (time.unsigned_abs() / 1000, time.unsigned_abs() % 1000);
                self.text.extend_from_slice(format!(" {sign}{seconds}.{rest:03}").as_bytes());
            }
            if let Some(exemplar) = line.exemplar.as_ref().filter(|_| with_exemplars) {
                self.text.extend_from_slice(b" # ");
                self.text.extend_from_slice(exemplar);
            }
            self.text.push(b'\n');
        }
        start..self.text.len()
    }
}

/// Refuses a line that its family cannot have. Returns the limit of a bucket or quantile, whose spelling is mended.
fn check(kind: Kind, role: Role, figure: f64, labels: &mut [Label<'_>]) -> Result<f64, Reason> {
    let (name, reason): (&[u8], _) = match kind {
        Kind::Counter if figure.is_nan() || figure < 0.0 => return Err(Reason::Counter),
        Kind::Histogram => (b"le", Reason::Bucket),
        Kind::Summary => (b"quantile", Reason::Quantile),
        _ => return Ok(0.0),
    };
    if matches!(role, Role::Bucket | Role::Count) && !(figure >= 0.0 && figure.is_finite() && figure.fract() == 0.0) {
        return Err(Reason::Value);
    }
    let label = labels.iter_mut().find(|label| label.name == name);
    if matches!(role, Role::Sum | Role::Count) {
        return if label.is_none() { Ok(0.0) } else { Err(reason) };
    }
    let label = label.ok_or(reason)?;
    let limit = sample::number(&label.value).ok_or(reason)?;
    let is_valid = if role == Role::Bucket { !limit.is_nan() } else { (0.0..=1.0).contains(&limit) };
    if limit.is_infinite() {
        label.value = sample::spelling(b"", limit).to_vec().into();
    }
    if is_valid { Ok(limit) } else { Err(reason) }
}

/// Returns how many prefixes make a name one that neither we nor the line has.
fn free_prefixes(labels: &[Label<'_>], name: &[u8], ours: &[&[u8]]) -> usize {
    let mut tried = EXPORTED.to_vec();
    tried.extend_from_slice(name);
    let mut n = 1;
    while ours.contains(&tried.as_slice()) || labels.iter().any(|label| label.full_name() == tried) {
        tried.splice(0..0, EXPORTED.iter().copied());
        n += 1;
    }
    n
}
