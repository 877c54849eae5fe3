//! The errors of the core. Split by who can act: the kernel or a disk, the maker of an archive, or the caller who asked
//! to stop.

use std::fmt;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

/// The result of everything in this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// Why something was not done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Error {
    /// The kernel refused: its errno, and the path or link name it was about if that says more than the call does.
    Os {
        /// What the kernel answered.
        errno: Errno,
        /// The object it was about.
        subject: Option<PathBuf>,
    },
    /// An archive is unsafe, damaged, or over a limit.
    Archive {
        /// The entry's name as the archive has it, empty before the first one.
        entry: Vec<u8>,
        /// One line.
        why: String,
    },
    /// A layer is fine, but cannot be kept as an EROFS index over its archive.
    NotIndexable {
        /// The entry's name as the archive has it, empty if it is about the whole.
        entry: Vec<u8>,
        /// One line.
        why: String,
    },
    /// A ring shared with another process holds what no honest peer writes, or a message does not fit it.
    Ring {
        /// One line.
        why: String,
    },
    /// The caller's progress function asked to stop.
    Stopped,
}

impl Error {
    /// An archive's entry is refused.
    pub fn archive(entry: &[u8], why: impl Into<String>) -> Self {
        Self::Archive { entry: entry.to_vec(), why: why.into() }
    }

    /// An index cannot say this of an entry.
    pub fn not_indexable(why: impl Into<String>) -> Self {
        Self::NotIndexable { entry: Vec::new(), why: why.into() }
    }

    /// A shared ring is damaged.
    pub fn ring(why: impl Into<String>) -> Self {
        Self::Ring { why: why.into() }
    }

    /// Names the object of a kernel error that has none yet.
    #[must_use]
    pub fn about(self, subject: impl AsRef<Path>) -> Self {
        match self {
            Self::Os { errno, subject: None } => Self::Os { errno, subject: Some(subject.as_ref().to_path_buf()) },
            other => other,
        }
    }
}

impl From<Errno> for Error {
    fn from(errno: Errno) -> Self {
        Self::Os { errno, subject: None }
    }
}

impl From<std::io::Error> for Error {
    fn from(error: std::io::Error) -> Self {
        Errno::from_io_error(&error).unwrap_or(Errno::IO).into()
    }
}

impl fmt::Display for Error {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Os { errno, subject: None } => write!(out, "{errno}"),
            Self::Os { errno, subject: Some(subject) } => write!(out, "{errno}: {}", subject.display()),
            Self::Archive { entry, why } | Self::NotIndexable { entry, why } => write!(out, "{}: {why}", String::from_utf8_lossy(entry)),
            Self::Ring { why } => write!(out, "shared ring: {why}"),
            Self::Stopped => write!(out, "stopped by the caller"),
        }
    }
}

impl std::error::Error for Error {}

/// Adds the object to an error on its way up.
pub trait About<T> {
    /// Names what a failure was about.
    fn about(self, subject: impl AsRef<Path>) -> Result<T>;
}

impl<T, E: Into<Error>> About<T> for std::result::Result<T, E> {
    fn about(self, subject: impl AsRef<Path>) -> Result<T> {
        self.map_err(|error| error.into().about(subject))
    }
}
