//! Attaching many links at once.
//!
//! The kernel waits for an RCU grace period at every change of an interface's TCX programs, holding the lock of all
//! interfaces: 14 ms each, measured, so a thousand ports took 14 s. With expedited grace periods they take 0.3 s. These
//! interrupt every CPU, so they are asked for only while many links change.

use std::fs;

/// The kernel's switch (`Documentation/admin-guide/kernel-parameters.txt`, `rcupdate.rcu_expedited`).
const SWITCH: &str = "/sys/kernel/rcu_expedited";

/// From so many changes on it pays.
const MANY: usize = 16;

/// Grace periods are expedited as long as this lives, where the kernel lets us.
///
/// A process that is killed meanwhile leaves the switch on, which costs some interrupts and harms nothing.
#[derive(Debug)]
pub(crate) struct Expedited(());

impl Expedited {
    /// Asks for it if there are many changes. `None` if there are not, or it is on anyhow, or we may not.
    pub(crate) fn for_changes(count: usize) -> Option<Expedited> {
        let is_off = count >= MANY && fs::read_to_string(SWITCH).is_ok_and(|text| text.trim() == "0");
        (is_off && fs::write(SWITCH, "1").is_ok()).then_some(Expedited(()))
    }
}

impl Drop for Expedited {
    fn drop(&mut self) {
        if let Err(error) = fs::write(SWITCH, "0") {
            tracing::warn!(%error, "{SWITCH} stays on");
        }
    }
}
