//! The switchdev back-end on netdevsim: whole policies as flower rules in (simulated) hardware.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sluice_eswitch::contract::{Enforced, Eswitch, EswitchError, VfIndex};
use sluice_eswitch::switchdev::{Representor, Representors, Rules, Switchdev};
use sluice_policy::config::{
    AclAction, AclMatch, AclRule, Attachment, Config, Direction, Hook, Masked, Policy, Rate, Switch, Uplink,
    VlanMode, Vnic,
};
use sluice_policy::net::{IpPrefix, MacAddr, PortRange, VlanId, VlanRange};
use sluice_policy::oracle::Domain;
use sluice_policy::placement::{
    self, Evidence, Feature, FlowerAction, FlowerActions, FlowerKeys, FlowerMatch, FlowerProgram, FlowerRule,
    FlowerSupport, Mode, Neighbours, Program, RulePort,
};
use sluice_tests::lab_guest::{self, PATIENCE};
use sluice_tests::wait_until;

const FOLDER: &str = "/sys/bus/netdevsim";
const VFS: u16 = 3;

/// A simulated NIC in legacy mode, without VFs; removed when dropped.
struct Nic {
    number: u32,
    uplink: String,
}

impl Nic {
    fn new(number: u32) -> Result<Nic> {
        lab_guest::require()?;
        fs::write(Path::new(FOLDER).join("new_device"), format!("{number} 1"))
            .context("making a netdevsim")?;
        let net = Path::new(FOLDER).join(format!("devices/netdevsim{number}/net"));
        let uplink = wait_until("the uplink has an interface", PATIENCE, || {
            let entry = fs::read_dir(&net)?.next().transpose()?;
            Ok(entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
        })?;
        Ok(Nic { number, uplink })
    }

    fn set_vfs(&self, count: u16) -> Result<()> {
        let file = Path::new(FOLDER).join(format!("devices/netdevsim{}/sriov_numvfs", self.number));
        fs::write(file, count.to_string()).context("making VFs")
    }

    /// Its eSwitch, opened anew, in switchdev mode with VFs.
    fn switchdev(&self) -> Result<Switchdev> {
        let mut eswitch = Switchdev::open(&self.uplink)?;
        eswitch.set_mode(Mode::Switchdev)?;
        self.set_vfs(VFS)?;
        wait_until("all VFs have representors", PATIENCE, || {
            Ok((eswitch.representors()?.vfs.len() == usize::from(VFS)).then_some(()))
        })?;
        Ok(eswitch)
    }
}

impl Drop for Nic {
    fn drop(&mut self) {
        // The guest ends soon.
        let _ = fs::write(Path::new(FOLDER).join("del_device"), self.number.to_string());
    }
}

fn tc(words: &[&str]) -> Result<String> {
    let output = Command::new("tc").args(words).output().context("running tc")?;
    let error = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "tc {words:?}: {error}");
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn vid(number: u32) -> Result<VlanId> {
    Ok(VlanId::new(number)?)
}

fn mac(last: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, last])
}

fn rule(priority: u32, action: AclAction, matches: AclMatch) -> AclRule {
    AclRule { priority, direction: Direction::FromVm, matches, action }
}

/// One of everything that a NIC's rules can enforce.
fn full_policy(vlan: VlanMode) -> Result<Policy> {
    let prefix = |text: &str| -> Result<Option<IpPrefix>> { Ok(Some(text.parse()?)) };
    let ports = |first, last| PortRange::new(first, last).into_iter().collect::<Vec<_>>();
    let tcp = || AclMatch { ethertype: Some(0x0800), ip_proto: Some(6), ..AclMatch::default() };
    let mut policy = Policy {
        vlan,
        ip_guard: vec![[10, 0, 0, 7].into(), "2001:db8::7".parse()?],
        dhcp_guard: true,
        ra_guard: true,
        rate_from_vm: Some(Rate { bits_per_second: 100_000_001, burst_bytes: 150_001 }),
        ..Policy::default()
    };
    policy.acl.default_from_vm = AclAction::Deny;
    policy.acl.rules = vec![
        rule(90, AclAction::Deny, AclMatch { dst_ip: prefix("192.0.2.0/24")?, ..AclMatch::default() }),
        rule(80, AclAction::Allow, AclMatch { dst_ports: ports(1000, 2047), ..tcp() }),
        rule(70, AclAction::Allow, AclMatch { tcp_flags: Some(Masked { value: 2, mask: 0x12 }), ..tcp() }),
        rule(
            60,
            AclAction::Allow,
            AclMatch { ip_proto: Some(17), src_ports: ports(53, 53), ..AclMatch::default() },
        ),
        rule(
            50,
            AclAction::Allow,
            AclMatch {
                ethertype: Some(0x86dd),
                ip_proto: Some(58),
                icmp_type: Some(128),
                ..AclMatch::default()
            },
        ),
        rule(
            40,
            AclAction::Allow,
            AclMatch {
                dst_mac: Some(Masked {
                    value: mac(0x10),
                    mask: MacAddr([0xff, 0xff, 0xff, 0xff, 0xff, 0xf0]),
                }),
                dst_ip: prefix("2001:db8::/32")?,
                ..AclMatch::default()
            },
        ),
    ];
    Ok(policy)
}

