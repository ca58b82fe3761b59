//! What guests reach, what they do not, and how fast and in what pieces their data comes through.

use std::net::{Ipv4Addr, TcpListener};

use anyhow::{Context, Result, ensure};
use sluice_tests::lab::INTERFACE;
use sluice_tests::tools::{gbits_received, iperf3_server, no_ping};
use sluice_tests::vm::echo::Echo;
use sluice_tests::vm::{Card, ECHO, Guest};
use sluice_tests::wire::{Mac, tags};
use sluice_tests::{PATIENCE, PacketSocket};

use crate::setting::{FORBIDDEN, OTHER_VLAN, Setting, VLAN, WIRE, with_guests};

const QUEUES: Card = Card::SwitchListens { queues: 2 };
/// More than a wire's frame: nobody has cut it.
const SUPER_FRAME: u64 = 3_000;

#[test]
fn real_guests_reach_what_policy_allows_and_nothing_else() -> Result<()> {
    with_guests(QUEUES, |setting| {
        setting.all_reach_each_other()?;
        let Setting { vm1, vm2, out, .. } = setting;
        for guest in [vm1, vm2] {
            let echo = Echo::start(&out.netns, (guest.ip4(), ECHO).into())?;
            echo.wait_more(100_000)?;
            echo.finish().with_context(|| format!("{} echoes", guest.name))?;
        }
        ensure!(vm1.connects(vm2.ip4(), ECHO)? && vm2.connects(vm1.ip4(), ECHO)?, "TCP between guests");
        acls_deny(setting)?;
        addresses_are_guarded(setting)?;
        vlans_separate(setting)
    })
}

/// How often a guest's vNIC has dropped for a reason, while something was done.
fn dropped_by<T>(
    setting: &Setting<'_>,
    guest: &Guest<'_>,
    reason: &str,
    act: impl FnOnce() -> Result<T>,
) -> Result<(T, u64)> {
    let before = setting.lab.sluice().dropped(&guest.port(), reason)?;
    let value = act()?;
    let after = setting.lab.sluice().dropped(&guest.port(), reason)?;
    Ok((value, after - before))
}

fn acls_deny(setting: &Setting<'_>) -> Result<()> {
    let Setting { vm1, vm2, out, .. } = setting;
    // Somebody listens there, and no rule of a host refuses: it is the switch that denies.
    let listen = |port| out.netns.enter(|| Ok(TcpListener::bind((out.ip4(), port))?));
    let _listeners = [listen(FORBIDDEN)?, listen(ECHO)?];
    for (guest, other) in [(vm1, vm2), (vm2, vm1)] {
        ensure!(guest.connects(out.ip4(), ECHO)?, "{} may connect to port {ECHO}", guest.name);
        let (connects, drops) =
            dropped_by(setting, guest, "acl-from-vm", || guest.connects(out.ip4(), FORBIDDEN))?;
        ensure!(!connects && drops > 0, "{} to a denied port: {connects}, {drops} drops", guest.name);

        guest.start("nc -ll -p 22 -e cat")?;
        guest.run("nc -w 2 127.0.0.1 22 -e true")?;
        let (connects, drops) = dropped_by(setting, guest, "acl-to-vm", || other.connects(guest.ip4(), 22))?;
        ensure!(!connects && drops > 0, "to {} at a closed port: {connects}, {drops} drops", guest.name);
    }
    Ok(())
}

fn addresses_are_guarded(setting: &Setting<'_>) -> Result<()> {
    let out = setting.out.ip4();
    for guest in [&setting.vm1, &setting.vm2] {
        guest.run("ip address add 10.77.9.9/16 dev eth0")?;
        let lie = format!("ping -c 1 -W 1 -I 10.77.9.9 {out}");
        let (answer, drops) = dropped_by(setting, guest, "ip-guard-ipv4", || guest.attempt(&lie))?;
        ensure!(answer.status != 0 && drops > 0, "{} lies about its IP address: {answer:?}", guest.name);
        guest.run("ip address del 10.77.9.9/16 dev eth0")?;

        let own = guest.run("cat /sys/class/net/eth0/address")?;
        guest.run("ip link set eth0 address 02:00:00:00:66:66")?;
        let ping = format!("ping -c 1 -W 1 {out}");
        let (answer, drops) = dropped_by(setting, guest, "mac-guard", || guest.attempt(&ping))?;
        ensure!(answer.status != 0 && drops > 0, "{} lies about its MAC address: {answer:?}", guest.name);
        guest.run(&format!("ip link set eth0 address {}", own.trim()))?;
        guest.ping(out)?;
    }
    Ok(())
}

