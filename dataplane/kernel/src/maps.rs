//! The maps, typed: every operation on a table goes through here.
//!
//! Keys and values are the pipeline's plain-data types. A table is made only after the kernel has confirmed its sizes.

use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use bytemuck::{Pod, Zeroable};
use sluice_pipeline::tables::{
    AclGroup, FdbEntry, FdbKey, FloodChunk, FloodKey, Globals, IFINDEX_LOW, IpGuardKey, MacKey, PortConfig,
    PortStats, RuleEntry, RuleKey, RuleStats, SwitchConfig, TrunkBitmap, TupleChunk, TupleKey,
};

use crate::EngineError;
use crate::syscall::{self, Cursor};

/// Elements per batch: large enough that the system call does not count, small enough to stay in cache.
const BATCH: usize = 1024;

/// A map with keys `K` and, per CPU or not, values `V`.
#[derive(Debug)]
pub(crate) struct Table<K, V> {
    pub(crate) name: &'static str,
    fd: OwnedFd,
    max_entries: u32,
    _types: PhantomData<fn(K) -> V>,
}

/// An array that has one value per CPU. Values are added up when read, by `V`'s fields being `u64` all.
#[derive(Debug)]
pub(crate) struct Counters<V> {
    pub(crate) name: &'static str,
    fd: OwnedFd,
    max_entries: u32,
    cpus: usize,
    _types: PhantomData<fn() -> V>,
}

/// How often a write is tried again when the kernel is out of elements at hand.
///
/// Maps that allocate on demand take elements from a small reserve per CPU, which an interrupt refills without waiting for
/// memory to be reclaimed: `ENOMEM` in the middle of many writes means "in a moment", not "never".
#[derive(Debug, Default)]
struct Patience(u32);

impl Patience {
    /// Attempts before `ENOMEM` is believed; a second in all.
    const ATTEMPTS: u32 = 500;

    /// Whether to try again, after a pause.
    fn allows(&mut self, error: &io::Error) -> bool {
        self.0 += 1;
        if error.raw_os_error() != Some(libc::ENOMEM) || self.0 > Self::ATTEMPTS {
            return false;
        }
        std::thread::sleep(Duration::from_millis(2));
        true
    }
}

/// Opens a pinned map and compares its sizes.
fn open(
    dir: &Path,
    name: &'static str,
    key_size: usize,
    value_size: usize,
) -> Result<(OwnedFd, u32), EngineError> {
    let failed = |operation| move |source| EngineError::Map { table: name, operation, source };
    let fd = syscall::open_pin(&dir.join(name)).map_err(failed("opening the pin"))?;
    let (_, shape) = syscall::map_info(fd.as_fd()).map_err(failed("reading information"))?;
    if (shape.key_size as usize, shape.value_size as usize) != (key_size, value_size) {
        return Err(EngineError::ObjectMismatch(format!(
            "map {name} has keys of {} and values of {} bytes instead of {key_size} and {value_size}",
            shape.key_size, shape.value_size
        )));
    }
    Ok((fd, shape.max_entries))
}

impl<K: Pod, V: Pod> Table<K, V> {
    fn open(dir: &Path, name: &'static str) -> Result<Self, EngineError> {
        let (fd, max_entries) = open(dir, name, size_of::<K>(), size_of::<V>())?;
        Ok(Table { name, fd, max_entries, _types: PhantomData })
    }

    fn error(&self, operation: &'static str) -> impl Fn(io::Error) -> EngineError + use<K, V> {
        let (table, max_entries) = (self.name, self.max_entries);
        move |source| match source.raw_os_error() {
            Some(libc::E2BIG) => EngineError::TableFull { table, max_entries },
            _ => EngineError::Map { table, operation, source },
        }
    }

    pub(crate) fn get(&self, key: &K) -> Result<Option<V>, EngineError> {
        let mut value = V::zeroed();
        syscall::map_lookup(self.fd.as_fd(), bytemuck::bytes_of(key), bytemuck::bytes_of_mut(&mut value))
            .map(|found| found.then_some(value))
            .map_err(self.error("look-up"))
    }

