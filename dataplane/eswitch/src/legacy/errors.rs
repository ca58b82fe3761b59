//! The kernel's refusals as the contract's errors: which mean *uncovered*, and which *broken*.

use std::io;

use nix::errno::Errno;
use sluice_policy::placement::Feature;

use crate::contract::EswitchError;
use crate::netlink::Refusal;

/// What refusing a setting means. `what` is the setting, as `ip link` calls it.
pub(crate) fn of_setting(feature: Feature, what: &str, refusal: &Refusal) -> EswitchError {
    let detail = format!("{what}: {refusal}");
    match Errno::from_raw(refusal.errno()) {
        // Drivers answer all of these to a knob or a value that they do not have.
        Errno::EOPNOTSUPP | Errno::EPROTONOSUPPORT | Errno::ENOSYS | Errno::EINVAL | Errno::ERANGE => {
            EswitchError::Uncovered { feature, detail }
        }
        _ => general(format!("setting {what}"), refusal.errno(), detail),
    }
}

/// What refusing an address in the PF's filter means.
pub(crate) fn of_filter(what: &str, refusal: &Refusal) -> EswitchError {
    let detail = format!("{what}: {refusal}");
    match Errno::from_raw(refusal.errno()) {
        // igb says ENOMEM when its last register is taken.
        Errno::ENOMEM => EswitchError::TableFull { detail },
        _ => general(what.to_owned(), refusal.errno(), detail),
    }
}

/// What refusing a question means.
pub(crate) fn of_request(what: &str, refusal: &Refusal) -> EswitchError {
    general(what.to_owned(), refusal.errno(), refusal.to_string())
}

/// What refusing a mode of the eSwitch means, for a device that is there or not.
pub(crate) fn of_mode(refusal: &Refusal, is_there: bool) -> EswitchError {
    let detail = format!("the eSwitch's mode: {refusal}");
    match Errno::from_raw(refusal.errno()) {
        Errno::ENODEV if is_there => EswitchError::Uncovered {
            feature: Feature::Offload,
            detail: "the device is not in devlink, and has no mode but legacy".into(),
        },
        // Drivers' answers to a mode that they do not have, and the kernel's to one that it does not know.
        Errno::EOPNOTSUPP | Errno::EINVAL | Errno::ERANGE => {
            EswitchError::Uncovered { feature: Feature::Offload, detail }
        }
        _ => general("setting the eSwitch's mode".to_owned(), refusal.errno(), detail),
    }
}

/// What a failure in sysfs means.
pub(crate) fn of_sysfs(what: &str, error: &io::Error) -> EswitchError {
    general(what.to_owned(), error.raw_os_error().unwrap_or(0), format!("{what}: {error}"))
}

fn general(operation: String, errno: i32, detail: String) -> EswitchError {
    match Errno::from_raw(errno) {
        Errno::ENOSPC => EswitchError::TableFull { detail },
        Errno::EBUSY | Errno::EAGAIN | Errno::ETIMEDOUT | Errno::EINTR => EswitchError::Busy { detail },
        Errno::ENODEV | Errno::ENXIO | Errno::ENOENT => EswitchError::DeviceGone { detail },
        Errno::EPERM | Errno::EACCES => EswitchError::NotPermitted { detail },
        _ => EswitchError::Broken { operation, detail },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::contract::ErrorClass;

    #[test]
    fn uncovered_is_told_from_broken_and_the_kernels_words_are_kept() {
        use ErrorClass::{Broken, Gone, Passing, Uncovered};
        for (errno, class) in [
            (Errno::EOPNOTSUPP, Uncovered),
            (Errno::EPROTONOSUPPORT, Uncovered),
            (Errno::EINVAL, Uncovered),
            (Errno::ERANGE, Uncovered),
            (Errno::ENOSPC, Uncovered),
            (Errno::EBUSY, Passing),
            (Errno::EAGAIN, Passing),
            (Errno::ENODEV, Gone),
            (Errno::EPERM, Broken),
            (Errno::EIO, Broken),
        ] {
            let refusal = Refusal {
                error: io::Error::from_raw_os_error(errno as i32),
                extack: Some("only in firmware 9".into()),
            };
            let error = of_setting(Feature::AccessVlan, "VF 3 vlan", &refusal);
            assert_eq!(error.class(), class, "{errno}");
            let text = error.to_string();
            assert!(text.contains("VF 3 vlan") && text.contains("only in firmware 9"), "{text}");
        }
    }
}
