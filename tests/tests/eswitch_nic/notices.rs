//! The kernel's notices, and what it tells nothing of.

use super::*;

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use nix::net::if_::if_nametoindex;
use sluice_eswitch::contract::VfIndex;
use sluice_eswitch::watch::{Hint, Watch};
use sluice_policy::net::MacAddr;
use sluice_policy::placement::{Program, VfSettings};

/// Far longer than a notice takes.
const NOTICED: Duration = Duration::from_secs(5);

/// Hears out what is under way.
fn settle(watch: &mut Watch) -> Result<()> {
    wait_until("the kernel has no more to tell", PATIENCE, || {
        Ok(watch.wait(Duration::from_millis(300))?.is_empty().then_some(()))
    })
}

/// All hints until that one comes.
fn hears(watch: &mut Watch, what: &str, wanted: &Hint) -> Result<()> {
    let deadline = Instant::now() + NOTICED;
    let mut heard = BTreeSet::new();
    while Instant::now() < deadline {
        heard.extend(watch.wait(deadline.saturating_duration_since(Instant::now()))?);
        if heard.contains(wanted) {
            return Ok(());
        }
    }
    anyhow::bail!("{what}: {wanted:?} was not among {heard:?}")
}

fn tc(words: &str) -> Result<()> {
    check(Command::new("tc").args(words.split(' '))).map(drop)
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn what_others_do_to_a_pf_is_heard() -> Result<()> {
    lab_guest::require()?;
    ip(&["link", "set", PORT, "up"])?;
    write_device(PORT, "sriov_numvfs", "0")?;
    write_device(PORT, "sriov_drivers_autoprobe", "0")?;
    let link = Hint::Link { ifindex: if_nametoindex(PORT)? };
    let address = HostNic::open(PORT)?.identity().address.clone();
    let device = Hint::Device { bus: "pci".into(), address };
    let mut watch = Watch::open()?;
    settle(&mut watch)?;

    write_device(PORT, "sriov_numvfs", "2")?;
    hears(&mut watch, "VFs were made", &device)?;
    settle(&mut watch)?;
    let vf = fs::canonicalize(format!("/sys/class/net/{PORT}/device/virtfn0"))?;
    let vf = vf.file_name().context("a VF")?.to_string_lossy().into_owned();
    let vf = Hint::Device { bus: "pci".into(), address: vf };
    write_device(PORT, "virtfn0/driver_override", "igbvf")?;
    let Hint::Device { address, .. } = &vf else { anyhow::bail!("{vf:?}") };
    fs::write("/sys/bus/pci/drivers_probe", address)?;
    hears(&mut watch, "a VF got a driver", &vf)?;
    settle(&mut watch)?;
    fs::write("/sys/bus/pci/drivers/igbvf/unbind", address)?;
    hears(&mut watch, "a VF lost its driver", &vf)?;
    settle(&mut watch)?;
    write_device(PORT, "sriov_numvfs", "0")?;
    hears(&mut watch, "VFs were removed", &vf)?;
    settle(&mut watch)?;

    for state in ["down", "up"] {
        ip(&["link", "set", PORT, state])?;
        hears(&mut watch, state, &link)?;
        settle(&mut watch)?;
    }
    for act in ["add", "del"] {
        check(Command::new("bridge").args(["fdb", act, "02:00:00:00:00:77", "dev", PORT, "self"]))?;
        hears(&mut watch, &format!("{act} in the filter"), &link)?;
        settle(&mut watch)?;
    }
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn settings_of_vfs_are_heard_while_the_port_is_up() -> Result<()> {
    lab_guest::require()?;
    ip(&["link", "set", PORT, "up"])?;
    write_device(PORT, "sriov_numvfs", "0")?;
    write_device(PORT, "sriov_numvfs", "2")?;
    let simulated = Simulated::create(45)?;
    simulated.set_vfs(2)?;
    ip(&["link", "set", &simulated.netdev, "up"])?;
    wait_until("the port has a carrier", PATIENCE, || {
        let state = fs::read_to_string(format!("/sys/class/net/{PORT}/operstate"))?;
        Ok((state.trim() == "up").then_some(()))
    })?;
    let mut watch = Watch::open()?;
    settle(&mut watch)?;
    let set = |netdev: &str, setting: &str| {
        let words = ["link", "set", netdev, "vf", "1"].into_iter().chain(setting.split(' '));
        ip(&words.collect::<Vec<_>>())
    };
    let both = ["mac 02:00:00:00:00:55", "vlan 7", "spoofchk off", "trust on", "max_tx_rate 10"];
    let of_simulated = both.into_iter().chain(["state disable", "query_rss on"]);
    let settings = both.map(|setting| (PORT, setting)).into_iter();
    for (netdev, setting) in settings.chain(of_simulated.map(|setting| (simulated.netdev.as_str(), setting)))
    {
        let link = Hint::Link { ifindex: if_nametoindex(netdev)? };
        set(netdev, setting)?;
        hears(&mut watch, &format!("{netdev}: {setting}"), &link)?;
        settle(&mut watch)?;
    }
    // This, and the next test's end, are why VFs are read at intervals too. Where it fails, the kernel tells more.
    ip(&["link", "set", &simulated.netdev, "down"])?;
    settle(&mut watch)?;
    set(&simulated.netdev, "spoofchk on")?;
    let heard = watch.wait(Duration::from_millis(500))?;
    ensure!(heard.is_empty(), "of a port that is down: {heard:?}");
    write_device(PORT, "sriov_numvfs", "0")
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn what_we_do_ourselves_echoes_once() -> Result<()> {
    let simulated = Simulated::create(47)?;
    ip(&["link", "set", &simulated.netdev, "up"])?;
    let mut nic = simulated.open()?;
    nic.set_vf_count(2)?;
    let mut watch = Watch::open()?;
    settle(&mut watch)?;
    let settings = VfSettings { mac: MacAddr([2, 0, 0, 0, 0, 9]), spoofchk: true, ..VfSettings::default() };
    let program = Program::Legacy(settings);
    nic.eswitch().disable(VfIndex(0))?;
    nic.eswitch().program(VfIndex(0), &program)?;
    let echo = watch.wait(NOTICED)?;
    ensure!(echo == [Hint::Link { ifindex: if_nametoindex(simulated.netdev.as_str())? }], "{echo:?}");
    // What a daemon does then: it reads, and finds nothing to write. That is heard by nobody.
    settle(&mut watch)?;
    let writes = nic.writes();
    ensure!(nic.refresh()?.is_unchanged(), "{} changed by itself", nic.netdev());
    nic.eswitch().program(VfIndex(0), &program)?;
    let observed = nic.eswitch().read_back(VfIndex(0))?;
    ensure!(observed.differences(&program).is_empty() && nic.writes() == writes, "{observed:?}");
    let heard = watch.wait(Duration::from_millis(500))?;
    ensure!(heard.is_empty(), "reading echoes: {heard:?}");
    nic.eswitch().unprogram(VfIndex(0))?;
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn filters_and_the_mode_are_heard() -> Result<()> {
    let simulated = Simulated::create(46)?;
    simulated.set_vfs(2)?;
    let uplink = &simulated.netdev;
    let mut watch = Watch::open()?;
    settle(&mut watch)?;
    let device = Hint::Device { bus: "netdevsim".into(), address: "netdevsim46".into() };
    for mode in ["switchdev", "legacy", "switchdev"] {
        simulated.set_mode(mode)?;
        hears(&mut watch, mode, &device)?;
        settle(&mut watch)?;
    }
    simulated.set_vfs(0)?;
    simulated.set_mode("legacy")?;
    settle(&mut watch)?;
    simulated.set_mode("switchdev")?;
    let heard = watch.wait(Duration::from_millis(500))?;
    ensure!(heard.is_empty(), "of a mode without VFs: {heard:?}");

    let filters = Hint::Filters { ifindex: if_nametoindex(uplink.as_str())? };
    let filter = format!("dev {uplink} ingress protocol ip pref 7 handle 1 flower");
    for words in [
        format!("qdisc add dev {uplink} clsact"),
        format!("filter add {filter} ip_proto tcp action drop"),
        format!("filter del {filter}"),
        format!("qdisc del dev {uplink} clsact"),
    ] {
        tc(&words)?;
        hears(&mut watch, &words, &filters)?;
        settle(&mut watch)?;
    }
    Ok(())
}
