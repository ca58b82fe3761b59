//! Reading files that may be missing, forbidden, garbled, or gone the next moment: each reading says which.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use nix::errno::Errno;

/// What one question to the host gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reading<T> {
    /// This.
    Known(T),
    /// There is no such thing: the file, the link or the device is not there, or the kernel does not have it.
    Absent,
    /// It cannot be told.
    Unknown(Why),
}

/// Why something cannot be told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Why {
    /// The process may not read it.
    Denied,
    /// What stands there makes no sense; the beginning of it.
    Garbled(String),
    /// Reading failed with this error number (errno(3)).
    Failed(i32),
    /// Nothing on this kind of machine tells it.
    NotTold,
    /// It was not asked: files alone do not tell it.
    NotAsked,
}

impl fmt::Display for Why {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Why::Denied => f.write_str("this process may not read it"),
            Why::Garbled(text) => write!(f, "it reads `{}`", text.escape_debug()),
            Why::Failed(number) => write!(f, "reading it failed: {}", Errno::from_raw(*number).desc()),
            Why::NotTold => f.write_str("nothing on this machine tells it"),
            Why::NotAsked => f.write_str("it was not asked for"),
        }
    }
}

/// How much of a file of one value is read, in bytes.
const VALUE: u64 = 4096;
/// How much of a long file is read, in bytes: `/proc/interrupts` of a machine with hundreds of CPUs has megabytes.
const LONG: u64 = 16 << 20;
/// How much of what makes no sense is kept, in characters.
const SHOWN: usize = 40;
/// How many entries of a folder are read.
const ENTRIES: usize = 4096;

impl<T> Reading<T> {
    /// What is known.
    pub fn known(&self) -> Option<&T> {
        match self {
            Reading::Known(value) => Some(value),
            Reading::Absent | Reading::Unknown(_) => None,
        }
    }

    /// Whether there is certainly no such thing.
    pub fn is_absent(&self) -> bool {
        matches!(self, Reading::Absent)
    }

    /// Goes on with what is known.
    pub fn and_then<U>(self, next: impl FnOnce(T) -> Reading<U>) -> Reading<U> {
        match self {
            Reading::Known(value) => next(value),
            Reading::Absent => Reading::Absent,
            Reading::Unknown(why) => Reading::Unknown(why),
        }
    }

    /// Changes what is known.
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Reading<U> {
        self.and_then(|value| Reading::Known(change(value)))
    }
}

impl<T> From<io::Error> for Reading<T> {
    fn from(error: io::Error) -> Self {
        let number = error.raw_os_error().unwrap_or(0);
        match Errno::from_raw(number) {
            Errno::ENOENT | Errno::ENOTDIR => Reading::Absent,
            Errno::EACCES | Errno::EPERM => Reading::Unknown(Why::Denied),
            _ => Reading::Unknown(Why::Failed(number)),
        }
    }
}

impl<T> From<io::Result<T>> for Reading<T> {
    fn from(result: io::Result<T>) -> Self {
        match result {
            Ok(value) => Reading::Known(value),
            Err(error) => error.into(),
        }
    }
}

/// Reads of what makes no sense.
pub(super) fn garbled<T>(text: &str) -> Reading<T> {
    Reading::Unknown(Why::Garbled(text.chars().take(SHOWN).collect()))
}

/// A file's bytes, as far as they are few.
pub(super) fn bytes(path: &Path) -> Reading<Vec<u8>> {
    limited(path, VALUE).into()
}

/// A file of one value.
pub(super) fn text(path: &Path) -> Reading<String> {
    bytes(path).map(|bytes| String::from_utf8_lossy(&bytes).trim().to_owned())
}

/// A file of many lines.
pub(super) fn long_text(path: &Path) -> Reading<String> {
    Reading::from(limited(path, LONG)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// A file of one number, or of anything else that can be parsed.
pub(super) fn parsed<T: FromStr>(path: &Path) -> Reading<T> {
    text(path).and_then(|text| match text.parse() {
        Ok(value) => Reading::Known(value),
        Err(_) => garbled(&text),
    })
}

/// A file of a switch: `1`, `0`, `Y` or `N`.
pub(super) fn flag(path: &Path) -> Reading<bool> {
    text(path).and_then(|text| match text.as_str() {
        "1" | "Y" | "y" => Reading::Known(true),
        "0" | "N" | "n" => Reading::Known(false),
        _ => garbled(&text),
    })
}

/// Where a link leads.
pub(super) fn target(path: &Path) -> Reading<PathBuf> {
    fs::canonicalize(path).into()
}

/// The last name of where a link leads: a driver, a bus, a group.
pub(super) fn target_name(path: &Path) -> Reading<String> {
    target(path).map(|path| name(&path))
}

/// The names in a folder, in order.
pub(super) fn names(path: &Path) -> Reading<Vec<String>> {
    Reading::from(fs::read_dir(path)).map(|entries| {
        let names = entries.take(ENTRIES).flatten().map(|entry| entry.file_name());
        let mut names: Vec<String> = names.map(|name| name.to_string_lossy().into_owned()).collect();
        names.sort();
        names
    })
}

/// The last name of a path.
pub(super) fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn limited(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    File::open(path)?.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_fail_is_told_apart() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = |name: &str| folder.path().join(name);
        fs::write(path("seven"), " 7\n").expect("a file");
        fs::write(path("words"), vec![0xff; 9000]).expect("a file");
        assert_eq!(parsed::<u16>(&path("seven")), Reading::Known(7));
        assert_eq!(parsed::<u16>(&path("none")), Reading::Absent);
        assert_eq!(parsed::<u16>(&path("seven/below")), Reading::Absent);
        let Reading::Unknown(Why::Garbled(shown)) = parsed::<u16>(&path("words")) else {
            panic!("that is no number")
        };
        assert_eq!(shown.chars().count(), SHOWN);
        assert_eq!(text(folder.path()), Reading::Unknown(Why::Failed(Errno::EISDIR as i32)));
        let denied = io::Error::from_raw_os_error(Errno::EACCES as i32);
        assert_eq!(Reading::<()>::from(denied), Reading::Unknown(Why::Denied));
        let gone = io::Error::from_raw_os_error(Errno::ENODEV as i32);
        assert_eq!(Reading::<()>::from(gone), Reading::Unknown(Why::Failed(Errno::ENODEV as i32)));
        assert_eq!(flag(&path("seven")), garbled("7"));
        assert_eq!(target_name(&path("none")), Reading::Absent);
        assert_eq!(names(&path("none")), Reading::Absent);
        assert_eq!(names(folder.path()), Reading::Known(vec!["seven".to_owned(), "words".to_owned()]));
    }
}
