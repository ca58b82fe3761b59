//! A PF in legacy mode: the NIC bridges by itself, and its driver takes a few settings per VF by rtnetlink.
//!
//! # Closing a VF
//! A VF is closed by its link state (`ip link set PF vf N state disable`). Drivers without that knob, igb for one, leave
//! one way: no driver is bound to the VF, so that nothing can use it. Then [`enable`](Eswitch::enable) binds one, and
//! makes sure that the VF's interface came up with the address that was programmed. A VF that a running VM holds through
//! VFIO cannot be taken that way, since the kernel would wait for the VM: that is [`EswitchError::Busy`] until whoever
//! attached it has detached it.
//!
//! New VFs get a driver at once on most machines, and are open then. [`Legacy::set_vf_count`] prevents that.
//!
//! # Open VFs
//! The kernel takes settings one by one, so an open VF takes a program that differs in one setting; any other needs it
//! closed ([`EswitchError::Open`]). When programming fails half-way the VF is closed, whatever it was before.
//!
//! # Other people
//! Nothing is remembered about VFs that the NIC can be asked: each call reads it anew by the PF's device, so that renamed
//! interfaces, changed numbers of VFs and changed settings are found when they are looked for. Which addresses of the
//! PF's filter are ours the kernel cannot say; [`Legacy::adopt_unicast_filter`] tells after a restart.
//!
//! The socket belongs to the network namespace in which [`Legacy::open`] was called, and sysfs must be that one's.

mod codec;
pub(crate) mod errors;
mod filter;
mod gate;
mod probe;
mod steps;
pub(crate) mod sysfs;
mod vlans;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use netlink_sys::protocols::NETLINK_ROUTE;
use sluice_policy::net::{MacAddr, VlanId};
use sluice_policy::placement::{Capabilities, Program, VfSettings};

use crate::contract::{Enforced, Eswitch, EswitchError, Observed, Vf, VfIndex, VfStats};
use crate::netlink::Connection;
use crate::quirks::Quirk;
use codec::{PfReport, Setting, VfReport};
use gate::Gate;
use steps::{pristine, steps};
use sysfs::{Device, Netdev};

/// The VFs of one PF, in legacy mode.
pub struct Legacy {
    connection: Connection,
    device: Device,
    /// The PF's interface when it was last seen.
    netdev: Netdev,
    quirk: Option<&'static Quirk>,
    /// What to bind to VFs when they are opened, instead of what suits.
    vf_driver: Option<String>,
    /// The same for particular VFs; `None` means what suits its interface.
    vf_drivers: BTreeMap<VfIndex, Option<String>>,
    /// Drivers that were taken from VFs to close them.
    taken_drivers: BTreeMap<VfIndex, String>,
    /// How VFs are closed here, once that is known.
    gate: Option<Gate>,
    /// VFs that run a program of ours: no experiments on them.
    programmed: BTreeSet<VfIndex>,
    /// Addresses in the PF's filter that we put there.
    filter: BTreeSet<MacAddr>,
    /// What was found out by trying, and when that holds.
    probed: Option<(probe::Circumstances, Capabilities)>,
    writes: u64,
}

impl Legacy {
    /// Opens the PF that has this interface.
    ///
    /// # Errors
    /// [`EswitchError::DeviceGone`] when there is no such interface, or no device behind it.
    pub fn open(netdev: &str) -> Result<Legacy, EswitchError> {
        let device =
            Device::of(Path::new(sysfs::SYSFS), netdev).map_err(|error| EswitchError::DeviceGone {
                detail: format!("there is no interface {netdev} with a device behind it: {error}"),
            })?;
        let found = device.netdevs().into_iter().find(|one| one.name == netdev);
        let connection = Connection::open(NETLINK_ROUTE)
            .map_err(|error| errors::of_sysfs("opening a netlink socket", &error))?;
        Ok(Legacy {
            connection,
            netdev: found.unwrap_or(Netdev { name: netdev.to_owned(), ifindex: 0 }),
            quirk: device.driver().and_then(|driver| Quirk::of(&driver, device.pci_id())),
            device,
            vf_driver: None,
            vf_drivers: BTreeMap::new(),
            taken_drivers: BTreeMap::new(),
            gate: None,
            programmed: BTreeSet::new(),
            filter: BTreeSet::new(),
            probed: None,
            writes: 0,
        })
    }

    /// Has [`enable`](Eswitch::enable) bind this driver, where opening a VF means to bind one: `vfio-pci`, say. Without
    /// it the one that the VF had, or else the one that suits the device.
    #[must_use]
    pub fn with_vf_driver(mut self, driver: &str) -> Self {
        self.vf_driver = Some(driver.to_owned());
        self
    }