fn is_from(frame: &[u8], mac: Mac) -> bool {
    frame.get(6..12) == Some(&mac[..])
}

fn vlans_separate(setting: &Setting<'_>) -> Result<()> {
    let Setting { lab, vm1, vm2, out, stranger, .. } = setting;
    let (wire, seen) =
        (PacketSocket::open(lab.host(), WIRE)?, PacketSocket::open(&stranger.netns, INTERFACE)?);
    for guest in [vm1, vm2] {
        // Asks everybody who is there who has that address.
        guest.no_ping(Ipv4Addr::new(10, 77, 99, 99))?;
        let frame = wire.expect("the guest's broadcast on the wire", PATIENCE, |frame| {
            is_from(frame, guest.mac()) && frame[..6] == [0xff; 6]
        })?;
        ensure!(tags(&frame) == [(0x8100, VLAN)], "a broadcast of {}: {frame:02x?}", guest.name);
        guest.ping(out.ip4())?;
        let frames = wire.drain(|frame| is_from(frame, guest.mac()))?;
        ensure!(!frames.is_empty(), "{} has sent on the wire", guest.name);
        ensure!(frames.iter().all(|frame| tags(frame) == [(0x8100, VLAN)]), "tags of {}", guest.name);
        // Neither sees the other VLAN.
        no_ping(&stranger.netns, &guest.ip4().to_string())?;
        guest.no_ping(stranger.ip4())?;
    }
    let strayed = seen.drain(|frame| [vm1, vm2].iter().any(|guest| is_from(frame, guest.mac())))?;
    ensure!(strayed.is_empty(), "VLAN {OTHER_VLAN} has seen {strayed:02x?}");
    Ok(())
}

#[test]
fn real_guests_move_data_in_super_frames() -> Result<()> {
    with_guests(QUEUES, |setting| {
        let Setting { vm1, vm2, out, .. } = setting;
        let _server = iperf3_server(&out.netns)?;
        for guest in [vm1, vm2] {
            guest.ping(out.ip4())?;
        }
        vm1.ping(vm2.ip4())?;
        // The receiver is the one that is asked, where `--reverse` is said.
        for (client, server, to) in
            [(vm1, vm2.ip4(), Some(vm2)), (vm1, out.ip4(), None), (vm2, out.ip4(), None)]
        {
            for reverse in [false, true] {
                let label = format!(
                    "{} {} {server}",
                    client.name,
                    if reverse { "receives from" } else { "sends to" }
                );
                let guests: Vec<(&Guest<'_>, bool)> =
                    [(client, reverse)].into_iter().chain(to.map(|guest| (guest, !reverse))).collect();
                let before = guests.iter().map(|(guest, _)| guest.traffic()).collect::<Result<Vec<_>>>()?;
                let end = client.iperf3(server, if reverse { "-t 1 -R" } else { "-t 1" })?;
                let rate = gbits_received(&end);
                ensure!(rate > 0.0, "{label}: {end}");
                for ((guest, receives), (rx, tx)) in guests.iter().zip(before) {
                    let (rx_now, tx_now) = guest.traffic()?;
                    let length = if *receives { rx_now.average_since(rx) } else { tx_now.average_since(tx) };
                    ensure!(
                        length > SUPER_FRAME,
                        "{label}: {length} bytes on average in frames of {}",
                        guest.name
                    );
                    eprintln!(
                        "{label}: {rate:.3} Gbit/s, {length} bytes a frame {} {}",
                        if *receives { "into" } else { "out of" },
                        guest.name
                    );
                }
            }
        }
        Ok(())
    })
}
