//! Guests that reboot, VMMs that are killed, a daemon that is killed, and an ACL that is edited, under connections that go on.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_tests::api::{list, text};
use sluice_tests::vm::echo::Echo;
use sluice_tests::vm::{Card, ECHO, Guest};
use sluice_tests::wire::mac_text;
use sluice_tests::{Netns, PATIENCE, wait_until};

use crate::setting::{RELAY, Setting, policy, with_guests};

const SERVER: Card = Card::SwitchListens { queues: 1 };
/// So much more of a connection's data shows that it lives.
const SOME: u64 = 50_000;

fn echo(from: &Netns, guest: &Guest<'_>) -> Result<Echo> {
    let echo = Echo::start(from, (guest.ip4(), ECHO).into())?;
    echo.wait_more(SOME)?;
    Ok(echo)
}

#[test]
fn a_real_guest_that_reboots_is_served_again() -> Result<()> {
    with_guests(SERVER, |setting| {
        let Setting { lab, vm1, vm2, out, .. } = setting;
        setting.all_reach_each_other()?;
        let daemon = lab.daemon_pid();
        for (guest, other) in [(vm1, vm2), (vm2, vm1)] {
            let qemu = guest.qemu_pid();
            let undisturbed = echo(&out.netns, other)?;
            guest.reboot()?;
            ensure!(guest.qemu_pid() == qemu && lab.daemon_pid() == daemon, "nothing else was restarted");
            setting.all_reach_each_other()?;
            echo(&out.netns, guest)?.finish()?;
            undisturbed.wait_more(SOME)?;
            undisturbed.finish().with_context(|| format!("{} while {} rebooted", other.name, guest.name))?;
        }
        Ok(())
    })
}

/// The first guest's QEMU dies and another takes its place, at the same socket; nobody else notices.
fn is_killed_and_started_again(setting: &Setting<'_>) -> Result<()> {
    let Setting { lab, vm1, vm2, out, .. } = setting;
    let undisturbed = echo(&out.netns, vm2)?;
    let drops_of_vm2 = || -> Result<u64> {
        let drops = lab.sluice().drops()?;
        Ok(drops.iter().filter(|((port, _), _)| *port == vm2.port()).map(|(_, count)| count).sum())
    };
    let before = drops_of_vm2()?;
    // In the middle of a connection, so that frames are under way in its rings.
    let cut = echo(&out.netns, vm1)?;
    vm1.kill()?;
    lab.sluice().wait_state("vnic", &vm1.name, "PENDING", PATIENCE)?;
    undisturbed.wait_more(SOME).context("vm2 while vm1 is dead")?;
    vm1.switch_on()?;
    vm1.wait_booted()?;
    setting.wait_ready(vm1)?;
    setting.all_reach_each_other()?;
    echo(&out.netns, vm1)?.finish()?;
    // Its kernel knew nothing of that connection.
    cut.give_up()?;
    undisturbed.wait_more(SOME)?;
    undisturbed.finish().context("vm2, all the time")?;
    let after = drops_of_vm2()?;
    ensure!(before == after, "vm2 dropped {before} frames before, and {after} in the end");
    Ok(())
}

/// The daemon dies, and another takes its place; connections go on, and miss no byte.
fn connections_survive(setting: &Setting<'_>) -> Result<()> {
    let Setting { lab, vm1, vm2, out, .. } = setting;
    // Out to the first guest, from there to the second, which echoes, and all the way back.
    vm1.start(&format!("nc -ll -p {RELAY} -e nc {} {ECHO}", vm2.ip4()))?;
    let ringed = echo(&out.netns, vm1)?;
    let tapped = echo(&out.netns, vm2)?;
    let relayed = Echo::start(&out.netns, (vm1.ip4(), RELAY).into())?;
    relayed.wait_more(SOME)?;
    for is_sudden in [true, false] {
        if is_sudden {
            lab.kill()?
        } else {
            lab.stop()?
        }
        // The kernel serves the tap and the wire by itself, and new connections too.
        tapped.wait_more(SOME).context("the tap, without a daemon")?;
        echo(&out.netns, vm2)?.finish().context("a new connection, without a daemon")?;
        lab.start()?;
        setting.wait_ready(vm1)?;
        for (name, connection) in [("vhost-user", &ringed), ("tap", &tapped), ("both", &relayed)] {
            connection.wait_more(SOME).with_context(|| format!("{name}, with the next daemon"))?;
        }
        setting.all_reach_each_other()?;
    }
    for (name, connection) in [("vhost-user", ringed), ("tap", tapped), ("both", relayed)] {
        let bytes = connection.finish().with_context(|| name.to_owned())?;
        eprintln!("{name}: {bytes} bytes came back, all of them");
    }
    Ok(())
}