/// Two vNICs with whole policies and one that takes anything, on VFs 0 to 2.
fn config() -> Result<Config> {
    let range = VlanRange::new(vid(100)?, vid(102)?).context("a range")?;
    let policies = [
        full_policy(VlanMode::Access(vid(100)?))?,
        full_policy(VlanMode::Trunk { allowed: vec![range], native: Some(vid(300)?) })?,
        Policy { vlan: VlanMode::Access(vid(101)?), ..Policy::default() },
    ];
    let vnics = (1_u8..).zip(policies).map(|(number, policy)| Vnic {
        name: format!("vm{number}"),
        switch: "blue".into(),
        attach: Attachment::Tap(format!("tap{number}")),
        hook: Hook::Auto,
        full_checksums: false,
        mac: mac(number),
        extra_macs: vec![mac(0x80 + number)],
        up: true,
        policy,
        sriov: None,
    });
    let uplink = Uplink {
        netdev: "pf0".into(),
        hook: Hook::Auto,
        full_checksums: false,
        trunk: Vec::new(),
        native: None,
        learn_limit: 16_384,
        up: true,
        attest: Vec::new(),
    };
    let blue = Switch { name: "blue".into(), uplink: Some(uplink), internal: None, ageing_seconds: 300 };
    let config = Config { switches: vec![blue], acl_groups: Vec::new(), vnics: vnics.collect() };
    ensure!(sluice_policy::validate::validate(&config).is_ok(), "the test's configuration is not valid");
    Ok(config)
}

/// The programs of all vNICs, each with the VF of its place in the list.
fn programs(eswitch: &mut Switchdev, config: &Config) -> Result<Vec<(VfIndex, FlowerProgram)>> {
    let capabilities = eswitch.capabilities()?;
    let places = || (0..).map(VfIndex).zip(&config.vnics);
    let neighbours = Neighbours {
        on_vfs: places().map(|(vf, vnic)| (vnic.name.clone(), vf)).collect(),
        behind_uplink: [
            (Domain::Customer(vid(100)?), mac(0x20)),
            (Domain::Customer(vid(101)?), mac(0x21)),
            (Domain::Customer(vid(300)?), mac(0x22)),
        ]
        .into(),
    };
    places()
        .map(|(vf, vnic)| match placement::place(config, vnic, &capabilities, &neighbours) {
            Ok(Program::Switchdev(program)) => Ok((vf, program)),
            Ok(Program::Legacy(_)) => bail!("a legacy program in switchdev mode"),
            Err(uncovered) => bail!("{} is uncovered: {uncovered:?}", vnic.name),
        })
        .collect()
}

/// The number of rules that `tc` itself shows on an interface: all, and those in hardware.
fn counted_by_tc(netdev: &str) -> Result<(usize, usize)> {
    let text = tc(&["filter", "show", "dev", netdev, "ingress"])?;
    let in_hw = text.lines().filter(|line| line.trim().starts_with("in_hw")).count();
    Ok((text.lines().filter(|line| line.contains(" handle 0x")).count(), in_hw))
}