    pub(crate) fn set(&self, key: &K, value: &V) -> Result<(), EngineError> {
        let mut patience = Patience::default();
        loop {
            match syscall::map_update(self.fd.as_fd(), bytemuck::bytes_of(key), bytemuck::bytes_of(value)) {
                Err(error) if patience.allows(&error) => {}
                result => return result.map_err(self.error("update")),
            }
        }
    }

    pub(crate) fn remove(&self, key: &K) -> Result<(), EngineError> {
        syscall::map_delete(self.fd.as_fd(), bytemuck::bytes_of(key)).map(drop).map_err(self.error("delete"))
    }

    /// Writes elements in the order given.
    pub(crate) fn set_all(&self, elements: &[(K, V)]) -> Result<(), EngineError> {
        if let [(key, value)] = elements {
            return self.set(key, value);
        }
        for part in elements.chunks(BATCH) {
            let keys: Vec<K> = part.iter().map(|(key, _)| *key).collect();
            let values: Vec<V> = part.iter().map(|(_, value)| *value).collect();
            let mut done = 0;
            let mut patience = Patience::default();
            while done < part.len() {
                let (written, result) = syscall::map_update_batch(
                    self.fd.as_fd(),
                    bytemuck::cast_slice(&keys[done..]),
                    bytemuck::cast_slice(&values[done..]),
                    (part.len() - done) as u32,
                );
                done += written as usize;
                match result {
                    Err(error) if patience.allows(&error) => {}
                    result => result.map_err(self.error("update"))?,
                }
            }
        }
        Ok(())
    }

    /// Deletes elements; those that are not there are passed over.
    pub(crate) fn remove_all(&self, keys: &[K]) -> Result<(), EngineError> {
        for part in keys.chunks(BATCH) {
            let mut rest = part;
            while !rest.is_empty() {
                let done =
                    syscall::map_delete_batch(self.fd.as_fd(), bytemuck::cast_slice(rest), rest.len() as u32)
                        .map_err(self.error("delete"))? as usize;
                rest = rest.get(done + 1..).unwrap_or_default();
            }
        }
        Ok(())
    }

    /// All elements, in no particular order. What changes meanwhile may be missing or there twice.
    pub(crate) fn dump(&self) -> Result<Vec<(K, V)>, EngineError> {
        let mut elements = Vec::new();
        let mut room = BATCH;
        let mut from: Option<Cursor> = None;
        loop {
            let mut keys = vec![K::zeroed(); room];
            let mut values = vec![V::zeroed(); room];
            let mut to = Cursor::default();
            let result = syscall::map_lookup_batch(
                self.fd.as_fd(),
                from.as_ref(),
                &mut to,
                bytemuck::cast_slice_mut(&mut keys),
                bytemuck::cast_slice_mut(&mut values),
                room as u32,
            );
            match result {
                Ok(batch) => {
                    elements.extend(keys.into_iter().zip(values).take(batch.count as usize));
                    if batch.end {
                        return Ok(elements);
                    }
                    from = Some(to);
                }
                // One bucket of the hash holds more than the buffer.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => room *= 2,
                Err(error) => return Err(self.error("batched look-up")(error)),
            }
        }
    }

    /// All elements of a map that has no batches (device maps).
    fn dump_one_by_one(&self) -> Result<Vec<(K, V)>, EngineError> {
        let mut elements = Vec::new();
        let mut last: Option<K> = None;
        let mut key = K::zeroed();
        while syscall::map_next_key(
            self.fd.as_fd(),
            last.as_ref().map(bytemuck::bytes_of),
            bytemuck::bytes_of_mut(&mut key),
        )
        .map_err(self.error("iteration"))?
        {
            if let Some(value) = self.get(&key)? {
                elements.push((key, value));
            }
            last = Some(key);
            if elements.len() > self.max_entries as usize {
                break; // somebody else keeps changing it; the next pass sees the rest
            }
        }
        Ok(elements)
    }
}

/// Which interface is which port: an array for low interface indexes and a hash for the others, as one table.
#[derive(Debug)]
pub(crate) struct PortOf {
    pub(crate) name: &'static str,
    low: Table<u32, u32>,
    high: Table<u32, u32>,
}