#[test]
fn a_real_guest_is_killed_and_started_again() -> Result<()> {
    with_guests(SERVER, is_killed_and_started_again)
}

#[test]
fn connections_of_real_guests_survive_the_daemon() -> Result<()> {
    with_guests(Card::SwitchListens { queues: 2 }, connections_survive)
}

#[test]
fn a_real_guest_whose_qemu_listens_outlives_the_daemon_and_is_killed() -> Result<()> {
    with_guests(Card::QemuListens, |setting| {
        connections_survive(setting)?;
        is_killed_and_started_again(setting)
    })
}

#[test]
fn an_edited_acl_cuts_what_runs_in_real_guests() -> Result<()> {
    with_guests(SERVER, |setting| {
        let Setting { lab, vm1, vm2, out, .. } = setting;
        for (guest, other) in [(vm1, vm2), (vm2, vm1)] {
            let cut = echo(&out.netns, guest)?;
            let rule =
                "{priority: 90, direction: TO_VM, match: {ipProto: tcp, dstPorts: [\"7\"]}, action: DENY}";
            let dropped = || lab.sluice().dropped(&guest.port(), "acl-to-vm");
            let before = dropped()?;
            lab.apply(&format!("vnics:\n{}", guest.vnic(&policy(guest, &format!(", rules: [{rule}]")))))?;
            // What had passed the switch before may still be on its way back; then nothing comes any more.
            let mut last = cut.echoed();
            let mut since = Instant::now();
            wait_until("nothing is echoed any more", PATIENCE, || {
                let echoed = cut.echoed();
                if echoed != last {
                    (last, since) = (echoed, Instant::now());
                }
                Ok((since.elapsed() > Duration::from_secs(1)).then_some(()))
            })?;
            wait_until("what TCP repeats is counted", PATIENCE, || Ok((dropped()? > before).then_some(())))?;
            ensure!(lab.sluice().rule_packets(&guest.port(), 90)? > 0, "the rule counts");
            let trace = traced(setting, other, guest)?;
            ensure!(
                trace["agree"] == true && text(&trace["liveVerdict"]).contains("acl-to-vm"),
                "the trace says so: {trace}"
            );
            guest.ping(out.ip4())?;
            // The connection still stands, and goes on when it may.
            lab.apply(&format!("vnics:\n{}", guest.vnic(&policy(guest, ""))))?;
            cut.wait_more(SOME).context("when the rule is gone")?;
            cut.finish()?;
        }
        Ok(())
    })
}

/// What the switch says would become of a guest's request to another's echo service.
fn traced(setting: &Setting<'_>, from: &Guest<'_>, to: &Guest<'_>) -> Result<Value> {
    let words = [
        format!("srcIp={}", from.ip4()),
        format!("dstMac={}", mac_text(to.mac())),
        format!("dstIp={}", to.ip4()),
        "ipProto=tcp".to_owned(),
        format!("dstPort={ECHO}"),
    ];
    let words: Vec<&str> =
        ["trace", "--vnic", &from.name].into_iter().chain(words.iter().map(String::as_str)).collect();
    let answer = setting.lab.sluice().json(&words)?;
    Ok(list(&answer).first().cloned().unwrap_or(answer))
}
