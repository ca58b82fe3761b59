//! A model of an eSwitch: what it is told, it does to frames given as bytes.
//!
//! [`Soft`] keeps the contract like a NIC would, with whatever capabilities, table sizes and flaws it is given, and
//! [`Soft::transmit`] says where a frame goes. It has its own idea of frames and shares no code with the pipeline, so
//! that placement can be tested against the oracle, and the lifecycle against placement. Tests and planning use it.

mod flower;
mod frame;
mod veb;

use std::collections::{BTreeMap, BTreeSet};

use sluice_policy::net::MacAddr;
use sluice_policy::placement::{
    Capabilities, Evidence, Feature, FlowerProgram, Mode, Program, VfSettings, VlanProtocol,
};

use crate::contract::{Enforced, Eswitch, EswitchError, Observed, Vf, VfIndex, VfStats};

/// What a NIC does with frames that the guest of a VF with a port VLAN tagged itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum GuestTags {
    /// It drops them.
    #[default]
    Dropped,
    /// They travel inside the port VLAN, with both tags (as igb does).
    Nested,
}

/// Where a model differs from the best NIC.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flaws {
    /// Tags of the guest.
    pub guest_tags: GuestTags,
    /// It takes `spoofchk` and does not enforce it.
    pub ignores_spoofchk: bool,
    /// It takes rates and does not enforce them.
    pub ignores_rates: bool,
    /// Its parser for flower rules stops at IPv6 extension headers, and takes the first for the protocol.
    pub stops_at_extensions: bool,
}

/// A place where frames enter and leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Port {
    /// The cable.
    Wire,
    /// The PF: in switchdev mode, the uplink's representor.
    Pf,
    /// A VF.
    Vf(VfIndex),
    /// A VF's representor; only in switchdev mode.
    Representor(VfIndex),
}

#[derive(Clone, Debug)]
struct Function {
    enabled: bool,
    settings: VfSettings,
    rules: FlowerProgram,
}

impl Function {
    fn new() -> Self {
        Function { enabled: false, settings: VfSettings::default(), rules: FlowerProgram::default() }
    }
}

/// The model.
#[derive(Clone, Debug)]
pub struct Soft {
    capabilities: Capabilities,
    flaws: Flaws,
    /// Most addresses in the PF's unicast filter.
    filter_max: usize,
    filter: BTreeSet<MacAddr>,
    functions: BTreeMap<VfIndex, Function>,
    /// What it says that it can, and refuses when it comes to it.
    refuses: Option<Feature>,
    writes: u64,
}

impl Soft {
    /// An eSwitch with `vfs` closed VFs.
    pub fn new(capabilities: Capabilities, vfs: u16, flaws: Flaws) -> Self {
        let mut soft = Soft {
            capabilities,
            flaws,
            filter_max: usize::MAX,
            filter: BTreeSet::new(),
            functions: BTreeMap::new(),
            refuses: None,
            writes: 0,
        };
        soft.set_vfs(vfs);
        soft
    }

    /// Somebody writes `sriov_numvfs`: all VFs go, and new ones come.
    pub fn set_vfs(&mut self, vfs: u16) {
        self.functions = (0..vfs).map(|index| (VfIndex(index), Function::new())).collect();
    }

    /// Has it refuse every program for this feature, whatever it says that it can; or none.
    pub const fn refuse(&mut self, feature: Option<Feature>) {
        self.refuses = feature;
    }

    /// Limits the PF's unicast filter.
    pub const fn limit_filter(&mut self, addresses: usize) {
        self.filter_max = addresses;
    }

    /// Somebody else changes a VF's settings behind our back.
    pub fn tamper(&mut self, vf: VfIndex, change: impl FnOnce(&mut VfSettings)) {
        if let Some(function) = self.functions.get_mut(&vf) {
            change(&mut function.settings);
        }
    }

    /// The VF is reset: it is closed and has forgotten everything.
    pub fn reset(&mut self, vf: VfIndex) {
        if let Some(function) = self.functions.get_mut(&vf) {
            *function = Function::new();
        }
    }

    /// The truth about a VF, if it exists: what `read_back` would say of a NIC that never lies.
    pub fn truth(&self, vf: VfIndex) -> Option<Observed> {
        let function = self.functions.get(&vf)?;
        let enforced = match self.capabilities.mode {
            Mode::Legacy => Enforced::Legacy(function.settings),
            Mode::Switchdev => {
                Enforced::Switchdev { program: function.rules.clone(), in_software: Vec::new() }
            }
        };
        Some(Observed { enabled: function.enabled, enforced, foreign: Vec::new() })
    }

    /// Whether a VF is as it was made: closed, without settings or rules.
    pub fn is_pristine(&self, vf: VfIndex) -> bool {
        self.functions.get(&vf).is_none_or(|function| {
            !function.enabled
                && function.settings == VfSettings::default()
                && function.rules.rules().is_empty()
        })
    }

