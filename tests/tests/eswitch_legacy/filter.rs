//! The PF's unicast filter: with it a VF reaches a software vNIC of the same NIC, and no longer than it is wanted.

use std::collections::BTreeSet;
use std::process::Command;

use anyhow::{Result, ensure};
use sluice_eswitch::contract::{Eswitch, EswitchError};
use sluice_eswitch::legacy::Legacy;
use sluice_policy::net::{MacAddr, VlanId};
use sluice_tests::netns::check;
use sluice_tests::{Netns, tools};

use super::{PORT, ip, mac, ping, port, vm, writes};

/// What `bridge` shows of a port's own addresses.
fn shown(netdev: &str) -> Result<String> {
    check(Command::new("bridge").args(["fdb", "show", "dev", netdev]))
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_vf_reaches_a_software_vnic_of_the_same_nic() -> Result<()> {
    let mut eswitch = port(7)?;
    let vm1 = vm(&mut eswitch, 0, 1, None)?;
    // A software vNIC, and the shortest software switch between it and the port.
    let software = Netns::create(&format!("sl-{}-legacysw", std::process::id()))?;
    let mac_text = mac(9).to_string();
    let name = software.name();
    check(
        Command::new("ip")
            .args(["link", "add", "slsw", "type", "veth", "peer", "name", "eth0"])
            .args(["address", &mac_text, "netns", name]),
    )?;
    check(Command::new("ip").args(["link", "set", "slsw", "up"]))?;
    software.address("eth0", &format!("{}/24", ip(9)))?;
    software.run(&["ip", "link", "set", "eth0", "up"])?;
    for (from, to) in [(PORT, "slsw"), ("slsw", PORT)] {
        check(Command::new("tc").args(["qdisc", "add", "dev", from, "clsact"]))?;
        let filter = ["filter", "add", "dev", from, "ingress", "matchall"];
        check(Command::new("tc").args(filter).args(["action", "mirred", "egress", "redirect", "dev", to]))?;
    }
    // The guard stops it: frames to an address that the NIC does not know leave by the wire.
    tools::no_ping(&vm1, &ip(9))?;
    let wanted = BTreeSet::from([mac(9)]);
    writes(&mut eswitch, 1, |eswitch| Ok(eswitch.sync_unicast_filter(&wanted)?))?;
    ping(&vm1, 9)?;
    ping(&software, 1)?;
    writes(&mut eswitch, 0, |eswitch| Ok(eswitch.sync_unicast_filter(&wanted)?))?;
    writes(&mut eswitch, 1, |eswitch| Ok(eswitch.sync_unicast_filter(&BTreeSet::new())?))?;
    tools::no_ping(&vm1, &ip(9))?;
    check(Command::new("tc").args(["qdisc", "del", "dev", PORT, "clsact"])).map(drop)
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn only_what_we_put_there_is_taken_away() -> Result<()> {
    let mut eswitch = port(7)?;
    let theirs = mac(40);
    let fdb = |verb: &str, mac: MacAddr| {
        let mac = mac.to_string();
        check(Command::new("bridge").args(["fdb", verb, &mac, "dev", PORT, "self"]))
    };
    fdb("add", theirs)?;
    eswitch.sync_unicast_filter(&BTreeSet::from([mac(41), mac(42)]))?;
    // Somebody removes one of ours: it is put back.
    fdb("del", mac(41))?;
    let both = BTreeSet::from([mac(41), mac(42)]);
    writes(&mut eswitch, 1, |eswitch| Ok(eswitch.sync_unicast_filter(&both)?))?;
    // The next daemon is told what was ours, and takes what is no longer wanted.
    let mut second = Legacy::open(PORT)?;
    second.adopt_unicast_filter(&both);
    writes(&mut second, 1, |second| Ok(second.sync_unicast_filter(&BTreeSet::from([mac(42), theirs]))?))?;
    writes(&mut second, 1, |second| Ok(second.sync_unicast_filter(&BTreeSet::new())?))?;
    let left = shown(PORT)?;
    ensure!(left.contains(&theirs.to_string()), "theirs is gone: {left}");
    ensure!(!left.contains(&mac(41).to_string()) && !left.contains(&mac(42).to_string()), "{left}");
    fdb("del", theirs).map(drop)
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_full_filter_is_said_to_be_full() -> Result<()> {
    let mut eswitch = port(7)?;
    let many: BTreeSet<MacAddr> = (100..200).map(mac).collect();
    match eswitch.sync_unicast_filter(&many) {
        Err(EswitchError::TableFull { detail }) => ensure!(detail.contains("Cannot allocate"), "{detail}"),
        other => anyhow::bail!("100 addresses in a NIC with 24 registers: {other:?}"),
    }
    // What went in is ours, and comes out again.
    eswitch.sync_unicast_filter(&BTreeSet::new())?;
    let left = shown(PORT)?;
    ensure!(!left.contains("02:00:00:00:1e:"), "{left}");
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn vlans_of_ours_come_and_go_and_others_stay() -> Result<()> {
    let mut eswitch = port(7)?;
    let vlans = |vids: &[u32]| vids.iter().map(|vid| VlanId::new(*vid)).collect::<Result<BTreeSet<_>, _>>();
    let links = || check(Command::new("ip").args(["-brief", "link", "show", "type", "vlan"]));
    check(
        Command::new("ip").args(["link", "add", "link", PORT, "name", "theirs", "type", "vlan", "id", "30"]),
    )?;
    let wanted = vlans(&[10, 20, 30])?;
    writes(&mut eswitch, 2, |eswitch| Ok(eswitch.sync_vlans(&wanted)?))?;
    writes(&mut eswitch, 0, |eswitch| Ok(eswitch.sync_vlans(&wanted)?))?;
    let shown = links()?;
    ensure!(shown.contains(".10@") && shown.contains(".20@") && !shown.contains(".30@"), "{shown}");
    // Another life of the daemon knows them again.
    let mut second = Legacy::open(PORT)?;
    second.sync_vlans(&vlans(&[20])?)?;
    ensure!(second.writes() == 1, "{} writes to leave one VLAN", second.writes());
    second.sync_vlans(&BTreeSet::new())?;
    let shown = links()?;
    ensure!(shown.contains("theirs") && !shown.contains("sl"), "{shown}");
    check(Command::new("ip").args(["link", "del", "theirs"])).map(drop)
}
