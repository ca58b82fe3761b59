//! The desired state on disk: one redb file, one durable transaction per change.
//!
//! Besides the specs, the file keeps the numbers that stand for names in the tables (a restarted daemon must give the
//! same numbers, or it could not adopt what is pinned), the revision, and the audit log. After each commit the same
//! state is copied to a runtime directory whose lifetime is that of the pins; see [`RuntimeCopy`]. Values are messages of
//! the protocol, so that a newer daemon reads what an older one wrote.
//!
//! Owned by the reconciler's thread. A lock on both directories keeps a second daemon out.

mod lock;
mod runtime_copy;
mod state;

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use prost::Message;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition};
use sluice_proto::v1;

use crate::convert;
use crate::resource::Key;
use lock::DirLock;
pub use runtime_copy::RuntimeCopy;
pub use state::{Entry, IdName, State};

const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const RESOURCES: TableDefinition<&str, &[u8]> = TableDefinition::new("resources");
const IDS: TableDefinition<(&str, &str), u32> = TableDefinition::new("ids");
const AUDIT: TableDefinition<u64, &[u8]> = TableDefinition::new("audit");

/// Version of the meaning of the tables above.
const SCHEMA: u64 = 1;
/// Entries of the audit log that are kept.
const AUDIT_MAX: u64 = 10_000;
/// Name of the file in the state directory.
const FILE: &str = "sluice.redb";

/// Why the store cannot be opened or written.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Another daemon has it.
    #[error(
        "{dir} is in use by another sluiced ({holder}); stop that one, or give this one another --state-dir"
    )]
    Locked {
        /// The directory.
        dir: PathBuf,
        /// Who holds the lock.
        holder: String,
    },
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
    /// The database says no.
    #[error(
        "state file {path}: {source}; if it is damaged, move it away and start again: the state is then recovered from the runtime directory, if it is still there"
    )]
    Database {
        /// The file.
        path: PathBuf,
        /// Its reason.
        source: Box<redb::Error>,
    },
    /// Made by a newer version.
    #[error(
        "state file {path} has schema {found}, this sluiced knows schemas up to {SCHEMA}: use a newer one"
    )]
    NewerSchema {
        /// The file.
        path: PathBuf,
        /// Its schema.
        found: u64,
    },
    /// An entry cannot be read.
    #[error("state file {path}: entry {entry} cannot be read: {problem}")]
    Entry {
        /// The file.
        path: PathBuf,
        /// Which entry.
        entry: String,
        /// What is wrong.
        problem: String,
    },
}

impl StoreError {
    fn io(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StoreError {
        let path = path.to_owned();
        move |source| StoreError::Io { operation, path, source }
    }
}

/// Where the state came from when the store was opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The state directory, as it should be.
    StateDir,
    /// The state directory had none, but the runtime directory did.
    RuntimeCopy,
    /// There was none anywhere: a first start, or both were deleted.
    Nowhere,
}

/// The store.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    database: Database,
    /// Device and inode of the file, to notice that it was deleted under us.
    identity: (u64, u64),
    copy: RuntimeCopy,
    _locks: [DirLock; 2],
}

impl Store {
    /// Opens or makes the store, and reads the state.
    ///
    /// # Errors
    /// [`StoreError::Locked`] if another daemon has it; others if it cannot be read.
    pub fn open(state_dir: &Path, runtime_dir: &Path) -> Result<(Store, State, Origin), StoreError> {
        for dir in [state_dir, runtime_dir] {
            make_private(dir).map_err(StoreError::io("making", dir))?;
        }
        let locks = [DirLock::take(state_dir)?, DirLock::take(runtime_dir)?];
        let path = state_dir.join(FILE);
        let database = create(&path)?;
        let store = Store {
            identity: identity(&path)?,
            database,
            path,
            copy: RuntimeCopy::new(runtime_dir),
            _locks: locks,
        };
        let (state, origin) = match store.read()? {
            Some(state) => (state, Origin::StateDir),
            None => match store.copy.read()? {
                Some(state) => (state, Origin::RuntimeCopy),
                None => (State::default(), Origin::Nowhere),
            },
        };
        match origin {
            Origin::RuntimeCopy => store.write(&State::default(), &state, None)?,
            Origin::StateDir => store.copy.write(&state)?,
            // Nothing is written for nothing: the next start must find as little as this one.
            Origin::Nowhere => {}
        }
        Ok((store, state, origin))
    }

