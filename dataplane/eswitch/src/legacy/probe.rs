//! What a PF driver can be told, found out by telling it: each knob is turned on an idle VF, read back and turned back.
//!
//! Nothing is sent here; whether the NIC enforces what it takes is the matter of `sluice probe`, of the operator's word,
//! and of the quirk table (`quirks.rs`).

use sluice_policy::net::VlanId;
use sluice_policy::placement::{Capabilities, Evidence, Mode, PortVlan, VlanProtocol};

use super::Legacy;
use super::codec::{LinkState, PfReport, Setting, VfReport};
use super::gate::Gate;
use crate::contract::{EswitchError, VfIndex};

/// What the findings depend on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Circumstances {
    vf_count: u32,
    /// Drivers refuse rates while they have no carrier.
    running: bool,
    /// It was tried, not only looked at.
    tried: bool,
}

impl Legacy {
    /// Finds out, unless nothing has changed since.
    pub(super) fn probe(&mut self) -> Result<Capabilities, EswitchError> {
        let pf = self.report(false)?;
        let idle = pf.vfs.iter().rev().find(|vf| self.is_idle(vf)).cloned();
        let now = Circumstances { vf_count: pf.vf_count, running: pf.running, tried: idle.is_some() };
        if let Some((then, capabilities)) = &self.probed
            && (*then == now || then.tried && Circumstances { tried: true, ..now.clone() } == *then)
        {
            return Ok(capabilities.clone());
        }
        let before = self.probed.take().map(|(_, capabilities)| capabilities);
        let mut capabilities = match (before, &idle) {
            // What was found once is not forgotten because every VF is in use now.
            (Some(before), None) => Capabilities { max_vfs: shown(&pf).max_vfs, ..before },
            (Some(Capabilities { rate_max, rate_min, .. }), Some(_)) => {
                Capabilities { rate_max, rate_min, ..shown(&pf) }
            }
            (None, _) => shown(&pf),
        };
        if let Some(vf) = idle {
            self.try_all(&vf, &mut capabilities)?;
        }
        if let Some(quirk) = self.quirk {
            quirk.correct(&mut capabilities);
        }
        self.probed = Some((now, capabilities.clone()));
        Ok(capabilities)
    }

    /// Takes over what was found in a former life, so that it is not tried again.
    pub fn adopt_capabilities(&mut self, capabilities: &Capabilities) {
        let vf_count = capabilities.max_vfs.into();
        let then = Circumstances { vf_count, running: true, tried: true };
        self.probed.get_or_insert_with(|| (then, capabilities.clone()));
        // How VFs are closed is found out by a write too.
        self.gate = self.gate.or(match capabilities.link_state {
            Evidence::ReadBack => Some(Gate::LinkState),
            Evidence::Missing if self.device.is_pci() => Some(Gate::Driver),
            _ => None,
        });
    }

    /// Whether experiments on a VF disturb nobody: it is not ours, and its link is forced down, or it has no driver, or an
    /// interface that is down.
    fn is_idle(&self, report: &VfReport) -> bool {
        let Ok(index) = u16::try_from(report.index).map(VfIndex) else { return false };
        let has_driver = self.device.vf(index).driver.is_some();
        !self.programmed.contains(&index)
            && (report.link == LinkState::Disable || !has_driver || self.device.vf_is_down(index))
    }