    /// Has [`enable`](Eswitch::enable) bind this driver to this VF, where opening a VF means to bind one; `None`: the one
    /// that suits its interface.
    pub fn use_vf_driver(&mut self, vf: VfIndex, driver: Option<&str>) {
        self.vf_drivers.insert(vf, driver.map(str::to_owned));
    }

    /// Whether opening a VF binds its driver: then it has no interface before, and what gives it to a guest comes after.
    ///
    /// # Errors
    /// Of class passing, gone or broken.
    pub fn opens_by_binding(&mut self, vf: VfIndex) -> Result<bool, EswitchError> {
        let (_, report) = self.report_of(vf)?;
        Ok(self.gate(vf, &report)? == Gate::Driver)
    }

    /// How many VFs there can be; `None` if the device does not say.
    pub fn vf_limit(&self) -> Option<u16> {
        self.device.vf_limit()
    }

    /// Makes this number of VFs, for operators' tools: nothing else here changes it. VFs that are made get no driver by
    /// themselves (`sriov_drivers_autoprobe`), so that on NICs without a link state they are closed from the start.
    ///
    /// # Errors
    /// [`EswitchError::Busy`] when there are VFs already and another number is wanted, which the kernel refuses: they
    /// must be removed first. Removing is refused here while VFs run programs.
    pub fn set_vf_count(&mut self, count: u16) -> Result<(), EswitchError> {
        let sysfs = |error| errors::of_sysfs("sriov_numvfs", &error);
        let found = self.device.vf_count().map_err(sysfs)?;
        if found == count {
            return Ok(());
        }
        let mut programmed = self.programmed.iter().filter(|vf| vf.0 < found);
        if let Some(vf) = programmed.next() {
            let detail = format!(
                "{vf} of {} runs a program; give it back before you remove the VFs",
                self.netdev.name
            );
            return Err(EswitchError::Busy { detail });
        }
        if found != 0 && count != 0 {
            let detail = format!(
                "{} has {found} VFs, and the kernel makes {count} only where there are none; set 0 first",
                self.netdev.name
            );
            return Err(EswitchError::Busy { detail });
        }
        if count != 0 && self.device.is_pci() && self.device.autoprobe() {
            self.writes += 1;
            self.device
                .set_autoprobe(false)
                .map_err(|error| errors::of_sysfs("sriov_drivers_autoprobe", &error))?;
        }
        self.writes += 1;
        self.device.set_vf_count(count).map_err(sysfs)
    }

    /// The addresses in the PF's filter that are ours.
    pub const fn unicast_filter(&self) -> &BTreeSet<MacAddr> {
        &self.filter
    }

    /// Whether a VF runs a program of ours, as far as this back-end was told.
    pub(crate) fn is_programmed(&self, vf: VfIndex) -> bool {
        self.programmed.contains(&vf)
    }

    /// Says which addresses [`sync_unicast_filter`](Eswitch::sync_unicast_filter) put into the PF's filter in a former
    /// life, so that they are removed when they are no longer wanted. Others that are there stay for ever.
    pub fn adopt_unicast_filter(&mut self, macs: &BTreeSet<MacAddr>) {
        self.filter.extend(macs);
    }

    /// The PF's interface now. Its name may have changed, and after a reset its index too.
    fn ifindex(&mut self) -> Result<u32, EswitchError> {
        let found = self.device.netdevs();
        let same = found
            .iter()
            .find(|one| one.ifindex == self.netdev.ifindex)
            .or_else(|| found.iter().find(|one| one.name == self.netdev.name))
            .or(if found.len() == 1 { found.first() } else { None });
        match same {
            Some(netdev) => {
                self.netdev = netdev.clone();
                Ok(netdev.ifindex)
            }
            None => Err(EswitchError::DeviceGone {
                detail: format!("device {} has no interface {} now", self.device.name(), self.netdev.name),
            }),
        }
    }

    /// Asks the kernel about the PF and its VFs.
    fn report(&mut self, with_stats: bool) -> Result<PfReport, EswitchError> {
        let ifindex = self.ifindex()?;
        let question = codec::get(ifindex, with_stats);
        let answers = self
            .connection
            .request(codec::GET_LINK, &question, 0)
            .map_err(|refusal| errors::of_request("reading VFs", &refusal))?;
        let report = answers
            .iter()
            .find(|answer| answer.kind == codec::NEW_LINK)
            .and_then(|answer| codec::pf_report(&answer.payload));
        report.ok_or_else(|| EswitchError::Broken {
            operation: "reading VFs".into(),
            detail: "the kernel sent no description of the PF".into(),
        })
    }

