//! One PF with its eSwitch, in whatever mode that is: what the daemon holds of a NIC.
//!
//! [`HostNic`] is a PF of this machine; it asks devlink for the mode and opens the back-end for it. [`SoftNic`] is the
//! same over a model, for tests. Modes flip, PFs are unplugged, renamed and reset, and numbers of VFs change, all by other
//! hands; [`refresh`](Nic::refresh) notices, opens the right back-end again and says what changed. Whoever owns a `Nic`
//! calls it after a notice from [`watch`](crate::watch) and at intervals.
//!
//! All calls block, and come from one thread; a `Nic` may be made in one thread and used in another.

pub(crate) mod firmware;
mod host;
mod identity;
mod soft;
pub mod usage;

use std::collections::BTreeSet;
use std::fmt;

use sluice_policy::net::MacAddr;
use sluice_policy::placement::{Capabilities, Mode};

use crate::contract::{Eswitch, EswitchError, VfIndex};
use crate::switchdev::Representors;

pub use host::HostNic;
pub use identity::{Identity, PciId};
pub use soft::SoftNic;

/// A PF with its eSwitch. See the module's text.
pub trait Nic: Send {
    /// The PF's interface, as it was called when it was last looked at.
    fn netdev(&self) -> &str;

    /// Whether the PF was there when it was last looked at.
    fn is_present(&self) -> bool;

    /// The eSwitch's mode when it was last looked at.
    fn mode(&self) -> Mode;

    /// Which NIC it is.
    fn identity(&self) -> &Identity;

    /// The eSwitch. While the PF is gone, all that it answers is that.
    fn eswitch(&mut self) -> &mut dyn Eswitch;

    /// Looks whether mode, device, name or VFs changed since the last time, and opens the eSwitch again if need be. It
    /// writes nothing, and costs a question to devlink and some reading in sysfs.
    ///
    /// # Errors
    /// Of class passing or broken, if it could not look. A PF that is gone is no error but [`Change::Gone`].
    fn refresh(&mut self) -> Result<Refresh, EswitchError>;

    /// Whether opening a VF binds its driver: then it has no interface before, and what gives it to a guest comes after
    /// [`enable`](Eswitch::enable). Never so in switchdev mode.
    ///
    /// # Errors
    /// Of class passing, gone or broken.
    fn opens_by_binding(&mut self, vf: VfIndex) -> Result<bool, EswitchError>;

    /// Has opening this VF bind a driver, such as `vfio-pci`, where it binds one; `None`: the usual one for its interface.
    /// For the next time that it is opened.
    fn use_vf_driver(&mut self, vf: VfIndex, driver: Option<&str>);

    /// How many VFs there can be; `None` if the device does not say.
    fn vf_limit(&self) -> Option<u16>;

    /// Makes this number of VFs, for operators' tools; the mode stays. All VFs go, and new ones come: closed, and without
    /// drivers. Nothing is written if there are so many already.
    ///
    /// # Errors
    /// [`EswitchError::Busy`] when one of them runs a program of ours: nothing was done; otherwise of any class.
    fn set_vf_count(&mut self, count: u16) -> Result<(), EswitchError>;

    /// Puts the eSwitch into a mode, with this number of VFs, all closed; in the order that the NIC wants. Where that
    /// fails half-way, the former mode and number are put back. Nothing is written if all is so already.
    ///
    /// # Errors
    /// [`EswitchError::Busy`] when a VF runs a program of ours: nothing was done; [`EswitchError::Uncovered`] if the NIC
    /// has no such mode; otherwise of any class.
    fn set_mode(&mut self, mode: Mode, vfs: u16) -> Result<(), EswitchError>;

    /// The interfaces that stand for the eSwitch's ports, which are ports of the kernel engine; `None` in legacy mode.
    ///
    /// # Errors
    /// Of class gone or broken.
    fn representors(&mut self) -> Result<Option<Representors>, EswitchError>;

    /// The addresses in the PF's unicast filter that are ours, to be kept for
    /// [`adopt_unicast_filter`](Nic::adopt_unicast_filter) after a restart.
    fn unicast_filter(&self) -> BTreeSet<MacAddr>;

    /// Says which addresses were put into the PF's unicast filter in a former life.
    fn adopt_unicast_filter(&mut self, macs: &BTreeSet<MacAddr>);

    /// Says what the same NIC, with the same firmware, was found to be able to in a former life of the same boot. Where
    /// finding out would turn knobs, they are left alone as long as nothing has changed. Nothing to gain in switchdev mode.
    fn adopt_capabilities(&mut self, _capabilities: &Capabilities) {}

    /// How many writes to the NIC have been tried since the first [`open`](HostNic::open), through all back-ends.
    fn writes(&self) -> u64;
}

/// What was found to be otherwise than before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The PF was unplugged, or lost its driver, or went to another network namespace.
    Gone,
    /// It is there again, or it is another one: whatever was programmed is lost.
    Back,
    /// Its interface has another name.
    Renamed {
        /// The name before.
        from: String,
        /// The name now.
        to: String,
    },
    /// The eSwitch's mode flipped: whatever was programmed is lost.
    Mode {
        /// The mode now.
        to: Mode,
    },
    /// Somebody wrote `sriov_numvfs`.
    VfCount {
        /// The number before.
        from: u16,
        /// The number now.
        to: u16,
    },
    /// There are as many VFs as before, but they were removed and made anew: whatever was programmed is lost.
    VfsRemade,
    /// The NIC is another one, or has other firmware: what is known about it may not hold.
    Identity,
}

impl Change {
    /// Whether programs of VFs are lost with it, of all that there are now.
    pub const fn loses_programs(&self) -> bool {
        match self {
            Change::Gone
            | Change::Back
            | Change::Mode { .. }
            | Change::VfCount { .. }
            | Change::VfsRemade => true,
            Change::Renamed { .. } | Change::Identity => false,
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Change::Gone => f.write_str("the PF is gone"),
            Change::Back => f.write_str("the PF is back, and empty"),
            Change::Renamed { from, to } => write!(f, "{from} is called {to} now"),
            Change::Mode { to: Mode::Legacy } => f.write_str("the eSwitch is in legacy mode now"),
            Change::Mode { to: Mode::Switchdev } => f.write_str("the eSwitch is in switchdev mode now"),
            Change::VfCount { from, to } => write!(f, "sriov_numvfs was {from} and is {to} now"),
            Change::VfsRemade => f.write_str("all VFs were removed and made anew"),
            Change::Identity => f.write_str("it is another NIC, or has other firmware"),
        }
    }
}

/// What [`Nic::refresh`] found, in the order in which it matters. Nothing, mostly.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Refresh {
    /// The changes.
    pub changes: Vec<Change>,
}

impl Refresh {
    /// Whether all is as it was.
    pub const fn is_unchanged(&self) -> bool {
        self.changes.is_empty()
    }

    /// Whether programs of VFs are lost.
    pub fn loses_programs(&self) -> bool {
        self.changes.iter().any(Change::loses_programs)
    }
}

impl fmt::Display for Refresh {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_unchanged() {
            return f.write_str("nothing changed");
        }
        let texts: Vec<String> = self.changes.iter().map(ToString::to_string).collect();
        f.write_str(&texts.join("; "))
    }
}
