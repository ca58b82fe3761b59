//! A copy of the state in the runtime directory, which lives as long as the pins do.
//!
//! The pinned tables are meaningless without the numbers that stand for names in them. If the state directory is
//! deleted while pins live, the daemon takes state and numbers from here and can adopt the tables as they are.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

use prost::Message;
use sluice_proto::v1;

use super::{Entry, IdName, State, StoreError, WorkersWanted, create_private, make_private};
use crate::convert;

const FILE: &str = "state.pb";
const SCHEMA: u32 = 1;

/// The copy.
#[derive(Debug)]
pub struct RuntimeCopy {
    path: PathBuf,
}

impl RuntimeCopy {
    /// The copy in this directory.
    pub fn new(runtime_dir: &Path) -> RuntimeCopy {
        RuntimeCopy { path: runtime_dir.join(FILE) }
    }

    /// Whether there is one.
    pub fn exists(&self) -> bool {
        self.path.exists()
    }

    /// Replaces it, in one step.
    ///
    /// # Errors
    /// If it cannot be written; what was there before stays.
    pub fn write(&self, state: &State) -> Result<(), StoreError> {
        let snapshot = v1::Snapshot {
            schema: SCHEMA,
            revision: state.revision,
            resources: state
                .resources
                .values()
                .map(|entry| convert::resource(&entry.spec, entry.revision))
                .collect(),
            ids: state
                .id_names()
                .map(|IdName { space, name, id }| v1::IdEntry {
                    space: space.to_owned(),
                    name: name.to_owned(),
                    id,
                })
                .collect(),
            workers: Some(state.workers.to_message()),
        };
        let bytes = snapshot.encode_to_vec();
        let temporary = self.path.with_extension("new");
        if let Some(dir) = self.path.parent() {
            make_private(dir).map_err(StoreError::io("making", dir))?;
        }
        let write = || {
            let mut file = create_private(&temporary)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &self.path)
        };
        write().map_err(StoreError::io("writing", &self.path))
    }

    /// Reads it; `None` if there is none.
    ///
    /// # Errors
    /// If it is there but cannot be read.
    pub fn read(&self) -> Result<Option<State>, StoreError> {
        let bytes = match fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(StoreError::io("reading", &self.path)(error)),
        };
        let entry_error = |entry: &str, problem: String| StoreError::Entry {
            path: self.path.clone(),
            entry: entry.to_owned(),
            problem,
        };
        let snapshot =
            v1::Snapshot::decode(bytes.as_slice()).map_err(|error| entry_error("all", error.to_string()))?;
        if snapshot.schema > SCHEMA {
            return Err(StoreError::NewerSchema { path: self.path.clone(), found: snapshot.schema.into() });
        }
        let mut state = State { revision: snapshot.revision, ..State::default() };
        for message in &snapshot.resources {
            let spec = convert::spec(message)
                .map_err(|violations| entry_error(&violations[0].resource, violations[0].message.clone()))?;
            state.resources.insert(spec.key(), Entry { revision: message.revision, spec: spec.into() });
        }
        state.workers = WorkersWanted::of_message(snapshot.workers.unwrap_or_default());
        for id in snapshot.ids {
            state.set_id(&id.space, id.name, id.id);
        }
        Ok(Some(state))
    }
}
