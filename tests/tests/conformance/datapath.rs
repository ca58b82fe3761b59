//! The loaded programs and the pinned maps, driven from outside: `BPF_PROG_TEST_RUN`, counters, and state put in place
//! by hand.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result};
use aya::maps::{Array, HashMap, Map, MapData, PerCpuArray};
use aya::programs::{SchedClassifier, TestRun as _, TestRunOptions, Xdp};
use aya_obj::programs::XdpAttachType;
use sluice_pipeline::DropReason;
use sluice_pipeline::REASONS_MAX;
use sluice_pipeline::tables::FdbKey;

/// Longest frame of the generator, and some room for a tag.
const FRAME_MAX: usize = 16_384;
/// Offset of `ifindex` in `struct __sk_buff` and of `ingress_ifindex` in `struct xdp_md` (linux/bpf.h).
const SKB_IFINDEX: usize = 40;
const XDP_DATA_END: usize = 4;
const XDP_IFINDEX: usize = 12;

/// What a test run gave back.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The program's return value.
    pub(crate) code: u32,
    /// The frame as the program left it.
    pub(crate) bytes: Vec<u8>,
}

/// The programs and maps of one engine.
pub(crate) struct Datapath {
    tc: SchedClassifier,
    xdp: Xdp,
    fdb: HashMap<MapData, [u8; 12], [u8; 8]>,
    learnt: Array<MapData, u32>,
    buckets: Array<MapData, [u64; 2]>,
    drops: PerCpuArray<MapData, u64>,
    stats: PerCpuArray<MapData, [u64; 8]>,
}

fn map(pins: &Path, name: &str) -> Result<MapData> {
    MapData::from_pin(pins.join("maps").join(name)).with_context(|| format!("opening map {name}"))
}

impl Datapath {
    /// Opens what an engine has pinned.
    pub(crate) fn open(pins: &Path) -> Result<Datapath> {
        let programs = pins.join("progs");
        Ok(Datapath {
            tc: SchedClassifier::from_pin(programs.join("sluice_tc")).context("opening sluice_tc")?,
            xdp: Xdp::from_pin(programs.join("sluice_xdp"), XdpAttachType::Interface)
                .context("opening sluice_xdp")?,
            fdb: Map::HashMap(map(pins, "FDB")?).try_into()?,
            learnt: Map::Array(map(pins, "LEARNT")?).try_into()?,
            buckets: Map::Array(map(pins, "BUCKETS")?).try_into()?,
            drops: Map::PerCpuArray(map(pins, "DROPS")?).try_into()?,
            stats: Map::PerCpuArray(map(pins, "PORT_STATS")?).try_into()?,
        })
    }

    /// Runs `sluice_tc` on a frame that comes from an interface. The outermost tag is in the bytes, unlike in frames that
    /// the kernel receives.
    pub(crate) fn run_tc(&self, ifindex: u32, frame: &[u8]) -> Result<Answer> {
        let mut context = [0u8; 192];
        context[SKB_IFINDEX..SKB_IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
        let mut bytes = vec![0; FRAME_MAX];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut bytes),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        let result = self.tc.test_run(options)?;
        bytes.truncate(result.data_size_out as usize);
        Ok(Answer { code: result.return_value, bytes })
    }

    /// Runs `sluice_xdp` on a frame that comes from an interface.
    pub(crate) fn run_xdp(&self, ifindex: u32, frame: &[u8]) -> Result<Answer> {
        let mut context = [0u8; 24];
        context[XDP_DATA_END..XDP_DATA_END + 4].copy_from_slice(&(frame.len() as u32).to_ne_bytes());
        context[XDP_IFINDEX..XDP_IFINDEX + 4].copy_from_slice(&ifindex.to_ne_bytes());
        let mut bytes = vec![0; FRAME_MAX];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut bytes),
            ctx_in: Some(&context),
            ..TestRunOptions::new()
        };
        let result = self.xdp.test_run(options)?;
        bytes.truncate(result.data_size_out as usize);
        Ok(Answer { code: result.return_value, bytes })
    }

    /// Puts a learnt address in place.
    pub(crate) fn learn(&mut self, key: &FdbKey, port: u32, seen: u32) -> Result<()> {
        let value = u64::from(port) | u64::from(seen) << 32;
        Ok(self.fdb.insert(bytes_of(key), value.to_ne_bytes(), 0)?)
    }

    /// All learnt addresses, and the ports behind which they are.
    pub(crate) fn fdb(&self) -> Result<BTreeMap<FdbKey, u32>> {
        let mut entries = BTreeMap::new();
        for entry in self.fdb.iter() {
            let (key, value) = entry?;
            entries.insert(bytemuck::cast(key), u64::from_ne_bytes(value) as u32);
        }
        Ok(entries)
    }

    /// Forgets an address.
    pub(crate) fn forget(&mut self, key: &FdbKey) {
        let _ = self.fdb.remove(&bytes_of(key)); // it may not be there
    }

    /// Sets the count of learnt addresses of a port.
    pub(crate) fn set_learnt_count(&mut self, port: u32, count: u32) -> Result<()> {
        Ok(self.learnt.set(port, count, 0)?)
    }

    /// Sets the arrival times of a port's buckets, from-vm and to-vm.
    pub(crate) fn set_buckets(&mut self, port: u32, arrivals: [u64; 2]) -> Result<()> {
        Ok(self.buckets.set(port, arrivals, 0)?)
    }

    /// Drops counted on a port for one reason.
    pub(crate) fn drops(&self, port: u32, reason: DropReason) -> Result<u64> {
        Ok(self.drops.get(&(port * REASONS_MAX + reason as u32), 0)?.iter().sum())
    }

    /// Drops counted on a port for any reason.
    pub(crate) fn all_drops(&self, port: u32) -> Result<u64> {
        let mut sum = 0;
        for reason in DropReason::ALL {
            sum += self.drops(port, *reason)?;
        }
        Ok(sum)
    }

    /// Frames received from and sent to a port.
    pub(crate) fn frames(&self, port: u32) -> Result<(u64, u64)> {
        let values = self.stats.get(&port, 0)?;
        Ok((values.iter().map(|stats| stats[0]).sum(), values.iter().map(|stats| stats[2]).sum()))
    }
}

fn bytes_of(key: &FdbKey) -> [u8; 12] {
    bytemuck::cast(*key)
}