impl PortOf {
    fn open(dir: &Path) -> Result<Self, EngineError> {
        let (low, high) = (Table::open(dir, "PORT_OF")?, Table::open(dir, "PORT_OF_HIGH")?);
        Ok(PortOf { name: low.name, low, high })
    }

    pub(crate) fn set_all(&self, elements: &[(u32, u32)]) -> Result<(), EngineError> {
        let (low, high): (Vec<_>, Vec<_>) = elements.iter().partition(|(ifindex, _)| *ifindex < IFINDEX_LOW);
        self.low.set_all(&low)?;
        self.high.set_all(&high)
    }

    pub(crate) fn remove_all(&self, ifindexes: &[u32]) -> Result<(), EngineError> {
        let (low, high): (Vec<u32>, Vec<u32>) = ifindexes.iter().partition(|ifindex| **ifindex < IFINDEX_LOW);
        let low: Vec<_> = low.into_iter().map(|ifindex| (ifindex, 0)).collect();
        self.low.set_all(&low)?;
        self.high.remove_all(&high)
    }

    pub(crate) fn dump(&self) -> Result<Vec<(u32, u32)>, EngineError> {
        let mut elements = self.low.dump()?;
        elements.retain(|(_, port)| *port != 0);
        elements.extend(self.high.dump()?);
        Ok(elements)
    }
}

impl<V: Pod> Counters<V> {
    fn open(dir: &Path, name: &'static str, cpus: usize) -> Result<Self, EngineError> {
        let (fd, max_entries) = open(dir, name, size_of::<u32>(), size_of::<V>())?;
        debug_assert!(size_of::<V>().is_multiple_of(size_of::<u64>()));
        Ok(Counters { name, fd, max_entries, cpus, _types: PhantomData })
    }

    fn error(&self, operation: &'static str) -> impl Fn(io::Error) -> EngineError + use<V> {
        let table = self.name;
        move |source| EngineError::Map { table, operation, source }
    }

    fn words(&self) -> usize {
        size_of::<V>() / size_of::<u64>()
    }

    /// Adds the values of all CPUs up.
    fn sum(&self, values: &[u64]) -> V {
        let mut sum = V::zeroed();
        let bytes = bytemuck::bytes_of_mut(&mut sum);
        for (word, out) in bytes.chunks_exact_mut(size_of::<u64>()).enumerate() {
            let total = values.iter().skip(word).step_by(self.words()).fold(0u64, |a, b| a.wrapping_add(*b));
            out.copy_from_slice(&total.to_ne_bytes());
        }
        sum
    }

    /// The sum over all CPUs; zero beyond the end.
    pub(crate) fn get(&self, index: u32) -> Result<V, EngineError> {
        let mut values = vec![0u64; self.words() * self.cpus];
        syscall::map_lookup(
            self.fd.as_fd(),
            bytemuck::bytes_of(&index),
            bytemuck::cast_slice_mut(&mut values),
        )
        .map_err(self.error("look-up"))?;
        Ok(self.sum(&values))
    }

    /// The sums of all elements, by index.
    pub(crate) fn dump(&self) -> Result<Vec<V>, EngineError> {
        let row = self.words() * self.cpus;
        let mut sums = vec![V::zeroed(); self.max_entries as usize];
        let mut from: Option<Cursor> = None;
        loop {
            let mut keys = vec![0u32; BATCH];
            let mut values = vec![0u64; BATCH * row];
            let mut to = Cursor::default();
            let batch = syscall::map_lookup_batch(
                self.fd.as_fd(),
                from.as_ref(),
                &mut to,
                bytemuck::cast_slice_mut(&mut keys),
                bytemuck::cast_slice_mut(&mut values),
                BATCH as u32,
            )
            .map_err(self.error("batched look-up"))?;
            for (key, values) in keys.iter().zip(values.chunks_exact(row)).take(batch.count as usize) {
                if let Some(sum) = sums.get_mut(*key as usize) {
                    *sum = self.sum(values);
                }
            }
            if batch.end {
                return Ok(sums);
            }
            from = Some(to);
        }
    }

