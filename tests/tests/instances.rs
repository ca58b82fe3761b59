//! Instances of the daemon: two on one host, and what a purge takes along.

#![forbid(unsafe_code)]

use std::os::unix::net::UnixListener;
use std::path::Path;

use anyhow::{Result, ensure};
use sluice_tests::daemon::Places;
use sluice_tests::wire::{mac, mac_text};
use sluice_tests::{Daemon, Lab, PATIENCE, Sluice, scenario};

fn vnic(name: &str, number: u8, socket: &Path) -> String {
    format!(
        "- {{name: {name}, switch: blue, attach: {{vhostUser: {{path: {}}}}}, mac: \"{}\"}}\n",
        socket.display(),
        mac_text(mac(number))
    )
}

fn purge(lab: &Lab, places: &Places) -> Result<()> {
    let output = Daemon::command(lab.host(), places)?.arg("--purge").output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    ensure!(!places.pins.exists(), "pins are left");
    Ok(())
}

#[test]
fn a_purge_removes_the_sockets_of_guests_and_nobody_elses() -> Result<()> {
    scenario(|lab| {
        let [left, taken] = ["left.sock", "taken.sock"].map(|name| lab.places().socket.with_file_name(name));
        lab.sluice().apply(&format!(
            "switches: [{{name: blue}}]\nvnics:\n{}{}",
            vnic("vm1", 1, &left),
            vnic("vm2", 2, &taken)
        ))?;
        lab.kill()?;
        ensure!(left.exists() && taken.exists(), "a daemon that is killed leaves its sockets");
        // Another program has come since.
        std::fs::remove_file(&taken)?;
        let _other = UnixListener::bind(&taken)?;
        purge(lab, lab.places())?;
        ensure!(!left.exists(), "the socket is left");
        ensure!(taken.exists(), "somebody else's socket was removed");
        Ok(())
    })
}

#[test]
fn a_second_daemon_with_a_switch_of_the_same_name_is_told_so() -> Result<()> {
    scenario(|lab| {
        let [one, two] = ["one.sock", "two.sock"].map(|name| lab.places().socket.with_file_name(name));
        lab.sluice().apply(&format!("switches: [{{name: blue}}]\nvnics:\n{}", vnic("vm1", 1, &one)))?;
        let first = lab.places();
        let pins = first.pins.file_name().unwrap_or_default().to_string_lossy();
        let places = Places {
            state: first.state.with_file_name("state2"),
            socket: first.socket.with_file_name("sluiced2.sock"),
            runtime: first.runtime.with_file_name("run2"),
            // Swept up with the lab's, should the test die.
            pins: first.pins.with_file_name(format!("{pins}-second")),
            settings: first.settings.with_file_name("sluiced2.yaml"),
            log: first.log.with_file_name("sluiced2.log"),
        };
        let second = Daemon::start(lab.host(), &places)?;
        let sluice = Sluice::new(&places.socket);
        // What cannot be served yet is stored all the same.
        let applied = sluice.apply(&format!("switches: [{{name: blue}}]\nvnics:\n{}", vnic("vm2", 2, &two)));
        let told = sluice.wait_doctor("another sluiced in this network namespace", PATIENCE);
        let told = told.and_then(|()| sluice.wait_doctor("rename one of the switches", PATIENCE));
        // The first is none the worse for it, and once it lets go the second goes on by itself.
        let taps =
            || Ok::<_, anyhow::Error>(lab.host().run(&["ip", "-brief", "link"])?.matches("slu-").count());
        let before = taps()?;
        lab.sluice().run(&["delete", "vnic", "vm1"])?;
        let goes_on = sluice_tests::wait_until("the second has its tap", 2 * PATIENCE, || {
            Ok((taps()? == 1).then_some(()))
        });
        second.stop()?;
        purge(lab, &places)?;
        drop(applied);
        told?;
        ensure!(before == 1, "there is one tap, not {before}");
        goes_on
    })
}
