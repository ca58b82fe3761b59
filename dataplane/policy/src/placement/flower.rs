//! Placement on an eSwitch in switchdev mode, as rules that tc flower can hold (tc-flower(8)).

mod rule;

use super::{Capabilities, Feature, Neighbours, Uncovered, common};
use crate::config::{Config, Switch, Vnic};

pub use rule::{FlowerAction, FlowerMatch, FlowerProgram, FlowerRule, RulePort, Target, VlanMatch};

/// The rules, or nothing and at least one reason more in `uncovered`.
pub(super) fn place(
    _config: &Config,
    switch: &Switch,
    vnic: &Vnic,
    capabilities: &Capabilities,
    _neighbours: &Neighbours,
    uncovered: &mut Vec<Uncovered>,
) -> Option<FlowerProgram> {
    common(switch, vnic, capabilities, uncovered);
    uncovered.push(Uncovered::new(
        Feature::Offload,
        "policies are not placed on switchdev eSwitches by this version",
        "put the NIC into legacy mode: `devlink dev eswitch set DEV mode legacy`",
    ));
    None
}
