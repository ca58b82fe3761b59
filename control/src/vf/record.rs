//! What a restarted daemon must know of VFs that are in use: who has which, and what of the PF's filter is ours.
//!
//! One small file per uplink in the runtime directory, whose lifetime is that of the pins: after a reboot there are
//! neither VFs in use nor the file. Written before a VF is opened and after it was cleaned, by the NIC's thread; read
//! once at start. A file that cannot be read is as good as none: VFs that nobody is known to hold are cleaned before
//! they are granted.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sluice_policy::image::{Backing, Backings};
use sluice_policy::net::MacAddr;

/// Where the record of an uplink is kept.
#[derive(Clone, Debug)]
pub struct RecordFile {
    path: PathBuf,
}

/// The record of one uplink.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Where the PF is plugged, as `pci/0000:01:00.0`: an interface of the same name may be another NIC.
    pub device: String,
    /// Interface of the PF.
    #[serde(default)]
    pub netdev: String,
    /// Its driver, device and firmware.
    #[serde(default)]
    pub kind: String,
    /// What it said of itself when it was tried out, by feature, and with how many VFs: it is not tried out again under
    /// VFs that are in use.
    #[serde(default)]
    pub abilities: BTreeMap<String, String>,
    /// How many VFs there were then.
    #[serde(default)]
    pub vfs: u16,
    /// Whether the PF is told address by address what to receive.
    pub is_filtered: bool,
    /// Addresses in the PF's filter that are ours.
    pub filter: BTreeSet<String>,
    /// VFs by the vNIC that holds them.
    pub held: BTreeMap<String, Held>,
}

/// A VF that a vNIC holds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// Its number.
    pub vf: u16,
    /// Its PCI address, if it is a PCI function.
    #[serde(default)]
    pub pci: Option<String>,
    /// Whether the guest uses it.
    pub in_use: bool,
    /// Its representor, in switchdev mode.
    pub representor: Option<String>,
}

impl Record {
    /// The filter's addresses.
    pub fn filter(&self) -> BTreeSet<MacAddr> {
        self.filter.iter().filter_map(|text| text.parse().ok()).collect()
    }

    /// Adds what the record says of a switch to what the engines are told.
    pub fn add_to(&self, switch: &str, backings: &mut Backings) {
        if self.is_filtered {
            backings.filtered_uplinks.insert(switch.to_owned());
        }
        backings.vnics.extend(self.held.iter().map(|(vnic, held)| {
            (vnic.clone(), Backing { representor: held.representor.clone(), in_use: held.in_use })
        }));
    }
}

impl RecordFile {
    /// The record of a switch's uplink, in this directory.
    pub fn new(runtime_dir: &Path, switch: &str) -> RecordFile {
        RecordFile { path: runtime_dir.join(format!("vf-{switch}.json")) }
    }

    /// Switches of which there is a record in this directory.
    pub fn switches(runtime_dir: &Path) -> Vec<String> {
        let entries = fs::read_dir(runtime_dir).into_iter().flatten().flatten();
        entries
            .filter_map(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                Some(name.strip_prefix("vf-")?.strip_suffix(".json")?.to_owned())
            })
            .collect()
    }

    /// Reads it; what is not there or cannot be read is empty.
    pub fn read(&self) -> Record {
        let Ok(text) = fs::read(&self.path) else { return Record::default() };
        serde_json::from_slice(&text).unwrap_or_else(|error| {
            tracing::warn!("{}: {error}; VFs are taken over as if nobody held them", self.path.display());
            Record::default()
        })
    }

    /// Replaces it, whole or not at all.
    ///
    /// # Errors
    /// The file system's.
    pub fn write(&self, record: &Record) -> io::Result<()> {
        if *record == Record::default() {
            return match fs::remove_file(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                _ => Ok(()),
            };
        }
        let text = serde_json::to_vec_pretty(record)?;
        let new = self.path.with_extension("json.new");
        fs::write(&new, text)?;
        fs::rename(&new, &self.path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read_and_nothing_leaves_no_file() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = RecordFile::new(folder.path(), "blue");
        assert_eq!(file.read(), Record::default());
        let mut record = Record { device: "pci/0000:01:00.0".into(), is_filtered: true, ..Record::default() };
        record.filter.insert("02:00:00:00:00:01".into());
        record.held.insert("vm1".into(), Held { vf: 3, in_use: true, ..Held::default() });
        file.write(&record).expect("a tmpfs");
        assert_eq!(file.read(), record);
        let mut backings = Backings::default();
        record.add_to("blue", &mut backings);
        assert!(backings.filtered_uplinks.contains("blue") && backings.vnics["vm1"].in_use);
        assert_eq!(RecordFile::switches(folder.path()), ["blue"]);
        file.write(&Record::default()).expect("a tmpfs");
        assert_eq!(fs::read_dir(folder.path()).expect("a folder").count(), 0);
        fs::write(folder.path().join("vf-blue.json"), "{").expect("a tmpfs");
        assert_eq!(file.read(), Record::default(), "half a file");
    }
}
