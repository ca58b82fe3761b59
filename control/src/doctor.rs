//! The examination behind `sluice doctor`: the host, the daemon's files, every port, VFs of uplinks, and what happened
//! lately, as a tree with remedies.
//!
//! [`host`] needs no daemon, so that the command line can say something useful when there is none.

mod host;
pub mod sriov;

use std::path::Path;

use sluice_proto::v1;
use sluice_proto::v1::Finding;
use sluice_proto::v1::finding::Level;

use crate::core::Core;
use crate::events::{self, Severity};
use crate::server::Identity;

pub use host::host;

/// Beyond so many ports, only those with something to say are listed.
const PORTS_SHOWN: usize = 50;
const EVENTS_SHOWN: usize = 40;
const AUDIT_SHOWN: usize = 5;

/// A finding without children.
pub fn finding(
    level: Level,
    title: impl Into<String>,
    detail: impl Into<String>,
    remedy: impl Into<String>,
) -> Finding {
    Finding {
        level: level.into(),
        title: title.into(),
        detail: detail.into(),
        remedy: remedy.into(),
        children: Vec::new(),
        code: String::new(),
    }
}

/// A finding that consists of others, as bad as the worst of them.
fn group(title: &str, detail: impl Into<String>, children: Vec<Finding>) -> Finding {
    let worst = children.iter().map(|child| child.level).max().unwrap_or_default();
    Finding {
        level: worst.max(Level::Ok.into()),
        title: title.to_owned(),
        detail: detail.into(),
        remedy: String::new(),
        children,
        code: String::new(),
    }
}

/// Examines everything. Runs in the reconciler's thread.
pub fn examine(core: &Core, identity: &Identity) -> Vec<Finding> {
    let mut findings = vec![
        group("host", "", host(Some(&identity.pin_dir))),
        group(
            "daemon",
            format!("sluiced {}, pid {}", env!("CARGO_PKG_VERSION"), std::process::id()),
            daemon(core, identity),
        ),
        ports(core),
    ];
    findings.extend(sriov::uplinks(&core.view().borrow()));
    findings.push(recent(core));
    findings.push(audit(core));
    findings
}

fn daemon(core: &Core, identity: &Identity) -> Vec<Finding> {
    let view = core.view().borrow().clone();
    let start = match core.start().severity {
        Severity::Info => Level::Ok,
        Severity::Warning | Severity::Error => Level::Note,
    };
    let mut findings = vec![
        finding(start, "start", &core.start().text, ""),
        finding(Level::Ok, "instance", &identity.instance, ""),
        finding(
            Level::Ok,
            "desired state",
            format!(
                "{} resources at revision {}, in {}",
                view.resources.len(),
                view.revision,
                identity.state_dir.display()
            ),
            "",
        ),
    ];
    if let Some(failure) = core.store().failure() {
        findings.push(finding(
            Level::Problem,
            "last change",
            format!("it could not be stored, and nothing was changed: {failure}"),
            format!(
                "see to the disk of {} (is it full? df, dmesg), then make the change again; sluiced needs no restart",
                identity.state_dir.display()
            ),
        ));
    }
    if identity.runtime_dir.join("state.pb").exists() || view.revision == 0 {
        findings.push(finding(Level::Ok, "runtime copy", identity.runtime_dir.display().to_string(), ""));
    } else {
        findings.push(finding(
            Level::Warning,
            "runtime copy",
            format!("missing in {}", identity.runtime_dir.display()),
            "it is written again within ten seconds; if not, see the events below",
        ));
    }
    findings.push(pins(&identity.pin_dir));
    if core.is_untouched() {
        findings.push(finding(
            Level::Warning,
            "tables of an unknown past",
            "pinned tables are in force, but no desired state was found to compare them with",
            "apply the configuration (sluice apply -f FILE), or start over with sluiced --purge",
        ));
    }
    findings
}

fn pins(dir: &Path) -> Finding {
    let count = |dir: &Path| std::fs::read_dir(dir).map(Iterator::count);
    let counts: Result<Vec<String>, std::io::Error> = ["maps", "progs", "links"]
        .iter()
        .map(|kind| Ok(format!("{} {kind}", count(&dir.join(kind))?)))
        .collect();
    match counts {
        Ok(counts) => finding(Level::Ok, "pins", format!("{} in {}", counts.join(", "), dir.display()), ""),
        Err(error) => finding(
            Level::Problem,
            "pins",
            format!("{}: {error}", dir.display()),
            "they are made again within ten seconds; if not, mount a bpffs there: mount -t bpf bpf /sys/fs/bpf",
        ),
    }
}

fn ports(core: &Core) -> Finding {
    let children: Vec<Finding> = core
        .ports()
        .values()
        .map(|port| {
            let hooks: Vec<&str> = port.hooks().map(|hook| hook.as_str_name()).collect();
            let mut found = match port.state() {
                v1::port_status::State::Attached if port.netdev.is_empty() => {
                    finding(Level::Ok, &port.port, "attached to its guest, in user space", "")
                }
                v1::port_status::State::Attached => finding(
                    Level::Ok,
                    &port.port,
                    format!(
                        "attached to {} (ifindex {}) by {}",
                        port.netdev,
                        port.ifindex,
                        hooks.join(" and ")
                    ),
                    "",
                ),
                v1::port_status::State::Pending | v1::port_status::State::Unspecified => finding(
                    Level::Note,
                    &port.port,
                    format!("pending: {}", port.message),
                    if port.netdev.is_empty() {
                        "start the VM with this socket and shared memory; it is attached by itself".to_owned()
                    } else {
                        format!("create the interface {}; it is attached by itself", port.netdev)
                    },
                ),
                v1::port_status::State::Failed => finding(
                    Level::Problem,
                    &port.port,
                    &port.message,
                    "it is tried again every ten seconds and whenever the interface changes",
                ),
            };
            found.children.extend(port.notes.iter().map(|note| finding(Level::Note, "note", note, "")));
            found
        })
        .collect();
    let attached =
        core.ports().values().filter(|port| port.state() == v1::port_status::State::Attached).count();
    let mut detail = format!("{attached} of {} attached", children.len());
    let mut children = children;
    if children.len() > PORTS_SHOWN {
        children.retain(|child| child.level() != Level::Ok || !child.children.is_empty());
        detail.push_str("; those that are, without a note, are not listed");
    }
    group("ports", detail, children)
}

fn recent(core: &Core) -> Finding {
    let mut children: Vec<Finding> = core
        .events()
        .newest()
        .take(EVENTS_SHOWN)
        .map(|event| {
            let level = match event.severity {
                Severity::Info => Level::Ok,
                Severity::Warning | Severity::Error => Level::Note,
            };
            let times = if event.count > 1 { format!(" ({} times)", event.count) } else { String::new() };
            finding(level, events::print_time(event.at), format!("{}{times}", event.text), "")
        })
        .collect();
    children.reverse();
    group("recent events", "UTC, oldest first", children)
}

fn audit(core: &Core) -> Finding {
    match core.store().audit(AUDIT_SHOWN) {
        Ok(entries) => {
            let children = entries.iter().map(|entry| {
                let at = events::print_time(std::time::Duration::from_millis(entry.unix_ms));
                let detail = format!(
                    "revision {} by {}: {} changes",
                    entry.revision,
                    entry.actor,
                    entry.changes.len()
                );
                finding(Level::Ok, at, detail, "")
            });
            group("last changes", "UTC, oldest first", children.collect())
        }
        Err(error) => finding(
            Level::Problem,
            "last changes",
            error.to_string(),
            "check the disk of the state directory",
        ),
    }
}
