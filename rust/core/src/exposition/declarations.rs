//! Which family a line belongs to. All announcements (`# HELP`, `# TYPE`) are known before the first sample is looked at, so that it does
//! not matter where in a body they stand. The first of each kind counts.

use std::borrow::Cow;
use std::collections::HashMap;

use super::sample::regular;
use super::{Kind, Reason, Rules};

/// Of a usual body: a start that saves growing.
const N_FAMILIES: usize = 100;

/// What a line says of its family.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Role {
    /// A value, or one quantile of a summary.
    Value,
    Bucket,
    Sum,
    Count,
}

impl Role {
    pub const N: usize = 4;

    /// What the line's name has behind the family's.
    pub fn suffix(self) -> &'static [u8] {
        match self {
            Self::Value => b"",
            Self::Bucket => b"_bucket",
            Self::Sum => b"_sum",
            Self::Count => b"_count",
        }
    }
}

/// Where lines of one name go.
#[derive(Clone, Copy, Debug)]
pub enum Route {
    To(usize, Role),
    /// A family of its own (`x_count`) has been announced, and one that has such lines (`x`): the announcement before the line decides.
    Either {
        own: (usize, Role),
        base: (usize, Role),
    },
    Nowhere(Reason),
}

/// A family that at least one line may go to.
pub struct Target<'a> {
    pub name: Cow<'a, [u8]>,
    pub kind: Kind,
    pub help: Cow<'a, [u8]>,
}

/// Types of OpenMetrics, of which text 0.0.4 has some.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Announced {
    Plain(Kind),
    Info,
    GaugeHistogram,
}

#[derive(Default)]
struct Declaration<'a> {
    kind: Option<Announced>,
    help: Option<&'a [u8]>,
}

/// What has been announced, and the families that were met.
pub struct Declarations<'a> {
    renames: Vec<(&'a [u8], &'a [u8])>,
    n_max: usize,
    /// The body is in OpenMetrics.
    is_open: bool,
    declared: HashMap<Cow<'a, [u8]>, Declaration<'a>>,
    /// By the name as it came.
    routes: HashMap<&'a [u8], Route>,
    /// The route that was asked for last: that of the next line, most often.
    last: Option<(&'a [u8], Route)>,
    numbers: HashMap<Cow<'a, [u8]>, usize>,
    pub targets: Vec<Target<'a>>,
}

impl<'a> Declarations<'a> {
    pub fn new(rules: &Rules<'a>, is_open: bool) -> Self {
        Self {
            renames: rules.renames.clone(),
            n_max: rules.series_max,
            is_open,
            declared: HashMap::with_capacity(N_FAMILIES),
            routes: HashMap::with_capacity(N_FAMILIES),
            last: None,
            numbers: HashMap::with_capacity(N_FAMILIES),
            targets: Vec::new(),
        }
    }

