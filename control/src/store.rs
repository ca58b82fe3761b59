//! The desired state on disk: one redb file, one durable transaction per change.
//!
//! Besides the specs, the file keeps the numbers that stand for names in the tables (a restarted daemon must give the
//! same numbers, or it could not adopt what is pinned), the revision, and the audit log. After each commit the same
//! state is copied to a runtime directory whose lifetime is that of the pins; see [`RuntimeCopy`]. Values are messages of
//! the protocol, so that a newer daemon reads what an older one wrote.
//!
//! After an error redb refuses everything until its file is opened anew, and a commit that failed may have reached the
//! disk all the same. So an error puts the file in doubt: it is closed, opened and read again, and made to hold the
//! state that the daemon has, before anything else is written. A new file gets its name only with the whole state in
//! it: a full disk never leaves half a file behind.
//!
//! Owned by the reconciler's thread. A lock on both directories keeps a second daemon out.

mod lock;
mod runtime_copy;
#[cfg(test)]
pub(crate) mod small_disk;
mod state;

use std::cell::Cell;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use prost::Message;
use redb::{Database, ReadableDatabase, ReadableTable, TableDefinition, WriteTransaction};
use sluice_proto::v1;

use crate::convert;
use crate::resource::Key;
use lock::DirLock;
pub use runtime_copy::RuntimeCopy;
pub use state::{Entry, IdName, Pin, State, WorkersWanted};

const META: TableDefinition<&str, u64> = TableDefinition::new("meta");
const RESOURCES: TableDefinition<&str, &[u8]> = TableDefinition::new("resources");
const IDS: TableDefinition<(&str, &str), u32> = TableDefinition::new("ids");
const SETTINGS: TableDefinition<&str, &[u8]> = TableDefinition::new("settings");
const AUDIT: TableDefinition<u64, &[u8]> = TableDefinition::new("audit");

/// Name of what is wanted of workers among the settings.
const WORKERS: &str = "workers";

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
    /// It could not be opened again after an error.
    #[error("state file {path} was closed after an error; opening it is tried again within ten seconds")]
    Closed {
        /// The file.
        path: PathBuf,
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

/// What had to be done to the state file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Repair {
    /// Nothing.
    None,
    /// It was opened again after an error.
    Reopened,
    /// It was deleted or replaced under us, and made anew.
    Remade,
}

