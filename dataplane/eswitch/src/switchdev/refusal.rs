//! What a refusal by the kernel or the driver means in the contract's terms.

use nix::errno::Errno;
use sluice_policy::placement::{Feature, FlowerAction, FlowerRule};

use crate::contract::EswitchError;
use crate::netlink::Refusal;

/// A refusal of something other than a rule.
pub(super) fn general(operation: &str, refusal: &Refusal) -> EswitchError {
    let detail = format!("{operation}: {refusal}");
    match Errno::from_raw(refusal.errno()) {
        Errno::EBUSY | Errno::EAGAIN | Errno::ETIMEDOUT | Errno::EINTR => EswitchError::Busy { detail },
        Errno::ENODEV | Errno::ENXIO => EswitchError::DeviceGone { detail },
        Errno::EPERM | Errno::EACCES => EswitchError::NotPermitted { detail },
        Errno::ENOSPC => EswitchError::TableFull { detail },
        Errno::EOPNOTSUPP => EswitchError::Uncovered { feature: Feature::Offload, detail },
        _ => EswitchError::Broken { operation: operation.to_owned(), detail: refusal.to_string() },
    }
}

/// A refusal of a rule.
pub(super) fn of_rule(rule: &FlowerRule, refusal: &Refusal) -> EswitchError {
    match Errno::from_raw(refusal.errno()) {
        Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ERANGE => {
            EswitchError::Uncovered { feature: feature(rule), detail: format!("{}: {refusal}", name(rule)) }
        }
        _ => general(&name(rule), refusal),
    }
}

/// The part of a policy that fails with a rule, as far as the rule tells.
pub(super) fn feature(rule: &FlowerRule) -> Feature {
    if rule.actions.iter().any(|action| matches!(action, FlowerAction::Police(_))) {
        Feature::RateFromVm
    } else {
        Feature::Offload
    }
}

/// What to call a rule.
pub(super) fn name(rule: &FlowerRule) -> String {
    format!(
        "the rule of chain {} and priority {} on the representor of {}",
        rule.chain,
        rule.priority,
        match rule.port {
            sluice_policy::placement::RulePort::Own => "the VF",
            sluice_policy::placement::RulePort::Uplink => "the uplink",
        }
    )
}