    /// The PF, and one VF of it.
    fn report_of(&mut self, vf: VfIndex) -> Result<(PfReport, VfReport), EswitchError> {
        let report = self.report(false)?;
        if u32::from(vf.0) >= report.vf_count {
            return Err(EswitchError::NoSuchVf(vf));
        }
        match report.vfs.iter().find(|one| one.index == u32::from(vf.0)).cloned() {
            Some(found) => Ok((report, found)),
            None => Err(EswitchError::Broken {
                operation: format!("reading {vf}"),
                detail: format!(
                    "the kernel listed {} of {} VFs; does the driver have VF settings at all?",
                    report.vfs.len(),
                    report.vf_count
                ),
            }),
        }
    }

    fn settings(vf: VfIndex, report: &VfReport) -> Result<VfSettings, EswitchError> {
        report
            .settings()
            .map_err(|detail| EswitchError::Broken { operation: format!("reading {vf}"), detail })
    }

    /// Tells the driver one thing about a VF.
    fn write(&mut self, vf: VfIndex, setting: &Setting) -> Result<(), EswitchError> {
        let ifindex = self.ifindex()?;
        self.writes += 1;
        let payload = codec::set(ifindex, vf, setting);
        let Err(refusal) = self.connection.request(codec::SET_LINK, &payload, 0) else { return Ok(()) };
        let error = errors::of_setting(setting.feature(), &format!("{vf} {}", setting.name()), &refusal);
        let EswitchError::Uncovered { detail, .. } = &error else { return Err(error) };
        // Drivers refuse in the same words what they cannot do now.
        let (report, _) = self.report_of(vf)?;
        match setting {
            Setting::Rates { .. } if !report.running => Err(EswitchError::Busy {
                detail: format!(
                    "{detail}; {} has no carrier, and a rate is part of its speed",
                    self.netdev.name
                ),
            }),
            _ => Err(error),
        }
    }

    /// Writes what differs, and reads back that the NIC took it.
    fn apply(&mut self, vf: VfIndex, settings: &[Setting], wanted: &VfSettings) -> Result<(), EswitchError> {
        for setting in settings {
            self.write(vf, setting)?;
        }
        let (_, report) = self.report_of(vf)?;
        let found = Self::settings(vf, &report)?;
        match steps(&found, wanted).first() {
            None => Ok(()),
            Some(setting) => Err(EswitchError::Uncovered {
                feature: setting.feature(),
                detail: format!("{vf} {}: it was set, and reads back as before", setting.name()),
            }),
        }
    }
}

/// A VF that is gone has nothing of ours, and passes nothing.
fn unless_gone(result: Result<(), EswitchError>) -> Result<(), EswitchError> {
    match result {
        Err(EswitchError::NoSuchVf(_) | EswitchError::DeviceGone { .. }) => Ok(()),
        result => result,
    }
}

impl Eswitch for Legacy {
    fn capabilities(&mut self) -> Result<Capabilities, EswitchError> {
        self.probe()
    }

    fn vfs(&mut self) -> Result<Vec<Vf>, EswitchError> {
        let count = u16::try_from(self.report(false)?.vf_count).unwrap_or(u16::MAX);
        self.programmed.retain(|vf| vf.0 < count);
        Ok((0..count).map(|index| self.device.vf(VfIndex(index))).collect())
    }

    fn program(&mut self, vf: VfIndex, program: &Program) -> Result<(), EswitchError> {
        let Program::Legacy(wanted) = program else { return Err(EswitchError::WrongMode) };
        let (_, report) = self.report_of(vf)?;
        let settings = steps(&Self::settings(vf, &report)?, wanted);
        if settings.len() > 1 && self.is_open(vf, &report)? {
            return Err(EswitchError::Open(vf));
        }
        self.programmed.insert(vf);
        if settings.is_empty() {
            return Ok(());
        }
        let Err(error) = self.apply(vf, &settings, wanted) else { return Ok(()) };
        match unless_gone(self.close(vf)) {
            Ok(()) => Err(error),
            Err(closing) => Err(EswitchError::Broken {
                operation: format!("closing {vf} after a failure"),
                detail: format!("{closing}; the failure was: {error}"),
            }),
        }
    }

    fn read_back(&mut self, vf: VfIndex) -> Result<Observed, EswitchError> {
        let (_, report) = self.report_of(vf)?;
        let enforced = Enforced::Legacy(Self::settings(vf, &report)?);
        Ok(Observed { enabled: self.is_open(vf, &report)?, enforced, foreign: Vec::new() })
    }