    fn try_all(&mut self, before: &VfReport, found: &mut Capabilities) -> Result<(), EswitchError> {
        let vf = VfIndex(before.index as u16);
        let settings = Self::settings(vf, before)?;
        let vlan = |vid, qos, protocol| PortVlan { vid, qos, protocol };
        let vid = VlanId::new(1).expect("1 is a VLAN");
        let restored = Setting::Vlan(settings.vlan);
        for (evidence, wanted) in [
            (&mut found.access_vlan, vlan(vid, 0, VlanProtocol::Dot1q)),
            (&mut found.vlan_qos, vlan(vid, 1, VlanProtocol::Dot1q)),
            (&mut found.tunnel_vlan, vlan(vid, 0, VlanProtocol::Dot1ad)),
        ] {
            let is_set = |report: &VfReport| report.settings().is_ok_and(|now| now.vlan == Some(wanted));
            *evidence = self.try_one(vf, Setting::Vlan(Some(wanted)), is_set, restored)?;
        }
        let (min_mbps, max_mbps) = (before.min_rate_mbps, before.max_rate_mbps);
        let restored = Setting::Rates { min_mbps, max_mbps };
        let rates = |report: &VfReport| (report.min_rate_mbps, report.max_rate_mbps);
        for (evidence, min_mbps, max_mbps) in [(&mut found.rate_max, 0, 100), (&mut found.rate_min, 1, 100)] {
            let wanted = Setting::Rates { min_mbps, max_mbps };
            let is_set = |report: &VfReport| rates(report) == (min_mbps, max_mbps);
            *evidence = match self.try_one(vf, wanted, is_set, restored) {
                // Without a carrier nothing new is known.
                Err(EswitchError::Busy { .. }) => *evidence,
                result => result?,
            };
        }
        type Switch = (fn(bool) -> Setting, fn(&VfReport) -> Option<bool>);
        let switches: [(&mut Evidence, Switch); 3] = [
            (&mut found.mac_guard, (Setting::Spoofchk, |report| report.spoofchk)),
            (&mut found.trust, (Setting::Trust, |report| report.trust)),
            (&mut found.query_rss, (Setting::QueryRss, |report| report.query_rss)),
        ];
        for (evidence, (setting, read)) in switches {
            let was = read(before).unwrap_or(false);
            // The other way and back: the way back is a test too.
            let turned = self.try_one(vf, setting(!was), |now| read(now) == Some(!was), setting(was))?;
            *evidence = turned;
        }
        let link = [LinkState::Disable, LinkState::Auto];
        let wanted = if before.link == LinkState::Disable { link[1] } else { link[0] };
        // Opening a closed VF, even for a moment, is no experiment.
        if wanted == LinkState::Disable {
            let is_set = |now: &VfReport| now.link == LinkState::Disable;
            found.link_state = self.try_one(vf, Setting::Link(wanted), is_set, Setting::Link(before.link))?;
        }
        Ok(())
    }

    /// Turns one knob, reads it back and turns it back.
    fn try_one(
        &mut self,
        vf: VfIndex,
        setting: Setting,
        is_set: impl Fn(&VfReport) -> bool,
        restored: Setting,
    ) -> Result<Evidence, EswitchError> {
        match self.write(vf, &setting) {
            Ok(()) => {}
            Err(EswitchError::Uncovered { .. }) => return Ok(Evidence::Missing),
            Err(error) => return Err(error),
        }
        let (_, report) = self.report_of(vf)?;
        self.write(vf, &restored)?;
        Ok(if is_set(&report) { Evidence::ReadBack } else { Evidence::Missing })
    }
}

/// What is known without touching anything: what some VF has been set to and shows. It is all there is when every VF is
/// in use, after a restart for one.
fn shown(pf: &PfReport) -> Capabilities {
    let of = |shows: &dyn Fn(&VfReport) -> bool| {
        if pf.vfs.iter().any(shows) { Evidence::ReadBack } else { Evidence::Assumed }
    };
    let vlan = |protocol: VlanProtocol| move |vf: &VfReport| vf.vid != 0 && vf.tpid == protocol.tpid();
    Capabilities {
        mode: Mode::Legacy,
        max_vfs: u16::try_from(pf.vf_count).unwrap_or(u16::MAX),
        mac_guard: of(&|vf| vf.spoofchk == Some(true)),
        access_vlan: of(&vlan(VlanProtocol::Dot1q)),
        tunnel_vlan: of(&vlan(VlanProtocol::Dot1ad)),
        vlan_qos: of(&|vf| vf.vid != 0 && vf.qos != 0),
        untagged_only: Evidence::Assumed,
        rate_max: of(&|vf| vf.max_rate_mbps != 0),
        rate_min: of(&|vf| vf.min_rate_mbps != 0),
        trust: of(&|vf| vf.trust == Some(true)),
        link_state: of(&|vf| vf.link == LinkState::Disable),
        query_rss: of(&|vf| vf.query_rss == Some(true)),
        unknown_unicast_to_pf: Evidence::Assumed,
        ..Capabilities::default()
    }
}