    fn renamed(&self, name: &'a [u8]) -> Cow<'a, [u8]> {
        for (old, new) in &self.renames {
            if let Some(rest) = name.strip_prefix(*old) {
                return Cow::Owned([new, rest].concat());
            }
        }
        Cow::Borrowed(name)
    }

    fn declare(&mut self, name: &'a [u8]) -> Result<&mut Declaration<'a>, Reason> {
        let name = self.renamed(name);
        if self.declared.len() >= self.n_max && !self.declared.contains_key(&name) {
            return Err(Reason::TooMany);
        }
        Ok(self.declared.entry(name).or_default())
    }

    /// Takes in what a family's help is, as it stands in the line.
    pub fn help(&mut self, name: &'a [u8], text: &'a [u8]) -> Result<(), Reason> {
        let declaration = self.declare(name)?;
        if declaration.help.is_some() {
            return Err(Reason::Metadata);
        }
        declaration.help = Some(text);
        Ok(())
    }

    /// Takes in what a family's type is.
    pub fn kind(&mut self, name: &'a [u8], word: &[u8]) -> Result<(), Reason> {
        let kind = match word {
            b"counter" => Announced::Plain(Kind::Counter),
            b"gauge" | b"stateset" => Announced::Plain(Kind::Gauge),
            b"histogram" => Announced::Plain(Kind::Histogram),
            b"summary" => Announced::Plain(Kind::Summary),
            b"untyped" | b"unknown" => Announced::Plain(Kind::Untyped),
            b"info" => Announced::Info,
            b"gaugehistogram" => Announced::GaugeHistogram,
            _ => return Err(Reason::Type),
        };
        let declaration = self.declare(name)?;
        if declaration.kind.is_some() {
            return Err(Reason::Metadata);
        }
        declaration.kind = Some(kind);
        Ok(())
    }

    /// Returns where a line of this name goes. `context`: the name in the announcement before it.
    pub fn route(&mut self, name: &'a [u8], context: &'a [u8]) -> Result<(usize, Role), Reason> {
        let route = match self.last {
            Some((last, route)) if last == name => route,
            _ => self.routes.get(name).copied().unwrap_or_else(|| self.find(name)),
        };
        self.last = Some((name, route));
        match route {
            Route::To(number, role) => Ok((number, role)),
            Route::Either { own, base } => {
                let is_base = self.renamed(context) == self.targets[base.0].name;
                Ok(if is_base { base } else { own })
            }
            Route::Nowhere(reason) => Err(reason),
        }
    }

    fn find(&mut self, raw: &'a [u8]) -> Route {
        let name = self.renamed(raw);
        let base = self.base(&name);
        let announced = self.declared.get(&name).and_then(|declaration| declaration.kind);
        let route = match (base, announced) {
            (Some(base), None) => base,
            (None, _) => self.own(name, announced),
            (Some(base), Some(_)) => match (base, self.own(name, announced)) {
                (Route::To(base, base_role), Route::To(own, role)) if base != own => {
                    Route::Either { own: (own, role), base: (base, base_role) }
                }
                (Route::To(..), Route::Nowhere(_)) => base,
                (_, own) => own,
            },
        };
        self.routes.insert(raw, route);
        route
    }

    /// The family of the line's very name.
    fn own(&mut self, name: Cow<'a, [u8]>, announced: Option<Announced>) -> Route {
        let kind = match announced {
            Some(Announced::Plain(Kind::Histogram)) => return Route::Nowhere(Reason::Suffix),
            Some(Announced::Plain(kind)) => kind,
            Some(Announced::Info | Announced::GaugeHistogram) => Kind::Gauge,
            None => Kind::Untyped,
        };
        let help = self.help_of(&name);
        Route::To(self.target(name, kind, help), Role::Value)
    }

    /// The family that a line of this name is one part of, or what the types of OpenMetrics that text 0.0.4 lacks make of it.
    fn base(&mut self, name: &[u8]) -> Option<Route> {
        let cut = name.iter().rposition(|byte| *byte == b'_')?;
        let (base, suffix) = name.split_at(cut);
        let announced = self.declared.get(base)?.kind?;
        let (kind, role) = match (announced, suffix) {
            (Announced::Plain(Kind::Histogram), b"_bucket") => (None, Role::Bucket),
            (Announced::Plain(Kind::Histogram | Kind::Summary), b"_sum") => (None, Role::Sum),
            (Announced::Plain(Kind::Histogram | Kind::Summary), b"_count") => (None, Role::Count),
            // OpenMetrics reserves the name beside the family's, and text 0.0.4 has no place for it in the family.
            (Announced::Plain(Kind::Histogram | Kind::Summary), b"_created") => return Some(Route::Nowhere(Reason::Suffix)),
            (Announced::Plain(Kind::Counter), b"_total") => (Some(Kind::Counter), Role::Value),
            (Announced::Plain(Kind::Counter), b"_created")
            | (Announced::Info, b"_info")
            | (Announced::GaugeHistogram, b"_bucket" | b"_gsum" | b"_gcount") => (Some(Kind::Gauge), Role::Value),
            _ => return None,
        };
        let help = Some(self.help_of(name)).filter(|help| !help.is_empty()).unwrap_or_else(|| self.help_of(base));
        let target = match (kind, announced) {
            (Some(kind), _) => self.target(Cow::Owned(name.to_vec()), kind, help),
            (None, Announced::Plain(kind)) => self.target(Cow::Owned(base.to_vec()), kind, self.help_of(base)),
            (None, _) => return None,
        };
        Some(Route::To(target, role))
    }

    fn help_of(&self, name: &[u8]) -> Cow<'a, [u8]> {
        let text = self.declared.get(name).and_then(|declaration| declaration.help).unwrap_or_default();
        if !self.is_open {
            return regular(text, b"\\n");
        }
        // OpenMetrics escapes quotes too, which are plain in text 0.0.4.
        let text = regular(text, b"\\\"n");
        let mut help = Vec::with_capacity(text.len());
        let mut bytes = text.iter();
        while let Some(byte) = bytes.next() {
            match (byte, if *byte == b'\\' { bytes.next() } else { None }) {
                (_, Some(b'"')) => help.push(b'"'),
                (_, Some(next)) => help.extend_from_slice(&[b'\\', *next]),
                _ => help.push(*byte),
            }
        }
        Cow::Owned(help)
    }

    fn target(&mut self, name: Cow<'a, [u8]>, kind: Kind, help: Cow<'a, [u8]>) -> usize {
        let number = self.targets.len();
        *self.numbers.entry(name).or_insert_with_key(|name| {
            self.targets.push(Target { name: name.clone(), kind, help });
            number
        })
    }

    /// Returns the number of the family of this name, if one was met.
    pub fn number(&self, name: &[u8]) -> Option<usize> {
        self.numbers.get(name).copied()
    }
}
