//! The kernel's refusals as the contract's errors: which mean *uncovered*, and which *broken*.

use std::io;

use nix::errno::Errno;
use sluice_policy::placement::Feature;

use crate::contract::EswitchError;
use crate::netlink::Refusal;

/// What refusing a setting means. `what` is the setting, as `ip link` calls it.
pub(super) fn of_setting(feature: Feature, what: &str, refusal: &Refusal) -> EswitchError {
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
pub(super) fn of_filter(what: &str, refusal: &Refusal) -> EswitchError {
    let detail = format!("{what}: {refusal}");
    match Errno::from_raw(refusal.errno()) {
        // igb says ENOMEM when its last register is taken.
        Errno::ENOMEM => EswitchError::TableFull { detail },
        _ => general(what.to_owned(), refusal.errno(), detail),
    }
}

/// What refusing a question means.
pub(super) fn of_request(what: &str, refusal: &Refusal) -> EswitchError {
    general(what.to_owned(), refusal.errno(), refusal.to_string())
}

/// What a failure in sysfs means.
pub(super) fn of_sysfs(what: &str, error: &io::Error) -> EswitchError {
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