fn one_rule(actions: Vec<FlowerAction>) -> Program {
    Program::Switchdev(FlowerProgram::new(vec![
        FlowerRule {
            port: RulePort::Own,
            chain: 5,
            priority: 1,
            matches: FlowerMatch::default(),
            actions: vec![FlowerAction::Drop],
        },
        FlowerRule { port: RulePort::Own, chain: 0, priority: 1, matches: FlowerMatch::default(), actions },
    ]))
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn the_mode_is_changed_and_representors_are_found_by_what_they_are() -> Result<()> {
    let nic = Nic::new(81)?;
    let mut eswitch = Switchdev::open(&nic.uplink)?;
    ensure!(eswitch.mode()? == Mode::Legacy, "netdevsim begins in legacy mode");
    ensure!(eswitch.representors() == Err(EswitchError::WrongMode), "there are none in legacy mode");
    eswitch.set_mode(Mode::Legacy)?;
    ensure!(eswitch.writes() == 0, "the mode was written, though it was right");
    drop(eswitch);
    let mut eswitch = nic.switchdev()?;
    ensure!(eswitch.mode()? == Mode::Switchdev && eswitch.writes() == 1, "{} writes", eswitch.writes());

    let there = eswitch.representors()?;
    ensure!(there.uplink.netdev == nic.uplink && !there.switch_id.is_empty(), "{there:?}");
    // Names mean nothing: they are found again under others.
    for (vf, representor) in &there.vfs {
        let name = format!("any{}", 2 - vf.0);
        sluice_tests::netns::check(Command::new("ip").args([
            "link",
            "set",
            &representor.netdev,
            "name",
            &name,
        ]))?;
    }
    let renamed = eswitch.representors()?;
    for (vf, representor) in &renamed.vfs {
        ensure!(representor.netdev == format!("any{}", 2 - vf.0), "{renamed:?}");
        ensure!(there.vfs.get(vf).is_some_and(|old| old.ifindex == representor.ifindex), "{renamed:?}");
    }
    ensure!(eswitch.vfs()?.len() == usize::from(VFS), "{:?}", eswitch.vfs());

    // A VF is open while its representor is up.
    let is_up = |eswitch: &mut Switchdev| Ok::<_, EswitchError>(eswitch.read_back(VfIndex(1))?.enabled);
    eswitch.disable(VfIndex(1))?;
    ensure!(!is_up(&mut eswitch)?, "it is closed");
    eswitch.enable(VfIndex(1))?;
    ensure!(is_up(&mut eswitch)?, "it is open");
    let writes = eswitch.writes();
    eswitch.enable(VfIndex(1))?;
    ensure!(eswitch.writes() == writes, "it was opened again");

    // Somebody takes VFs and mode away.
    nic.set_vfs(0)?;
    let gone = eswitch.read_back(VfIndex(1));
    ensure!(gone == Err(EswitchError::NoSuchVf(VfIndex(1))), "{gone:?}");
    eswitch.disable(VfIndex(1))?;
    eswitch.unprogram(VfIndex(1))?;
    eswitch.set_mode(Mode::Legacy)?;
    ensure!(eswitch.representors() == Err(EswitchError::WrongMode), "the mode is another");
    nic.set_vfs(VFS)?;
    ensure!(eswitch.read_back(VfIndex(1)) == Err(EswitchError::WrongMode), "it does not see the mode");
    ensure!(eswitch.disable(VfIndex(1)).is_err(), "it cannot know that the VF is closed");
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn whole_policies_are_in_hardware_and_a_restart_writes_nothing() -> Result<()> {
    let nic = Nic::new(82)?;
    let mut eswitch = nic.switchdev()?;
    let config = config()?;
    let capabilities = eswitch.capabilities()?;
    let FlowerSupport { offload, keys, actions, .. } = capabilities.flower;
    ensure!(offload == Evidence::ReadBack && keys == FlowerKeys::ALL, "{offload:?} {keys:?}");
    ensure!(actions == FlowerActions::ALL, "{actions:?}");
    let programs = programs(&mut eswitch, &config)?;
    let representors = eswitch.representors()?;
    let mut rules = 0;
    for (vf, program) in &programs {
        eswitch.program(*vf, &Program::Switchdev(program.clone()))?;
        rules += program.rules().len();
    }
    ensure!(rules > 100, "{rules} rules are no whole policies");
    let in_tc: Vec<(usize, usize)> = representors
        .vfs
        .values()
        .chain([&representors.uplink])
        .map(|representor| counted_by_tc(&representor.netdev))
        .collect::<Result<_>>()?;
    ensure!(in_tc.iter().all(|(all, in_hw)| all == in_hw), "tc shows rules outside hardware: {in_tc:?}");
    let all: usize = in_tc.iter().map(|(all, _)| all).sum();
    ensure!(all == rules, "{rules} rules were written, and tc shows {in_tc:?}");

    // Another process finds all of it, by the cookies, and writes nothing.
    drop(eswitch);
    let mut eswitch = Switchdev::open(&nic.uplink)?;
    for (vf, program) in &programs {
        let observed = eswitch.read_back(*vf)?;
        let program = Program::Switchdev(program.clone());
        ensure!(observed.differences(&program).is_empty(), "{vf}: {:?}", observed.differences(&program));
        ensure!(observed.foreign.is_empty(), "{:?}", observed.foreign);
        eswitch.program(*vf, &program)?;
    }
    ensure!(eswitch.writes() == 0, "{} writes over an unchanged world", eswitch.writes());

    // What somebody takes away is seen, and only that is written again.
    let (vf, program) = &programs[0];
    let netdev = &representors.vfs[vf].netdev;
    tc(&["filter", "del", "dev", netdev, "ingress", "chain", "0", "pref", "1"])?;
    let program = Program::Switchdev(program.clone());
    ensure!(eswitch.read_back(*vf)?.differences(&program).len() == 1, "a missing rule is not seen");
    eswitch.program(*vf, &program)?;
    ensure!(eswitch.writes() == 1, "{} writes for one rule", eswitch.writes());
    ensure!(eswitch.read_back(*vf)?.differences(&program).is_empty(), "it is not repaired");
    // So is the loss of all rules with their qdisc.
    tc(&["qdisc", "del", "dev", netdev, "clsact"])?;
    ensure!(eswitch.read_back(*vf)?.differences(&program).len() == 1, "a missing qdisc is not seen");
    eswitch.program(*vf, &program)?;
    ensure!(eswitch.read_back(*vf)?.differences(&program).is_empty(), "it is not repaired");

    // Another policy takes the place of this one, and nothing of it is left.
    let empty = Program::Switchdev(FlowerProgram::new(Vec::new()));
    eswitch.program(*vf, &one_rule(vec![FlowerAction::Goto(5)]))?;
    ensure!(counted_by_tc(netdev)? == (2, 2), "{:?}", counted_by_tc(netdev));
    for (vf, _) in &programs {
        eswitch.unprogram(*vf)?;
        ensure!(!eswitch.read_back(*vf)?.enabled, "it is still open");
        ensure!(eswitch.read_back(*vf)?.differences(&empty).is_empty(), "rules are left");
    }
    for representor in representors.vfs.values().chain([&representors.uplink]) {
        ensure!(counted_by_tc(&representor.netdev)? == (0, 0), "rules are left on {}", representor.netdev);
    }
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn foreign_filters_stay_and_are_reported() -> Result<()> {
    let nic = Nic::new(83)?;
    let mut eswitch = nic.switchdev()?;
    let vf = VfIndex(0);
    let netdev = eswitch.representors()?.vfs[&vf].netdev.clone();
    tc(&["qdisc", "add", "dev", &netdev, "clsact"])?;
    tc(&[
        "filter",
        "add",
        "dev",
        &netdev,
        "ingress",
        "protocol",
        "ip",
        "pref",
        "777",
        "flower",
        "skip_sw",
        "src_mac",
        "02:00:00:00:00:99",
        "action",
        "drop",
    ])?;
    // One with a cookie that only looks like ours.
    tc(&[
        "filter",
        "add",
        "dev",
        &netdev,
        "ingress",
        "protocol",
        "ip",
        "chain",
        "5",
        "pref",
        "778",
        "flower",
        "action",
        "drop",
        "cookie",
        "736c75696365ff",
    ])?;
    eswitch.program(vf, &one_rule(vec![FlowerAction::Goto(5)]))?;
    let observed = eswitch.read_back(vf)?;
    ensure!(
        observed.foreign.len() == 2 && observed.foreign[0].contains("pref 777"),
        "{:?}",
        observed.foreign
    );
    let writes = eswitch.writes();
    eswitch.program(vf, &one_rule(vec![FlowerAction::Goto(5)]))?;
    ensure!(eswitch.writes() == writes, "foreign filters made it write again");
    eswitch.unprogram(vf)?;
    let left = tc(&["filter", "show", "dev", &netdev, "ingress"])?;
    ensure!(left.contains("pref 777") && left.contains("pref 778"), "foreign filters were removed: {left}");
    ensure!(eswitch.read_back(vf)?.foreign.len() == 2, "{left}");

    // One that takes our place is an error that names the place, and it stays too.
    tc(&[
        "filter", "add", "dev", &netdev, "ingress", "protocol", "ip", "pref", "1", "flower", "action", "drop",
    ])?;
    let refused = eswitch.program(vf, &one_rule(vec![FlowerAction::Goto(5)]));
    match refused {
        Err(EswitchError::Uncovered { detail, .. }) if detail.contains("Protocol mismatch") => {}
        other => bail!("a foreign filter has the place: {other:?}"),
    }
    ensure!(tc(&["filter", "show", "dev", &netdev, "ingress"])?.contains("pref 1 "), "it was removed");
    Ok(())
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn what_hardware_does_not_take_is_uncovered_in_the_kernels_words() -> Result<()> {
    let nic = Nic::new(84)?;
    let mut eswitch = nic.switchdev()?;
    let vf = VfIndex(2);
    let netdev = eswitch.representors()?.vfs[&vf].netdev.clone();
    let good = one_rule(vec![FlowerAction::Goto(5)]);
    eswitch.program(vf, &good)?;

    // netdevsim takes every flower rule that the kernel can offload; so the kernel has to refuse one. Somebody has a
    // bucket with the number of ours and without our flags, and the kernel knows buckets by their numbers.
    let policed = |megabits: u64| {
        let rate = Rate { bits_per_second: megabits * 1_000_000, burst_bytes: 100_000 };
        one_rule(vec![FlowerAction::Police(rate), FlowerAction::Goto(5)])
    };
    eswitch.program(vf, &policed(7))?;
    let shown = tc(&["-j", "actions", "list", "action", "police"])?;
    let shown: Value = serde_json::from_str(&shown).with_context(|| format!("tc printed {shown}"))?;
    let index = shown.as_array().into_iter().flatten().find_map(|list| list["actions"][0]["index"].as_u64());
    let index = index.with_context(|| format!("tc shows no bucket: {shown}"))?.to_string();
    eswitch.unprogram(vf)?;
    wait_until("the bucket is free", PATIENCE, || {
        Ok(tc(&["actions", "add", "action", "police", "rate", "1mbit", "burst", "10k", "index", &index]).ok())
    })?;
    eswitch.program(vf, &good)?;
    let refused = eswitch.program(vf, &policed(7));
    match &refused {
        Err(EswitchError::Uncovered { feature: Feature::RateFromVm, detail }) => {
            ensure!(
                detail.contains("Mismatch between action and filter offload flags"),
                "the kernel's words are missing: {detail}"
            );
        }
        other => bail!("{other:?}"),
    }
    // Nothing of it is left, and nothing of the old program, which is not relied on any more.
    ensure!(counted_by_tc(&netdev)? == (0, 0), "{:?}", counted_by_tc(&netdev));
    tc(&["actions", "del", "action", "police", "index", &index])?;

    // An interface whose driver has no hardware to offer.
    sluice_tests::netns::check(Command::new("ip").args(["link", "add", "soft0", "type", "dummy"]))?;
    let ifindex = fs::read_to_string("/sys/class/net/soft0/ifindex")?.trim().parse()?;
    let soft = Representor { ifindex, netdev: "soft0".into() };
    let ports = Representors { switch_id: String::new(), uplink: soft.clone(), vfs: [(vf, soft)].into() };
    let Program::Switchdev(program) = &good else { bail!("{good:?}") };
    match Rules::in_hardware()?.program(&ports, vf, program) {
        Err(EswitchError::Uncovered { feature: Feature::Offload, .. }) => {}
        other => bail!("{other:?}"),
    }
    ensure!(counted_by_tc("soft0")? == (0, 0), "{:?}", counted_by_tc("soft0"));
    Rules::in_software()?.program(&ports, vf, program)?;
    ensure!(counted_by_tc("soft0")? == (2, 0), "{:?}", counted_by_tc("soft0"));

    // A rule of ours that is there, but not in hardware, is not enforced: it is named, and goes.
    eswitch.program(vf, &good)?;
    let words = "protocol all pref 9 flower skip_hw action pass cookie 736c756963650002000000000000002a";
    let place = ["filter", "add", "dev", &netdev, "ingress"];
    tc(&place.into_iter().chain(words.split(' ')).collect::<Vec<_>>())?;
    let observed = eswitch.read_back(vf)?;
    let Enforced::Switchdev { in_software, .. } = &observed.enforced else { bail!("{observed:?}") };
    ensure!(in_software.len() == 1 && in_software[0].contains("pref 9"), "{observed:?}");
    ensure!(!observed.differences(&good).is_empty() && observed.foreign.is_empty(), "{observed:?}");
    eswitch.program(vf, &good)?;
    ensure!(eswitch.read_back(vf)?.differences(&good).is_empty(), "{:?}", eswitch.read_back(vf));

    // Rates change although the kernel lets go of old buckets late.
    for megabits in 1..=12 {
        eswitch.program(vf, &policed(megabits))?;
    }
    ensure!(eswitch.read_back(vf)?.differences(&policed(12)).is_empty(), "{:?}", eswitch.read_back(vf));
    Ok(())
}
