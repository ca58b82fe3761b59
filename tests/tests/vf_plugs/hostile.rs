//! Guests that do what they like with a VF of an igb port. It comes back, or is taken with its driver; never does
//! anything hang.

use anyhow::{Result, bail, ensure};
use sluice_control::vf::plug::{Candidate, Plug, PlugError, Progress};
use sluice_eswitch::contract::Eswitch;
use sluice_eswitch::legacy::Legacy;
use sluice_tests::lab_guest::PATIENCE;
use sluice_tests::{Netns, wait_until};

use super::{
    PORT, VF, candidate, done, driver, ip, ip_in, is_active, namespace, open_vf, plug_into, refused,
};

/// The VF in a guest without a bond, as `vf0`.
fn plugged(role: &str) -> Result<(Legacy, Candidate, Netns, impl Plug)> {
    let (eswitch, vf) = open_vf()?;
    let guest = namespace(role)?;
    let mut plug = plug_into(&guest, "vf0", None);
    done("plugging", || plug.plug(&vf))?;
    ip_in(&guest, "link set vf0 up")?;
    is_active(&mut plug, &vf)?;
    Ok((eswitch, vf, guest, plug))
}

/// The VF is the host's again, under the name that it had.
fn is_back(eswitch: &mut Legacy, vf: &Candidate) -> Result<()> {
    let now = candidate(eswitch)?;
    ensure!(now.netdev == vf.netdev, "{:?} is back, not {:?}", now.netdev, vf.netdev);
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_guest_renames_it() -> Result<()> {
    let (mut eswitch, vf, guest, mut plug) = plugged("renames")?;
    ip_in(&guest, "link set vf0 down")?;
    ip_in(&guest, "link set vf0 name mine0")?;
    ip_in(&guest, "link set mine0 up")?;
    is_active(&mut plug, &vf)?;
    // It is called as it should be by whoever plugs again.
    done("plugging", || plug.plug(&vf))?;
    ensure!(guest.ifindex("vf0")?.is_some(), "it still has the guest's name");
    ip_in(&guest, "link set vf0 down")?;
    // A name that the host needs.
    ip_in(&guest, &format!("link set vf0 name {PORT}"))?;
    ip_in(&guest, &format!("link property add dev {PORT} altname lo1"))?;
    done("unplugging", || plug.unplug(&vf, false))?;
    is_back(&mut eswitch, &vf)?;
    Ok(eswitch.unprogram(VF)?)
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_guest_gives_it_further_names_that_the_host_uses() -> Result<()> {
    let (mut eswitch, vf, guest, mut plug) = plugged("altnames")?;
    for name in [PORT, "pf1"] {
        ip_in(&guest, &format!("link property add dev vf0 altname {name}"))?;
    }
    done("unplugging", || plug.unplug(&vf, false))?;
    is_back(&mut eswitch, &vf)?;
    Ok(eswitch.unprogram(VF)?)
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_guest_puts_it_into_a_bridge_and_other_interfaces_on_it() -> Result<()> {
    let (mut eswitch, vf, guest, mut plug) = plugged("bridge")?;
    ip_in(&guest, "link add link vf0 name vf0.7 type vlan id 7")?;
    ip_in(&guest, "link add br0 type bridge")?;
    ip_in(&guest, "link set vf0 master br0")?;
    ip_in(&guest, "link set vf0 promisc on allmulticast on")?;
    done("unplugging", || plug.unplug(&vf, false))?;
    is_back(&mut eswitch, &vf)?;
    let shown = ip(&format!("-d link show {}", vf.netdev.as_deref().unwrap_or_default()))?;
    ensure!(
        !shown.contains("PROMISC") && !shown.contains("ALLMULTI") && !shown.contains("master"),
        "{shown}"
    );
    Ok(eswitch.unprogram(VF)?)
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_guest_moves_it_on() -> Result<()> {
    let (mut eswitch, vf, guest, mut plug) = plugged("moves")?;
    let third = namespace("third")?;
    ip_in(&guest, &format!("link set vf0 netns {}", third.name()))?;
    ensure!(!plug.is_active(&vf)?, "it is not there");
    refused("has moved the VF out", || plug.unplug(&vf, false))?;
    refused("somebody else uses it", || plug.plug(&vf))?;
    ensure!(third.ifindex("vf0")?.is_some(), "it was to stay");
    done("taking it by force", || plug.unplug(&vf, true))?;
    ensure!(third.ifindex("vf0")?.is_none() && driver(&vf).is_none(), "it was not taken");
    // The plug gives it a driver again.
    done("plugging", || plug.plug(&vf))?;
    ensure!(guest.ifindex("vf0")?.is_some(), "it is not in the guest");
    done("unplugging", || plug.unplug(&vf, false))?;
    Ok(eswitch.unprogram(VF)?)
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_guests_namespace_is_deleted() -> Result<()> {
    let (mut eswitch, vf, guest, mut plug) = plugged("deleted")?;
    drop(guest);
    let result = plug.plug(&vf);
    ensure!(matches!(result, Err(PlugError::Absent { .. })), "{result:?}");
    done("unplugging", || plug.unplug(&vf, false))?;
    // The kernel brings it home, by a name of its own choice.
    wait_until("it is back", PATIENCE, || Ok(candidate(&mut eswitch)?.netdev))?;
    Ok(eswitch.unprogram(VF)?)
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn closing_it_takes_it_out_of_the_guest() -> Result<()> {
    let (mut eswitch, vf, guest, mut plug) = plugged("closed")?;
    eswitch.disable(VF)?;
    ensure!(guest.ifindex("vf0")?.is_none(), "igb closes a VF by its driver");
    ensure!(!plug.is_active(&vf)?, "it is closed");
    for by_force in [false, true] {
        ensure!(plug.unplug(&vf, by_force)? == Progress::Done, "it is gone");
    }
    // And all VFs at once.
    std::fs::write(format!("/sys/class/net/{PORT}/device/sriov_numvfs"), "0")?;
    for by_force in [false, true] {
        ensure!(plug.unplug(&vf, by_force)? == Progress::Done, "it is gone");
    }
    match plug.plug(&vf) {
        Err(PlugError::Failed { detail, .. }) if detail.contains("gone") => Ok(()),
        other => bail!("{other:?}"),
    }
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn bonds_that_would_lose_frames_are_refused() -> Result<()> {
    let (mut eswitch, vf) = open_vf()?;
    let guest = namespace("bonds")?;
    ip_in(&guest, "link add other0 type veth peer name other1")?;
    let mut plug = plug_into(&guest, "vf0", Some("bond0"));
    for (make, words) in
        [("mode balance-rr miimon 100", "active-backup"), ("mode active-backup miimon 0", "miimon")]
    {
        ip_in(&guest, &format!("link add bond0 type bond {make}"))?;
        refused(words, || plug.check().map(|()| Progress::Done))?;
        refused(words, || plug.plug(&vf))?;
        done("unplugging", || plug.unplug(&vf, false))?;
        is_back(&mut eswitch, &vf)?;
        ip_in(&guest, "link del bond0")?;
    }
    // The vNIC's address, or none of its own yet.
    ip_in(&guest, "link add bond0 type bond mode active-backup miimon 100")?;
    ip_in(&guest, "link set other0 down")?;
    ip_in(&guest, "link set other0 master bond0")?;
    plug.check()?;
    refused("give it that", || plug.plug(&vf))?;
    ip_in(&guest, "link set other0 nomaster")?;
    ip_in(&guest, "link del bond0")?;
    ip_in(&guest, "link add bond0 type bond mode active-backup miimon 100")?;
    ip_in(&guest, "link set bond0 up")?;
    done("plugging", || plug.plug(&vf))?;
    is_active(&mut plug, &vf)?;
    // The guest deletes the bond under it.
    ip_in(&guest, "link del bond0")?;
    ensure!(!plug.is_active(&vf)?, "there is no bond");
    refused("there is no bond", || plug.plug(&vf))?;
    done("unplugging", || plug.unplug(&vf, false))?;
    is_back(&mut eswitch, &vf)?;
    Ok(eswitch.unprogram(VF)?)
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_daemon_in_a_namespace_of_its_own_finds_it_where_drivers_make_it() -> Result<()> {
    let (mut eswitch, vf) = open_vf()?;
    let (daemon, guest) = (namespace("daemon")?, namespace("guest5")?);
    daemon.enter(|| {
        let mut plug = plug_into(&guest, "vf0", None);
        done("plugging", || plug.plug(&vf))?;
        ensure!(guest.ifindex("vf0")?.is_some(), "it is not in the guest");
        done("unplugging", || plug.unplug(&vf, false))
    })?;
    let netdev = vf.netdev.as_deref().unwrap_or_default();
    ensure!(daemon.ifindex(netdev)?.is_some(), "it is not with the daemon");
    Ok(eswitch.unprogram(VF)?)
}