    /// Where a frame from `from` goes, and how it looks there. `over_rate`: the bucket of the sending VF is empty.
    pub fn transmit(&self, from: Port, frame: &[u8], over_rate: bool) -> Vec<(Port, Vec<u8>)> {
        match self.capabilities.mode {
            Mode::Legacy => self.bridge(from, frame, over_rate),
            Mode::Switchdev => self.switch(from, frame, over_rate),
        }
    }

    fn function(&mut self, vf: VfIndex) -> Result<&mut Function, EswitchError> {
        self.functions.get_mut(&vf).ok_or(EswitchError::NoSuchVf(vf))
    }

    /// Whether the driver has the knobs that the settings need.
    fn check_knobs(&self, settings: &VfSettings) -> Result<(), EswitchError> {
        let capabilities = &self.capabilities;
        let protocol = settings.vlan.map(|vlan| vlan.protocol);
        let has_qos = settings.vlan.is_some_and(|vlan| vlan.qos != 0);
        for (is_used, evidence, feature) in [
            (settings.spoofchk, capabilities.mac_guard, Feature::MacGuard),
            (protocol == Some(VlanProtocol::Dot1q), capabilities.access_vlan, Feature::AccessVlan),
            (protocol == Some(VlanProtocol::Dot1ad), capabilities.tunnel_vlan, Feature::TunnelVlan),
            (has_qos, capabilities.vlan_qos, Feature::AccessVlan),
            (settings.max_rate_mbps > 0, capabilities.rate_max, Feature::RateFromVm),
            (settings.min_rate_mbps > 0, capabilities.rate_min, Feature::RateFromVm),
            (settings.trust, capabilities.trust, Feature::MacGuard),
            (settings.query_rss, capabilities.query_rss, Feature::Offload),
        ] {
            if is_used && evidence == Evidence::Missing {
                return Err(EswitchError::Uncovered { feature, detail: "Operation not supported".into() });
            }
        }
        Ok(())
    }

    fn check_room(&self, program: &FlowerProgram) -> Result<(), EswitchError> {
        if program.rules().len() > self.capabilities.flower.rules_max as usize {
            let detail =
                format!("{} rules, room for {}", program.rules().len(), self.capabilities.flower.rules_max);
            return Err(EswitchError::TableFull { detail });
        }
        Ok(())
    }

    fn set_enabled(&mut self, vf: VfIndex, enabled: bool) -> Result<(), EswitchError> {
        let function = self.function(vf)?;
        if function.enabled != enabled {
            function.enabled = enabled;
            self.writes += 1;
        }
        Ok(())
    }
}

impl Eswitch for Soft {
    fn capabilities(&mut self) -> Result<Capabilities, EswitchError> {
        Ok(self.capabilities.clone())
    }

    fn vfs(&mut self) -> Result<Vec<Vf>, EswitchError> {
        let vf = |index: &VfIndex| Vf { index: *index, pci: None, netdev: None, driver: None };
        Ok(self.functions.keys().map(vf).collect())
    }

    fn program(&mut self, vf: VfIndex, program: &Program) -> Result<(), EswitchError> {
        self.function(vf)?;
        if let Some(feature) = self.refuses {
            return Err(EswitchError::Uncovered {
                feature,
                detail: "the model was told to refuse it".into(),
            });
        }
        match (program, self.capabilities.mode) {
            (Program::Legacy(settings), Mode::Legacy) => {
                self.check_knobs(settings)?;
                let function = self.function(vf)?;
                if function.settings != *settings {
                    function.settings = *settings;
                    self.writes += 1;
                }
            }
            (Program::Switchdev(rules), Mode::Switchdev) => {
                self.check_room(rules)?;
                let function = self.function(vf)?;
                if function.rules != *rules {
                    function.rules = rules.clone();
                    self.writes += 1;
                }
            }
            _ => return Err(EswitchError::WrongMode),
        }
        Ok(())
    }

    fn read_back(&mut self, vf: VfIndex) -> Result<Observed, EswitchError> {
        self.truth(vf).ok_or(EswitchError::NoSuchVf(vf))
    }

    fn stats(&mut self, vf: VfIndex) -> Result<VfStats, EswitchError> {
        self.function(vf).map(|_| VfStats::default())
    }

    fn unprogram(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        if !self.is_pristine(vf) {
            self.reset(vf);
            self.writes += 1;
        }
        Ok(())
    }

    fn enable(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        self.set_enabled(vf, true)
    }

    fn disable(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        match self.set_enabled(vf, false) {
            Err(EswitchError::NoSuchVf(_)) => Ok(()),
            result => result,
        }
    }

    fn sync_unicast_filter(&mut self, macs: &BTreeSet<MacAddr>) -> Result<(), EswitchError> {
        if macs.len() > self.filter_max {
            let detail = format!("{} unicast addresses, room for {}", macs.len(), self.filter_max);
            return Err(EswitchError::TableFull { detail });
        }
        if self.filter != *macs {
            self.filter = macs.clone();
            self.writes += 1;
        }
        Ok(())
    }

    fn writes(&self) -> u64 {
        self.writes
    }
}

#[cfg(test)]
mod tests;