/// The store.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    /// Missing only while it cannot be opened again after an error.
    database: Option<Database>,
    /// There was an error: the database may refuse everything, and what the file holds is not known.
    in_doubt: Cell<bool>,
    /// Why the last commit failed, if it did.
    failure: Option<String>,
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
        let copy = RuntimeCopy::new(runtime_dir);
        let (database, recovered) = if path.exists() {
            (open(&path)?, None)
        } else {
            let recovered = copy.read()?;
            (make(&path, recovered.as_ref())?, recovered)
        };
        let store = Store {
            identity: identity(&path)?,
            database: Some(database),
            in_doubt: Cell::new(false),
            failure: None,
            path,
            copy,
            _locks: locks,
        };
        if let Some(state) = recovered {
            return Ok((store, state, Origin::RuntimeCopy));
        }
        let (state, origin) = match store.read()? {
            Some(state) => (state, Origin::StateDir),
            None => match store.copy.read()? {
                Some(state) => (state, Origin::RuntimeCopy),
                None => (State::default(), Origin::Nowhere),
            },
        };
        match origin {
            Origin::RuntimeCopy => store.write(Base::Unknown, &state, None)?,
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

    /// Why the last commit failed, if it did.
    pub fn failure(&self) -> Option<&str> {
        self.failure.as_deref()
    }

    /// Makes `new` the state, durably, and copies it to the runtime directory. `old` must be the present state.
    ///
    /// The second result says why the copy could not be written, if so: a nuisance, not an error, as the state
    /// itself is safe.
    ///
    /// # Errors
    /// If it could not be written. The state on disk is then `old`, or, if the disk refuses even that, made so by the
    /// first [`Store::ensure_file`] or commit that succeeds.
    pub fn commit(
        &mut self,
        old: &State,
        new: &State,
        audit: &v1::AuditEntry,
    ) -> Result<Option<StoreError>, StoreError> {
        let written = self.ensure_file(old).and_then(|_| self.write(Base::Known(old), new, Some(audit)));
        self.failure = written.as_ref().err().map(ToString::to_string);
        if written.is_err() {
            // The error at hand says more than that of a second attempt, which comes with the next pass or commit.
            let _ = self.ensure_file(old);
        }
        written?;
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

    /// Makes sure that the file is there, open, and holds `state`: makes it anew if it was deleted or replaced while
    /// open, opens it again if there was an error. Costs next to nothing if neither happened.
    ///
    /// # Errors
    /// If it cannot be made, opened or written.
    pub fn ensure_file(&mut self, state: &State) -> Result<Repair, StoreError> {
        if !identity(&self.path).is_ok_and(|identity| identity == self.identity) {
            self.remake(state)?;
            return Ok(Repair::Remade);
        }
        if !self.in_doubt.get() {
            return Ok(Repair::None);
        }
        // Closed first: it holds a lock on the file.
        self.database = None;
        self.database = Some(open(&self.path)?);
        let holds_state = match self.read() {
            Ok(held) => held.unwrap_or_default() == *state,
            Err(StoreError::Entry { .. }) => false,
            Err(error) => return Err(error),
        };
        if !holds_state {
            self.write(Base::Unknown, state, None)?;
        }
        self.in_doubt.set(false);
        Ok(Repair::Reopened)
    }

    fn remake(&mut self, state: &State) -> Result<(), StoreError> {
        if let Some(dir) = self.path.parent() {
            make_private(dir).map_err(StoreError::io("making", dir))?;
            if !lock::exists(dir) {
                self._locks[0] = DirLock::take(dir)?;
            }
        }
        let database = make(&self.path, Some(state))?;
        let identity = identity(&self.path)?;
        self.database = Some(database);
        self.in_doubt.set(false);
        // Last: until then the next pass tries again.
        self.identity = identity;
        Ok(())
    }

    /// The last entries of the audit log, oldest first.
    ///
    /// # Errors
    /// If they cannot be read.
    pub fn audit(&self, last: usize) -> Result<Vec<v1::AuditEntry>, StoreError> {
        let database = self.database()?;
        let entries = || -> Result<Vec<v1::AuditEntry>, redb::Error> {
            let transaction = database.begin_read()?;
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

    fn database(&self) -> Result<&Database, StoreError> {
        self.database.as_ref().ok_or_else(|| StoreError::Closed { path: self.path.clone() })
    }

    fn database_error(&self, source: redb::Error) -> StoreError {
        self.in_doubt.set(true);
        database_error(&self.path)(source)
    }

    /// The state in the file; `None` if nothing was ever written to it.
    fn read(&self) -> Result<Option<State>, StoreError> {
        let raw = read_raw(self.database()?).map_err(|source| self.database_error(source))?;
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
        let message = v1::WorkersSettings::decode(raw.workers.as_slice()).map_err(|error| {
            let (path, entry) = (self.path.clone(), WORKERS.to_owned());
            StoreError::Entry { path, entry, problem: error.to_string() }
        })?;
        state.workers = WorkersWanted::of_message(message);
        Ok(Some(state))
    }

    fn write(&self, base: Base<'_>, new: &State, audit: Option<&v1::AuditEntry>) -> Result<(), StoreError> {
        write(self.database()?, base, new, audit).map_err(|source| self.database_error(source))
    }
}

/// What a write may take for granted about the file.
#[derive(Clone, Copy)]
enum Base<'a> {
    /// It holds this state; only the difference is written.
    Known(&'a State),
    /// It may hold anything; whatever is not in the new state is removed, and all of that is written.
    Unknown,
}

fn read_raw(database: &Database) -> Result<Option<Raw>, redb::Error> {
    let transaction = database.begin_read()?;
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
        workers: Vec::new(),
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
    match transaction.open_table(SETTINGS) {
        Ok(table) => {
            raw.workers = table.get(WORKERS)?.map_or_else(Vec::new, |value| value.value().to_owned())
        }
        // Nobody has ever set anything.
        Err(redb::TableError::TableDoesNotExist(_)) => {}
        Err(error) => return Err(error.into()),
    }
    Ok(Some(raw))
}

fn write(
    database: &Database,
    base: Base<'_>,
    new: &State,
    audit: Option<&v1::AuditEntry>,
) -> Result<(), redb::Error> {
    let nothing = State::default();
    let transaction = database.begin_write()?;
    let old = match base {
        Base::Known(old) => old,
        Base::Unknown => {
            transaction.delete_table(META)?;
            transaction.delete_table(RESOURCES)?;
            transaction.delete_table(IDS)?;
            transaction.delete_table(SETTINGS)?;
            &nothing
        }
    };
    // A state that was never written is told from an empty one by the lack of tables.
    if new.revision > 0 {
        write_difference(&transaction, old, new)?;
    }
    if let Some(entry) = audit {
        let mut log = transaction.open_table(AUDIT)?;
        let next = log.last()?.map_or(0, |(number, _)| number.value() + 1);
        log.insert(next, entry.encode_to_vec().as_slice())?;
        log.retain(|number, _| number + AUDIT_MAX > next)?;
    }
    transaction.commit()?;
    Ok(())
}

fn write_difference(transaction: &WriteTransaction, old: &State, new: &State) -> Result<(), redb::Error> {
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
    if old.workers != new.workers {
        let bytes = new.workers.to_message().encode_to_vec();
        transaction.open_table(SETTINGS)?.insert(WORKERS, bytes.as_slice())?;
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
    Ok(())
}

/// The contents of the file, undecoded.
struct Raw {
    schema: u64,
    revision: u64,
    resources: Vec<(String, Vec<u8>)>,
    ids: Vec<(String, String, u32)>,
    workers: Vec<u8>,
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

/// Makes, or empties, a file that only its owner may read.
fn create_private(path: &Path) -> io::Result<File> {
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)?;
    // It may be left over from a version that was less careful.
    file.set_permissions(fs::Permissions::from_mode(0o600))?;
    Ok(file)
}

/// Makes the file, in one step, with `state` in it.
fn make(path: &Path, state: Option<&State>) -> Result<Database, StoreError> {
    let temporary = path.with_extension("new");
    let made = make_as(&temporary, path, state);
    if made.is_err() {
        // The disk may be full because of it. If it cannot be removed, the next attempt empties it.
        let _ = fs::remove_file(&temporary);
    }
    made
}

fn make_as(temporary: &Path, path: &Path, state: Option<&State>) -> Result<Database, StoreError> {
    let file = create_private(temporary).map_err(StoreError::io("making", temporary))?;
    let database =
        Database::builder().create_file(file).map_err(|source| database_error(path)(source.into()))?;
    if let Some(state) = state {
        write(&database, Base::Unknown, state, None).map_err(database_error(path))?;
    }
    fs::rename(temporary, path).map_err(StoreError::io("renaming to", path))?;
    if let Some(dir) = path.parent() {
        File::open(dir).and_then(|dir| dir.sync_all()).map_err(StoreError::io("syncing", dir))?;
    }
    Ok(database)
}

fn open(path: &Path) -> Result<Database, StoreError> {
    // Not `open`: that refuses an empty file, which means the same as none.
    Database::create(path).map_err(|source| database_error(path)(source.into()))
}

fn database_error(path: &Path) -> impl FnOnce(redb::Error) -> StoreError {
    let path = path.to_owned();
    move |source| StoreError::Database { path, source: Box::new(source) }
}

fn identity(path: &Path) -> Result<(u64, u64), StoreError> {
    let metadata = fs::metadata(path).map_err(StoreError::io("reading", path))?;
    Ok((metadata.dev(), metadata.ino()))
}

#[cfg(test)]
mod tests;
