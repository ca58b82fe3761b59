//! Where things are: the instance, its directories, and the settings file.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::store;

const PIN_ROOT: &str = "/sys/fs/bpf/sluice";
const RUNTIME_ROOT: &str = "/run/sluice";
const SOCKET_MODE: u32 = 0o600;

/// The settings file.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct Settings {
    pin_dir: Option<PathBuf>,
    runtime_dir: Option<PathBuf>,
    socket_mode: Option<String>,
    log: Option<String>,
}

/// Why the paths cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum PathsError {
    /// A directory or file cannot be used.
    #[error("{operation} {path}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The settings file is wrong.
    #[error("{path}: {problem}")]
    Settings {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        problem: String,
    },
}

/// Directories and settings of one instance.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Paths {
    /// Short hash of the state directory's canonical path.
    pub instance: String,
    /// State directory, canonical.
    pub state_dir: PathBuf,
    /// Runtime directory: on a tmpfs, so that it lives as long as the pins.
    pub runtime_dir: PathBuf,
    /// Pin directory, on a bpffs.
    pub pin_dir: PathBuf,
    /// File permissions of the socket.
    pub socket_mode: u32,
    /// Log filter.
    pub log: Option<String>,
}

impl Paths {
    /// Makes the state directory, and derives the others from it unless the settings file says otherwise.
    ///
    /// # Errors
    /// [`PathsError`].
    pub fn new(state_dir: &Path, settings: Option<&Path>) -> Result<Paths, PathsError> {
        let error = |operation: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source| PathsError::Io { operation, path, source }
        };
        let settings = match settings {
            None => Settings::default(),
            Some(path) => {
                let text = fs::read_to_string(path).map_err(error("reading", path))?;
                read_settings(path, &text)?
            }
        };
        store::make_private(state_dir).map_err(error("making", state_dir))?;
        let state_dir = state_dir.canonicalize().map_err(error("finding", state_dir))?;
        let instance = instance(&state_dir);
        let socket_mode = match &settings.socket_mode {
            None => SOCKET_MODE,
            Some(text) => {
                u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777).ok_or_else(|| {
                    let problem =
                        format!("socketMode `{text}` is not a file mode; write \"0600\" or \"0660\"");
                    PathsError::Settings { path: PathBuf::from("settings"), problem }
                })?
            }
        };
        Ok(Paths {
            runtime_dir: settings.runtime_dir.unwrap_or_else(|| Path::new(RUNTIME_ROOT).join(&instance)),
            pin_dir: settings.pin_dir.unwrap_or_else(|| Path::new(PIN_ROOT).join(&instance)),
            instance,
            state_dir,
            socket_mode,
            log: settings.log,
        })
    }
}

fn read_settings(path: &Path, text: &str) -> Result<Settings, PathsError> {
    let settings: Option<Settings> = serde_yaml_ng::from_str(text)
        .map_err(|error| PathsError::Settings { path: path.to_owned(), problem: error.to_string() })?;
    Ok(settings.unwrap_or_default())
}

/// FNV-1a, 64 bits, of which 48 are used: stable for ever, and no secret is at stake.
fn instance(state_dir: &Path) -> String {
    let hash =
        state_dir.as_os_str().as_encoded_bytes().iter().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
            (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
        });
    format!("{:012x}", hash >> 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn instances_are_stable_and_differ() {
        assert_eq!(instance(Path::new("/var/lib/sluice")), instance(Path::new("/var/lib/sluice")));
        assert_ne!(instance(Path::new("/var/lib/sluice")), instance(Path::new("/var/lib/sluice2")));
        assert_eq!(instance(Path::new("")), "cbf29ce48422");
    }

    #[test]
    fn settings_override_and_unknown_ones_are_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("settings.yaml");
        fs::write(&file, "pinDir: /p\nsocketMode: \"0660\"\n").expect("written");
        let paths = Paths::new(&dir.path().join("state"), Some(&file)).expect("valid");
        assert_eq!((paths.pin_dir.as_path(), paths.socket_mode), (Path::new("/p"), 0o660));
        assert!(paths.runtime_dir.starts_with(RUNTIME_ROOT));
        fs::write(&file, "pinDirs: /p\n").expect("written");
        let error = Paths::new(dir.path(), Some(&file)).expect_err("refused").to_string();
        assert!(error.contains("pinDirs"), "{error}");
    }
}
