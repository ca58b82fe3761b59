//! Statuses: from what the engine reports to what the API says.

use std::collections::BTreeMap;

use sluice_kernel::{HooksInUse, Observation, PortState, PortStatus};
use sluice_policy::config::Config;
use sluice_policy::ids::Ids;
use sluice_policy::image::Image;
use sluice_policy::lower::{self, PortSpec};
use sluice_proto::v1;
use sluice_proto::v1::port_status::{Reason, State};

use super::vfs::Vfs;
use crate::convert::{self, Spec};
use crate::store::Entry;

/// Statuses of an image's ports after a sync.
pub(super) fn ports(
    image: &Image,
    observation: &Observation,
    reported: &BTreeMap<String, PortStatus>,
) -> BTreeMap<String, v1::PortStatus> {
    let statuses = image.ports.iter().map(|(id, port)| {
        let mut status = v1::PortStatus {
            port: port.name.clone(),
            netdev: port.netdev.clone(),
            id: *id,
            ..v1::PortStatus::default()
        };
        if let Some(report) = reported.get(&port.name) {
            status.ifindex = report.ifindex.unwrap_or_default();
            status.notes = report.notes.clone();
            match &report.state {
                PortState::Attached => {
                    status.set_state(State::Attached);
                    let hooks: &[v1::Hook] = match report.hooks {
                        HooksInUse::Tcx => &[v1::Hook::Tcx],
                        HooksInUse::XdpAndTcx => &[v1::Hook::Xdp, v1::Hook::Tcx],
                        HooksInUse::Userspace => &[],
                    };
                    status.hooks = hooks.iter().map(|hook| (*hook).into()).collect();
                }
                PortState::Pending { reason } => pending(&mut status, reason),
                PortState::Failed { error } => {
                    status.set_state(State::Failed);
                    status.set_reason(Reason::AttachFailed);
                    status.message = error.clone();
                }
            }
        } else {
            pending(&mut status, "the interface is not there");
        }
        if let Some(reason) = observation.absent.get(&port.name) {
            pending(&mut status, reason);
        }
        (port.name.clone(), status)
    });
    statuses.collect()
}

fn pending(status: &mut v1::PortStatus, reason: &str) {
    status.set_state(State::Pending);
    status.set_reason(Reason::NetdevAbsent);
    status.message = reason.to_owned();
}

/// Statuses of ports when the engine could not be programmed.
pub(super) fn failed(ports: &[PortSpec], ids: &Ids, error: &str) -> BTreeMap<String, v1::PortStatus> {
    let statuses = ports.iter().map(|port| {
        let mut status = v1::PortStatus {
            port: port.name.clone(),
            netdev: port.netdev.clone(),
            id: ids.ports.get(&port.name).unwrap_or_default(),
            message: error.to_owned(),
            ..v1::PortStatus::default()
        };
        status.set_state(State::Failed);
        status.set_reason(Reason::EngineFailed);
        (port.name.clone(), status)
    });
    statuses.collect()
}

/// A resource with the status that its ports give it.
pub(super) fn resource(
    entry: &Entry,
    ports: &BTreeMap<String, v1::PortStatus>,
    vfs: &Vfs,
    config: &Config,
) -> v1::Resource {
    let mut wanted = Vec::new();
    let (mut path, mut nic) = (None, None);
    match entry.spec.as_ref() {
        Spec::AclGroup(_) => {}
        Spec::Vnic(vnic) => {
            let netdev = vnic.attach.netdev().unwrap_or_default().to_owned();
            wanted.push((lower::vnic_port(&vnic.name), netdev));
            // In switchdev mode its VF has a port too.
            let vf = ports.get(&lower::vf_port(&vnic.name));
            wanted.extend(vf.map(|port| (port.port.clone(), port.netdev.clone())));
            path = Some(vfs.path(vnic, config));
        }
        Spec::Switch(switch) => {
            nic = vfs.nic(&switch.name).cloned();
            if let Some(uplink) = &switch.uplink {
                wanted.push((lower::uplink_port(&switch.name), uplink.netdev.clone()));
            }
            if let Some(internal) = &switch.internal {
                wanted.push((lower::internal_port(&switch.name), lower::internal_port_netdev(internal)));
            }
            // Where guests' rings are served, the trunk to them.
            let trunk = ports.get(&lower::user_port(&switch.name));
            wanted.extend(trunk.map(|port| (port.port.clone(), port.netdev.clone())));
        }
    }
    let mut status = v1::Status { path, nic, ..v1::Status::default() };
    status.set_state(v1::status::State::Ready);
    for (port, netdev) in wanted {
        let found = ports.get(&port).cloned().unwrap_or_else(|| not_reconciled(port, netdev));
        let state = match found.state() {
            State::Attached => v1::status::State::Ready,
            State::Pending | State::Unspecified => v1::status::State::Pending,
            State::Failed => v1::status::State::Failed,
        };
        if i32::from(state) > status.state {
            status.set_state(state);
            status.message = found.message.clone();
        }
        status.ports.push(found);
    }
    let mut resource = convert::resource(&entry.spec, entry.revision);
    resource.status = Some(status);
    resource
}

fn not_reconciled(port: String, netdev: String) -> v1::PortStatus {
    let mut status = v1::PortStatus {
        port,
        netdev,
        message: "no pass has looked at it yet".to_owned(),
        ..v1::PortStatus::default()
    };
    status.set_state(State::Pending);
    status.set_reason(Reason::NotReconciled);
    status
}
