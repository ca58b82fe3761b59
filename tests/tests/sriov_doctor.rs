//! What `sluice doctor` says about VFs of an uplink, on the machines that there are: a veth on this one, and in the
//! SR-IOV lab an igb port with an IOMMU, with and without VFs, and a simulated NIC.

#![forbid(unsafe_code)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use sluice_eswitch::survey::{EswitchMode, Nic, Reading, Role, Survey};
use sluice_tests::api::{list, text};
use sluice_tests::lab_guest::{self, Pf};
use sluice_tests::netns::check;
use sluice_tests::{Lab, scenario, wait_until};

#[test]
fn all_of_it_holds_in_the_lab() -> Result<()> {
    lab_guest::run_ignored()
}

/// The findings below a switch's uplink that have codes: code, level, detail and remedy.
fn examine(lab: &Lab, uplink: &str) -> Result<Vec<[String; 4]>> {
    // The doctor's exit code says that something is wrong, and so it is meant to be.
    let output = lab.sluice().attempt(&["--output", "json", "doctor"])?;
    let answer: Value = serde_json::from_slice(&output.stdout).context("the doctor's JSON")?;
    let title = format!("uplink {uplink} (SR-IOV)");
    let group = list(&answer["findings"])
        .iter()
        .find(|finding| finding["title"] == title.as_str())
        .with_context(|| format!("{title} is not in {answer}"))?;
    let mut found = Vec::new();
    collect(group, &mut found);
    Ok(found)
}

fn collect(finding: &Value, found: &mut Vec<[String; 4]>) {
    found.push(["code", "level", "detail", "remedy"].map(|field| text(&finding[field]).to_owned()));
    for child in list(&finding["children"]) {
        collect(child, found);
    }
}

/// The finding with a code: its level, detail and remedy.
fn with_code<'a>(found: &'a [[String; 4]], wanted: &str) -> Result<[&'a str; 3]> {
    let [_, level, detail, remedy] = found
        .iter()
        .find(|[code, ..]| code == wanted)
        .with_context(|| format!("no {wanted} in {found:#?}"))?;
    Ok([level, detail, remedy])
}

/// Wants findings with these codes, of these levels, whose detail or remedy contains this.
fn expect(found: &[[String; 4]], wanted: &[(&str, &str, &str)]) -> Result<()> {
    for (code, level, words) in wanted {
        let [level_found, detail, remedy] = with_code(found, code)?;
        ensure!(
            level_found == *level && (detail.contains(words) || remedy.contains(words)),
            "{code} is {level_found}: {detail} -> {remedy}, and not {level} with {words}"
        );
    }
    Ok(())
}

fn switch(uplink: &str) -> String {
    format!("switches: [{{name: blue, uplink: {{netdev: {uplink}}}}}]\n")
}

/// A vNIC that asks for a VF which goes to QEMU, on an interface that need not be there.
fn asking() -> &'static str {
    "vnics:\n- {name: vm1, switch: blue, mac: \"02:00:00:00:00:01\", attach: {veth: p1}, \
     sriov: {attach: {qmp: {socket: /run/none}}}}\n"
}

#[test]
fn who_does_not_ask_for_vfs_is_left_in_peace() -> Result<()> {
    scenario(|lab| {
        let outside = lab.outside(9)?;
        lab.apply(&switch(&outside.port))?;
        let found = examine(lab, &outside.port)?;
        expect(&found, &[("sriov.nic.virtual", "NOTE", "veth"), ("sriov", "NOTE", "no vNIC asks")])?;
        ensure!(found.len() == 2, "one note is enough: {found:?}");

        lab.sluice().apply(asking())?;
        let found = examine(lab, &outside.port)?;
        expect(
            &found,
            &[("sriov.nic.virtual", "PROBLEM", "SR-IOV NIC"), ("sriov", "PROBLEM", "1 vNIC asks")],
        )?;

        // The interface goes.
        lab.host().run(&["ip", "link", "del", &outside.port])?;
        let found = examine(lab, &outside.port)?;
        expect(&found, &[("sriov.nic.missing", "WARNING", "network namespace")])
    })
}