    /// Sets elements to zero on all CPUs.
    pub(crate) fn reset(&self, indexes: &[u32]) -> Result<(), EngineError> {
        let row = self.words() * self.cpus;
        for part in indexes.chunks(BATCH) {
            let values = vec![0u64; part.len() * row];
            let (_, result) = syscall::map_update_batch(
                self.fd.as_fd(),
                bytemuck::cast_slice(part),
                bytemuck::cast_slice(&values),
                part.len() as u32,
            );
            result.map_err(self.error("reset"))?;
        }
        Ok(())
    }
}

/// Value of the device map (`struct bpf_devmap_val`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub(crate) struct DevmapValue {
    pub(crate) ifindex: u32,
    /// Id of the program that runs on redirected frames; none.
    pub(crate) program: u32,
}

/// Every map that user space reads or writes.
#[derive(Debug)]
pub(crate) struct Maps {
    pub(crate) port_of: PortOf,
    pub(crate) port_live: Table<u32, u32>,
    pub(crate) ports: Table<u32, PortConfig>,
    pub(crate) trunks: Table<u32, TrunkBitmap>,
    pub(crate) switches: Table<u32, SwitchConfig>,
    pub(crate) globals: Table<u32, Globals>,
    pub(crate) vnic_macs: Table<MacKey, u32>,
    pub(crate) fdb: Table<FdbKey, FdbEntry>,
    pub(crate) learnt: Table<u32, u32>,
    pub(crate) ip_guard: Table<IpGuardKey, u32>,
    pub(crate) flood: Table<FloodKey, FloodChunk>,
    pub(crate) acl_groups: Table<u32, AclGroup>,
    pub(crate) acl_tuples: Table<TupleKey, TupleChunk>,
    pub(crate) acl_rules: Table<RuleKey, RuleEntry>,
    pub(crate) buckets: Table<u32, [u64; 2]>,
    pub(crate) port_stats: Counters<PortStats>,
    pub(crate) drops: Counters<u64>,
    pub(crate) rule_stats: Counters<RuleStats>,
    pub(crate) devmap: Table<u32, DevmapValue>,
    pub(crate) sockets: Table<u32, u32>,
}

impl Maps {
    /// Opens the maps pinned in `dir`.
    pub(crate) fn open(dir: &Path) -> Result<Maps, EngineError> {
        let cpus = aya::util::nr_cpus()
            .map_err(|(path, source)| EngineError::Io { operation: format!("reading {path}"), source })?;
        Ok(Maps {
            port_of: PortOf::open(dir)?,
            port_live: Table::open(dir, "PORT_LIVE")?,
            ports: Table::open(dir, "PORTS")?,
            trunks: Table::open(dir, "TRUNKS")?,
            switches: Table::open(dir, "SWITCHES")?,
            globals: Table::open(dir, "GLOBALS")?,
            vnic_macs: Table::open(dir, "VNIC_MACS")?,
            fdb: Table::open(dir, "FDB")?,
            learnt: Table::open(dir, "LEARNT")?,
            ip_guard: Table::open(dir, "IP_GUARD")?,
            flood: Table::open(dir, "FLOOD")?,
            acl_groups: Table::open(dir, "ACL_GROUPS")?,
            acl_tuples: Table::open(dir, "ACL_TUPLES")?,
            acl_rules: Table::open(dir, "ACL_RULES")?,
            buckets: Table::open(dir, "BUCKETS")?,
            port_stats: Counters::open(dir, "PORT_STATS", cpus)?,
            drops: Counters::open(dir, "DROPS", cpus)?,
            rule_stats: Counters::open(dir, "RULE_STATS", cpus)?,
            devmap: Table::open(dir, "DEVMAP")?,
            sockets: Table::open(dir, "SOCKETS")?,
        })
    }

    /// What the device map holds.
    pub(crate) fn dump_devmap(&self) -> Result<Vec<(u32, DevmapValue)>, EngineError> {
        self.devmap.dump_one_by_one()
    }
}