    /// Where the file is.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Makes `new` the state, durably, and copies it to the runtime directory. `old` must be the present state.
    ///
    /// The second result says why the copy could not be written, if so: a nuisance, not an error, as the state
    /// itself is safe.
    ///
    /// # Errors
    /// If it could not be written; the state on disk is then `old`.
    pub fn commit(
        &mut self,
        old: &State,
        new: &State,
        audit: &v1::AuditEntry,
    ) -> Result<Option<StoreError>, StoreError> {
        self.write(old, new, Some(audit))?;
        Ok(self.copy.write(new).err())
    }

    /// Copies the state to the runtime directory again, if the copy is missing.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn ensure_copy(&mut self, state: &State) -> Result<bool, StoreError> {
        if self.copy.exists() || state.revision == 0 {
            return Ok(false);
        }
        self.copy.write(state).map(|()| true)
    }

    /// Makes the file again, with `state` inside, if it was deleted while open. Says whether it was.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn ensure_file(&mut self, state: &State) -> Result<bool, StoreError> {
        if identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            return Ok(false);
        }
        if let Some(dir) = self.path.parent() {
            make_private(dir).map_err(StoreError::io("making", dir))?;
            if !lock::exists(dir) {
                self._locks[0] = DirLock::take(dir)?;
            }
        }
        self.database = create(&self.path)?;
        self.identity = identity(&self.path)?;
        if state.revision > 0 {
            self.write(&State::default(), state, None)?;
        }
        Ok(true)
    }

    /// The last entries of the audit log, oldest first.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn audit(&self, last: usize) -> Result<Vec<v1::AuditEntry>, StoreError> {
        let entries = || -> Result<Vec<v1::AuditEntry>, redb::Error> {
            let transaction = self.database.begin_read()?;
            let table = match transaction.open_table(AUDIT) {
                Ok(table) => table,
                Err(redb::TableError::TableDoesNotExist(_)) => return Ok(Vec::new()),
                Err(error) => return Err(error.into()),
            };
            let mut entries = Vec::new();
            for row in table.iter()?.rev().take(last) {
                let (_, value) = row?;
                entries.extend(v1::AuditEntry::decode(value.value()));
            }
            entries.reverse();
            Ok(entries)
        };
        entries().map_err(|source| self.database_error(source))
    }

    fn database_error(&self, source: impl Into<redb::Error>) -> StoreError {
        StoreError::Database { path: self.path.clone(), source: Box::new(source.into()) }
    }

    /// The state in the file; `None` if nothing was ever written to it.
    fn read(&self) -> Result<Option<State>, StoreError> {
        let raw = self.read_raw().map_err(|source| self.database_error(source))?;
        let Some(raw) = raw else {
            return Ok(None);
        };
        if raw.schema > SCHEMA {
            return Err(StoreError::NewerSchema { path: self.path.clone(), found: raw.schema });
        }
        let mut state = State { revision: raw.revision, ..State::default() };
        for (name, bytes) in raw.resources {
            let entry_error =
                |problem: String| StoreError::Entry { path: self.path.clone(), entry: name.clone(), problem };
            let key: Key = name.parse().map_err(|_| entry_error("not a resource's key".to_owned()))?;
            let message =
                v1::Resource::decode(bytes.as_slice()).map_err(|error| entry_error(error.to_string()))?;
            let spec = convert::spec(&message).map_err(|violations| {
                let problems: Vec<String> =
                    violations.iter().map(|found| format!("{}: {}", found.field, found.message)).collect();
                entry_error(problems.join("; "))
            })?;
            state.resources.insert(key, Entry { revision: message.revision, spec: spec.into() });
        }
        for (space, name, id) in raw.ids {
            state.set_id(&space, name, id);
        }
        Ok(Some(state))
    }

    fn read_raw(&self) -> Result<Option<Raw>, redb::Error> {
        let transaction = self.database.begin_read()?;
        let meta = match transaction.open_table(META) {
            Ok(table) => table,
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let number = |key: &str| -> Result<u64, redb::Error> {
            Ok(meta.get(key)?.map(|value| value.value()).unwrap_or(0))
        };
        let mut raw = Raw {
            schema: number("schema")?,
            revision: number("revision")?,
            resources: Vec::new(),
            ids: Vec::new(),
        };
        for row in transaction.open_table(RESOURCES)?.iter()? {
            let (key, value) = row?;
            raw.resources.push((key.value().to_owned(), value.value().to_owned()));
        }
        for row in transaction.open_table(IDS)?.iter()? {
            let (key, value) = row?;
            let (space, name) = key.value();
            raw.ids.push((space.to_owned(), name.to_owned(), value.value()));
        }
        Ok(Some(raw))
    }

    fn write(&self, old: &State, new: &State, audit: Option<&v1::AuditEntry>) -> Result<(), StoreError> {
        self.write_difference(old, new, audit).map_err(|source| self.database_error(source))
    }

    fn write_difference(
        &self,
        old: &State,
        new: &State,
        audit: Option<&v1::AuditEntry>,
    ) -> Result<(), redb::Error> {
        let transaction = self.database.begin_write()?;
        {
            let mut meta = transaction.open_table(META)?;
            meta.insert("schema", SCHEMA)?;
            meta.insert("revision", new.revision)?;
            let mut resources = transaction.open_table(RESOURCES)?;
            for (key, entry) in &new.resources {
                if old.resources.get(key) != Some(entry) {
                    let bytes = convert::resource(&entry.spec, entry.revision).encode_to_vec();
                    resources.insert(key.to_string().as_str(), bytes.as_slice())?;
                }
            }
            for key in old.resources.keys().filter(|key| !new.resources.contains_key(*key)) {
                resources.remove(key.to_string().as_str())?;
            }
            let mut ids = transaction.open_table(IDS)?;
            for IdName { space, name, id } in new.id_names() {
                if old.id(space, name) != Some(id) {
                    ids.insert((space, name), id)?;
                }
            }
            for IdName { space, name, .. } in old.id_names() {
                if new.id(space, name).is_none() {
                    ids.remove((space, name))?;
                }
            }
            let mut log = transaction.open_table(AUDIT)?;
            if let Some(entry) = audit {
                let next = log.last()?.map_or(0, |(number, _)| number.value() + 1);
                log.insert(next, entry.encode_to_vec().as_slice())?;
                log.retain(|number, _| number + AUDIT_MAX > next)?;
            }
        }
        transaction.commit()?;
        Ok(())
    }
}

/// The contents of the file, undecoded.
struct Raw {
    schema: u64,
    revision: u64,
    resources: Vec<(String, Vec<u8>)>,
    ids: Vec<(String, String, u32)>,
}

/// Makes a directory that only its owner may look into; parents are made as usual.
pub(crate) fn make_private(dir: &Path) -> io::Result<()> {
    if let Some(parent) = dir.parent() {
        fs::create_dir_all(parent)?;
    }
    match fs::DirBuilder::new().mode(0o700).create(dir) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        result => result,
    }
}

fn create(path: &Path) -> Result<Database, StoreError> {
    Database::create(path)
        .map_err(|source| StoreError::Database { path: path.to_owned(), source: Box::new(source.into()) })
}

fn identity(path: &Path) -> Result<(u64, u64), StoreError> {
    let metadata = fs::metadata(path).map_err(StoreError::io("reading", path))?;
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests;