/// An igb port in the daemon's network namespace, which `/sys` of this process does not show. It comes back when the
/// namespace goes.
fn port(lab: &Lab) -> Result<()> {
    check(Command::new("ip").args(["link", "set", "pf0", "netns", lab.host().name()]))?;
    lab.host().run(&["ip", "link", "set", "pf0", "up"]).map(drop)
}

const DEVICE: &str = "/sys/class/net/pf0/device";

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn an_igb_port_is_told_with_its_vfs_in_the_lab() -> Result<()> {
    lab_guest::require()?;
    let pf = Pf::open("pf0")?;
    let autoprobe = pf.device().join("sriov_drivers_autoprobe");
    fs::write(&autoprobe, "1")?;
    scenario(|lab| {
        port(lab)?;
        lab.apply(&switch("pf0"))?;
        let found = examine(lab, "pf0")?;
        ensure!(
            found.iter().all(|[_, level, ..]| level == "OK" || level == "NOTE"),
            "nobody asks, and it complains: {found:#?}"
        );

        lab.sluice().apply(asking())?;
        let found = examine(lab, "pf0")?;
        let remedy =
            format!("echo 0 > {DEVICE}/sriov_drivers_autoprobe, then echo 1 > {DEVICE}/sriov_numvfs");
        expect(
            &found,
            &[
                ("sriov", "PROBLEM", "1 vNIC asks"),
                ("sriov.driver", "OK", "8086:10c9, driver igb, firmware: fw"),
                ("sriov.vfs.none", "PROBLEM", &remedy),
                ("sriov.autoprobe.on", "NOTE", "without any policy"),
                ("sriov.iommu", "OK", "booted with intel_iommu=on iommu=pt"),
                ("sriov.isolation.pending", "OK", "IOMMU group"),
                ("sriov.interrupts", "OK", "on"),
                ("sriov.eswitch.absent", "OK", "no devlink eSwitch"),
                ("sriov.modules", "OK", ""),
                ("sriov.process", "OK", "program VFs"),
            ],
        )?;

        // As the remedy says.
        fs::write(&autoprobe, "0")?;
        pf.set_vfs(7)?;
        let found = examine(lab, "pf0")?;
        expect(
            &found,
            &[
                ("sriov.vfs", "OK", "7 of 7, PCI device 10ca: no driver: 0-6"),
                ("sriov.autoprobe.off", "OK", "wait"),
                ("sriov.isolation", "OK", "alone"),
            ],
        )?;
        ensure!(
            found.iter().all(|[_, level, ..]| level == "OK"),
            "all is well, and it complains: {found:#?}"
        );

        pf.set_vfs(0)?;
        fs::write(&autoprobe, "1")?;
        pf.set_vfs(7)?;
        wait_until("all VFs have drivers", lab_guest::PATIENCE, || {
            let found = examine(lab, "pf0")?;
            let [level, detail, _] = with_code(&found, "sriov.vfs")?;
            Ok((level == "OK" && detail.contains("driver igbvf: 0-6")).then_some(()))
        })?;
        expect(&examine(lab, "pf0")?, &[("sriov.autoprobe.on", "NOTE", "")])?;

        // A VF that is kept for another driver, and a port that is down.
        let vf = fs::canonicalize(pf.device().join("virtfn3"))?;
        let address = vf.file_name().context("a VF has an address")?.to_string_lossy().into_owned();
        fs::write(vf.join("driver_override"), "vfio-pci")?;
        fs::write(vf.join("driver/unbind"), &address)?;
        lab.host().run(&["ip", "link", "set", "pf0", "down"])?;
        let found = examine(lab, "pf0")?;
        expect(
            &found,
            &[
                ("sriov.vfs.override", "NOTE", &address),
                ("sriov.link.down", "WARNING", "ip link set pf0 up"),
                ("sriov.vfs", "OK", "no driver: 3"),
            ],
        )?;
        fs::write(vf.join("driver_override"), "\n")?;
        Ok(())
    })
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_vf_knows_its_pf_in_the_lab() -> Result<()> {
    lab_guest::require()?;
    let pf = Pf::open("pf0")?;
    fs::write(pf.device().join("sriov_drivers_autoprobe"), "1")?;
    pf.set_vfs(1)?;
    let netdev = first_port(&pf.device().join("virtfn0"))?;
    let survey = Survey::of(&netdev);
    let device = survey.device().with_context(|| format!("{survey:?} has no device"))?;
    let address = pf.device().file_name().context("it has an address")?.to_string_lossy().into_owned();
    ensure!(device.role == Role::Vf(address) && device.is_pci() && !device.changed, "{device:?}");
    ensure!(device.driver == Reading::Known("igbvf".to_owned()), "{device:?}");
    ensure!(device.sriov.hardware_total == Reading::Absent, "a VF has no VFs: {device:?}");
    Ok(())
}

/// The interface of a device, once it has one.
fn first_port(device: &Path) -> Result<String> {
    wait_until("the device has an interface", lab_guest::PATIENCE, || {
        let Ok(mut entries) = fs::read_dir(device.join("net")) else { return Ok(None) };
        Ok(entries.next().transpose()?.map(|entry| entry.file_name().to_string_lossy().into_owned()))
    })
}

/// A simulated NIC, in the namespace that the guest boots into. It goes when it is dropped.
struct Simulated(PathBuf);

impl Simulated {
    const NUMBER: u32 = 33;

    fn create() -> Result<Simulated> {
        let device = PathBuf::from(format!("/sys/bus/netdevsim/devices/netdevsim{}", Simulated::NUMBER));
        fs::write("/sys/bus/netdevsim/new_device", format!("{} 1", Simulated::NUMBER))?;
        Ok(Simulated(device))
    }
}

impl Drop for Simulated {
    fn drop(&mut self) {
        // The guest ends soon.
        let _ = fs::write("/sys/bus/netdevsim/del_device", Simulated::NUMBER.to_string());
    }
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_simulated_nic_tells_its_mode_and_features_in_the_lab() -> Result<()> {
    lab_guest::require()?;
    let simulated = Simulated::create()?;
    let netdev = first_port(&simulated.0)?;
    let survey = Survey::of(&netdev);
    let device = survey.device().with_context(|| format!("{survey:?} has no device"))?;
    ensure!(!device.is_pci() && device.role == Role::Pf && device.vfs.is_empty(), "{device:?}");
    ensure!(device.sriov.count == Reading::Known(0), "{device:?}");
    ensure!(device.eswitch == Reading::Known(EswitchMode::Legacy), "{device:?}");
    ensure!(device.tc_offload.known().is_some_and(|offload| offload.changeable), "{device:?}");

    fs::write(simulated.0.join("sriov_numvfs"), "2")?;
    let name = format!("netdevsim/netdevsim{}", Simulated::NUMBER);
    let devlink = |words: &[&str]| check(Command::new("devlink").args(words)).map(drop);
    devlink(&["dev", "eswitch", "set", &name, "mode", "switchdev"])?;
    check(Command::new("ethtool").args(["-K", &netdev, "hw-tc-offload", "off"]))?;
    let survey = Survey::of(&netdev);
    let device = survey.device().with_context(|| format!("{survey:?} has no device"))?;
    ensure!(device.eswitch == Reading::Known(EswitchMode::Switchdev), "{device:?}");
    ensure!(device.sriov.count == Reading::Known(2), "{device:?}");
    ensure!(device.tc_offload.known().is_some_and(|offload| !offload.on), "{device:?}");
    check(Command::new("ethtool").args(["-K", &netdev, "hw-tc-offload", "on"]))?;
    let survey = Survey::of(&netdev);
    let device = survey.device().with_context(|| format!("{survey:?} has no device"))?;
    ensure!(device.tc_offload.known().is_some_and(|offload| offload.on), "{device:?}");
    drop(simulated);
    ensure!(Survey::of(&netdev).nic == Nic::Missing, "it is gone");
    Ok(())
}