    fn stats(&mut self, vf: VfIndex) -> Result<VfStats, EswitchError> {
        let report = self.report(true)?;
        if u32::from(vf.0) >= report.vf_count {
            return Err(EswitchError::NoSuchVf(vf));
        }
        // With more than 200 VFs the kernel's list ends early.
        let found = report.vfs.iter().find(|one| one.index == u32::from(vf.0));
        Ok(found.map(|one| one.stats).unwrap_or_default())
    }

    fn unprogram(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        unless_gone(self.close(vf))?;
        let given_back = (|| {
            let (_, report) = self.report_of(vf)?;
            let found = Self::settings(vf, &report)?;
            for setting in steps(&found, &pristine(&found, report.spoofchk.is_some())) {
                match self.write(vf, &setting) {
                    // Some drivers know no way back to "no address". It is closed, which is what counts.
                    Ok(()) | Err(EswitchError::Uncovered { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(())
        })();
        unless_gone(given_back)?;
        self.programmed.remove(&vf);
        Ok(())
    }

    fn enable(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        self.open_gate(vf)
    }

    fn disable(&mut self, vf: VfIndex) -> Result<(), EswitchError> {
        unless_gone(self.close(vf))
    }

    fn sync_unicast_filter(&mut self, macs: &BTreeSet<MacAddr>) -> Result<(), EswitchError> {
        let ifindex = self.ifindex()?;
        let answers = self
            .connection
            .dump(filter::GET_NEIGHBOUR, &filter::list(ifindex))
            .map_err(|refusal| errors::of_request("reading the PF's unicast filter", &refusal))?;
        let found = filter::addresses(ifindex, answers.iter().map(|answer| answer.payload.as_slice()));
        self.filter.retain(|mac| found.contains(mac));
        let stale: Vec<MacAddr> = self.filter.difference(macs).copied().collect();
        for mac in stale {
            self.change_filter(ifindex, mac, false)?;
        }
        for mac in macs.difference(&found) {
            self.change_filter(ifindex, *mac, true)?;
        }
        Ok(())
    }

    fn sync_vlans(&mut self, vlans: &BTreeSet<VlanId>) -> Result<(), EswitchError> {
        let pf = self.ifindex()?;
        if vlans.len() > vlans::VLANS_MAX {
            let detail = format!(
                "{} VLANs in software, and {} can be told to receive {}; name fewer in trunks",
                vlans.len(),
                self.netdev.name,
                vlans::VLANS_MAX
            );
            return Err(EswitchError::TableFull { detail });
        }
        let answers = self
            .connection
            .dump(codec::GET_LINK, &vlans::list())
            .map_err(|refusal| errors::of_request("reading the PF's VLANs", &refusal))?;
        let found = vlans::members(pf, answers.iter().map(|answer| (answer.kind, answer.payload.as_slice())));
        for (vlan, member) in found.iter().filter(|(vlan, member)| member.is_ours && !vlans.contains(vlan)) {
            self.writes += 1;
            self.connection
                .request(vlans::DELETE_LINK, &vlans::leave(member.ifindex), 0)
                .map_err(|refusal| errors::of_request(&format!("leaving VLAN {vlan}"), &refusal))?;
        }
        for vlan in vlans.iter().filter(|vlan| !found.contains_key(vlan)) {
            use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL};
            self.writes += 1;
            self.connection
                .request(codec::NEW_LINK, &vlans::join(pf, *vlan), NLM_F_CREATE | NLM_F_EXCL)
                .map_err(|refusal| {
                    let what = format!("joining VLAN {vlan} (is the module 8021q there?)");
                    errors::of_request(&what, &refusal)
                })?;
        }
        Ok(())
    }

    fn writes(&self) -> u64 {
        self.writes
    }
}

impl Legacy {
    fn change_filter(&mut self, ifindex: u32, mac: MacAddr, add: bool) -> Result<(), EswitchError> {
        use netlink_packet_core::NLM_F_CREATE;
        let (kind, flags, what) = match add {
            true => (filter::NEW_NEIGHBOUR, NLM_F_CREATE, "adding to"),
            false => (filter::DELETE_NEIGHBOUR, 0, "removing from"),
        };
        self.writes += 1;
        let result = self.connection.request(kind, &filter::entry(ifindex, mac), flags);
        match result {
            Err(refusal) if !add && refusal.errno() == nix::errno::Errno::ENOENT as i32 => {}
            Err(refusal) => {
                let what = format!("{what} the unicast filter of {}: {mac}", self.netdev.name);
                return Err(errors::of_filter(&what, &refusal));
            }
            Ok(_) => {}
        }
        match add {
            true => self.filter.insert(mac),
            false => self.filter.remove(&mac),
        };
        Ok(())
    }
}
