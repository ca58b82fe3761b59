//! Kinds of ports, and what the engine tells about them. Needs root and the eBPF object.

mod common;

use std::process::Command;

use common::*;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use sluice_kernel::{Engine, EngineError, EngineOptions, HooksInUse, PortState};
use sluice_pipeline::{Context, DropReason, Stage, Verdict, decide};
use sluice_policy::config::{Attachment, Hook, Internal, Uplink, VlanMode};
use sluice_policy::lower;
use sluice_policy::sim::SliceFrame;

fn uplink(netdev: &str) -> Uplink {
    Uplink {
        netdev: netdev.into(),
        hook: Hook::Auto,
        full_checksums: false,
        trunk: vec![],
        native: None,
        learn_limit: 100,
        up: true,
        attest: Vec::new(),
    }
}

/// An untagged frame with an ethertype for experiments.
fn frame(from: u32, to: u32) -> Vec<u8> {
    let mut bytes = [mac(to).0, mac(from).0].concat();
    bytes.extend([0x88, 0xb5]);
    bytes.resize(60, 0);
    bytes
}

#[test]
fn a_tap_is_a_port_and_anything_else_under_its_name_is_not() {
    in_lab(|lab| {
        ip("tuntap add t1 mode tap");
        ip("link set t1 up");
        ip("tuntap add t2 mode tun");
        ip("link add t3 type veth peer name t4");
        let tap = |number, netdev: &str| {
            let mut vnic = vnic(number, netdev);
            vnic.attach = Attachment::Tap(netdev.into());
            vnic.hook = Hook::Xdp;
            vnic
        };
        let config = config(vec![tap(1, "t1"), tap(2, "t2"), tap(3, "t3"), vnic(4, "t1")]);
        let (mut engine, _) = lab.open();
        let observation = engine.observe(&lower::ports(&config)).expect("interfaces can be observed");
        assert!(observation.bindings["vnic/vm1"].ifindex > 0);
        assert!(observation.links["vnic/vm1"].native_xdp);
        assert!(observation.absent["vnic/vm2"].contains("no Ethernet"), "{observation:?}");
        assert!(observation.absent["vnic/vm3"].contains("not a tap but veth"), "{observation:?}");
        assert!(observation.absent["vnic/vm4"].contains("not a veth but tun"), "{observation:?}");

        let report = lab.sync(&mut engine, &common::config(vec![tap(1, "t1")]));
        let status = &report.ports["vnic/vm1"];
        assert_eq!((&status.state, status.hooks), (&PortState::Attached, HooksInUse::Tcx));
        assert!(status.notes[0].contains("fullChecksums"), "{status:?}");
        let mut attested = tap(1, "t1");
        attested.full_checksums = true;
        let report = lab.sync(&mut engine, &common::config(vec![attested]));
        assert_eq!(report.ports["vnic/vm1"].hooks, HooksInUse::XdpAndTcx, "{report:?}");
    });
}

#[test]
fn xdp_redirects_to_a_veth_whose_peer_takes_such_frames() {
    in_lab(|lab| {
        let guests = [lab.guest("p1", 1), lab.guest("p2", 2)];
        let vnics = [1, 2].map(|number| {
            let mut vnic = vnic(number, &format!("p{number}"));
            vnic.hook = Hook::Xdp;
            vnic
        });
        for guest in &guests {
            for feature in [["tx", "off"], ["txvlan", "off"], ["gro", "on"]] {
                let set = Command::new("ip")
                    .args(["netns", "exec", guest, "ethtool", "-K", "eth0"])
                    .args(feature)
                    .output()
                    .expect("`ethtool` is installed");
                assert!(set.status.success());
            }
        }
        let config = config(vnics.to_vec());
        let (mut engine, _) = lab.open();
        let report = lab.sync(&mut engine, &config);
        assert_eq!(report.writes.of("DEVMAP").updates, 2, "{report:?}");
        assert!(report.ports.values().all(|status| status.hooks == HooksInUse::XdpAndTcx), "{report:?}");
        assert!(reaches(&guests[0], 2) && reaches(&guests[1], 1));
        assert_eq!(lab.sync(&mut engine, &config).writes.total(), 0);
        // The kernel takes the device out of the map by itself; the next pass puts the new one in.
        ip("link del p2");
        lab.plug("p2", 2);
        lab.sync(&mut engine, &config);
        eventually("vm2 is back", || reaches(&guests[0], 2));
    });
}

#[test]
fn the_host_reaches_a_guest_through_an_internal_port() {
    in_lab(|lab| {
        let guest = lab.guest("p1", 1);
        let mut config = config(vec![vnic(1, "p1")]);
        config.switches[0].internal =
            Some(Internal { netdev: "blue0".into(), mac: Some(mac(99)), vlan: VlanMode::Untagged });
        let (mut engine, _) = lab.open();
        let ports = lower::ports(&config);
        let absent = engine.observe(&ports).expect("interfaces can be observed").absent;
        assert!(absent["internal/blue"].contains("not been made"), "{absent:?}");
        assert_eq!(engine.ensure_internal(&ports).expect("the pair can be made").len(), 1);
        assert_eq!(engine.ensure_internal(&ports).expect("the pair is there"), Vec::<String>::new());
        ip("addr add 10.0.0.99/24 dev blue0");
        let report = lab.sync(&mut engine, &config);
        assert_eq!(report.ports["internal/blue"].state, PortState::Attached);
        eventually("the host answers", || reaches(&guest, 99));

        // Neither a foreign pair nor one that is wanted is removed, and no foreign one is taken.
        ip("tuntap add green0 mode tap");
        let mut other = config.clone();
        other.switches[0].internal =
            Some(Internal { netdev: "green0".into(), mac: Some(mac(98)), vlan: VlanMode::Untagged });
        let ports = lower::ports(&other);
        let done = engine.ensure_internal(&ports).expect("the old pair can be removed");
        assert_eq!(done.len(), 1, "{done:?}");
        let absent = engine.observe(&ports).expect("interfaces can be observed").absent;
        assert!(absent["internal/blue"].contains("did not make"), "{absent:?}");
        ip("link show green0");
        assert!(!Command::new("ip").args(["link", "show", "blue0"]).output().expect("`ip`").status.success());
    });
}

#[test]
fn a_wire_is_promiscuous_while_it_is_an_uplink() {
    in_lab(|lab| {
        ip("link add br7 type bridge"); // as near to a wire as every kernel has
        ip("link set br7 up");
        let has_flag = |flag: &str| {
            let output =
                Command::new("ip").args(["link", "show", "br7"]).output().expect("`ip` is installed");
            String::from_utf8_lossy(&output.stdout).contains(flag)
        };
        let is_promiscuous = || has_flag("PROMISC");
        let receives_all_groups = || has_flag("ALLMULTI");
        let mut with = config(vec![]);
        with.switches[0].uplink = Some(uplink("br7"));
        let (mut engine, _) = lab.open();
        assert!(!is_promiscuous());
        let report = lab.sync(&mut engine, &with);
        assert!(is_promiscuous());
        assert_eq!(report.ports["uplink/blue"].state, PortState::Attached);
        assert_eq!(lab.sync(&mut engine, &with).link_changes, Vec::<String>::new());
        // Its NIC is told what to receive: all groups, and no more than that.
        let mut image = lab.image(&engine, &with);
        for port in image.ports.values_mut() {
            port.is_filtered = true;
        }
        engine.sync(&image).expect("the image can be synced");
        assert!(!is_promiscuous() && receives_all_groups());
        assert_eq!(engine.sync(&image).expect("again").link_changes, Vec::<String>::new());
        lab.sync(&mut engine, &with);
        assert!(is_promiscuous() && !receives_all_groups());
        drop(engine);
        let (mut engine, _) = lab.open();
        lab.sync(&mut engine, &config(vec![]));
        assert!(!is_promiscuous());

        // What somebody else set is left alone.
        ip("link set br7 promisc on");
        lab.sync(&mut engine, &with);
        engine.detach_all().expect("everything can be removed");
        assert!(is_promiscuous());
    });
}

#[test]
fn learnt_addresses_age_and_go_with_their_port() {
    in_lab(|lab| {
        let (guest, _outside) = (lab.guest("p1", 1), lab.guest("up0", 2));
        let mut config = config(vec![vnic(1, "p1")]);
        config.switches[0].uplink = Some(uplink("up0"));
        let (mut engine, _) = lab.open();
        lab.sync(&mut engine, &config);
        assert!(reaches(&guest, 2));
        let uplink_port = lab.ids.ports.get("uplink/blue").expect("the port has a number");
        let rows = engine.fdb().expect("the FDB can be read");
        assert!(rows.iter().any(|row| row.mac == mac(2) && row.port == uplink_port), "{rows:?}");
        let sweep = engine.age_fdb().expect("the FDB can be aged");
        assert_eq!((sweep.live, sweep.removed), (rows.len(), 0));

        config.switches[0].ageing_seconds = 1;
        lab.sync(&mut engine, &config);
        eventually("the address is forgotten", || {
            engine.age_fdb().expect("the FDB can be aged");
            !engine.fdb().expect("the FDB can be read").iter().any(|row| row.mac == mac(2))
        });

        config.switches[0].ageing_seconds = 300;
        lab.sync(&mut engine, &config);
        assert!(reaches(&guest, 2));
        assert!(engine.fdb().expect("the FDB can be read").iter().any(|row| row.mac == mac(2)));
        config.switches[0].uplink = None;
        lab.sync(&mut engine, &config);
        assert_eq!(engine.fdb().expect("the FDB can be read"), []);
    });
}

#[test]
fn a_port_that_gets_the_number_of_another_starts_at_zero() {
    in_lab(|lab| {
        let (one, _) = (lab.guest("p1", 1), lab.guest("p2", 2));
        let (mut engine, _) = lab.open();
        lab.sync(&mut engine, &config(vec![vnic(1, "p1"), vnic(2, "p2")]));
        assert!(reaches(&one, 2));
        let id = lab.ids.ports.get("vnic/vm1").expect("the port has a number");
        assert!(engine.port_stats(id).expect("counters can be read").rx_packets > 0);

        // vm9 takes vm1's interface and number, in one step and under traffic.
        let mut successor = vnic(1, "p1");
        successor.name = "vm9".into();
        lab.ids.ports.by_name.remove("vnic/vm1");
        lab.ids.ports.by_name.insert("vnic/vm9".into(), id);
        let report = lab.sync(&mut engine, &config(vec![successor, vnic(2, "p2")]));
        assert_eq!(lab.ids.ports.get("vnic/vm9"), Some(id));
        assert_eq!(report.link_changes, Vec::<String>::new(), "the link is handed over");
        assert!(lab.options.pin_dir.join("links/vnic+vm9-tcx").exists());
        assert!(!lab.options.pin_dir.join("links/vnic+vm1-tcx").exists());
        assert!(engine.port_stats(id).expect("counters can be read").rx_packets < 5);
        assert!(reaches(&one, 2));
    });
}

#[test]
fn the_live_tables_decide_as_the_programs_do_and_count_nothing() {
    in_lab(|lab| {
        lab.guest("p1", 1);
        lab.guest("p2", 2);
        let mut config = config(vec![vnic(1, "p1"), with_group(vnic(2, "p2"), "web")]);
        config.acl_groups.push(deny_ports("web", 100));
        let (mut engine, _) = lab.open();
        lab.sync(&mut engine, &config);
        let port = |name| lab.ids.ports.get(name).expect("the port has a number");
        let (one, two) = (port("vnic/vm1"), port("vnic/vm2"));
        let before = engine.drops(one).expect("counters can be read");
        let decide = |bytes: &[u8]| {
            let tables = engine.live_tables();
            let mut context = Context::default();
            let verdict = decide(&SliceFrame::new(bytes), &tables, one, bytes.len() as u32, &mut context);
            tables.check().expect("no look-up failed");
            (verdict, tables.stages(), tables.rules_hit())
        };
        let (verdict, stages, _) = decide(&frame(1, 2));
        assert!(matches!(verdict, Verdict::Unicast(delivery) if delivery.port == two), "{verdict:?}");
        assert_eq!((stages[0], stages.last()), (Stage::Parse, Some(&Stage::RateToVm)));
        let (verdict, stages, _) = decide(&frame(7, 2));
        assert_eq!(verdict, Verdict::Drop { port: one, reason: DropReason::MacGuard });
        assert_eq!(stages.last(), Some(&Stage::MacGuard));

        let mut tcp = [mac(2).0, mac(1).0].concat();
        tcp.extend([0x08, 0x00, 0x45, 0, 0, 40, 0, 0, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
        tcp.extend([0x80, 0x00, 0, 80, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x02, 0, 0, 0, 0, 0, 0]);
        let (verdict, _, rules) = decide(&tcp);
        assert_eq!(verdict, Verdict::Drop { port: two, reason: DropReason::AclToVm });
        assert_eq!(rules.len(), 1);
        assert_eq!(engine.rule_stats(&rules).expect("counters can be read")[0].packets, 0);
        assert_eq!(engine.drops(one).expect("counters can be read"), before);
    });
}

#[test]
fn a_bpffs_is_mounted_where_there_is_none_and_nowhere_else() {
    in_lab(|lab| {
        let options = EngineOptions { pin_dir: tempfile::tempdir().expect("a folder can be made").keep() };
        let error = Engine::open(&options).expect_err("that is no bpffs");
        assert!(error.to_string().contains("mount -t bpf bpf /sys/fs/bpf"), "{error}");
        assert!(matches!(error, EngineError::NotBpffs { .. }));
        std::fs::remove_dir(&options.pin_dir).expect("it is empty");

        // In a mount namespace of this thread's own, everybody else's bpffs stays.
        unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace can be made");
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
            .expect("mounts can be made private");
        while umount2("/sys/fs/bpf", MntFlags::MNT_DETACH).is_ok() {}
        let (engine, _) = lab.open();
        assert!(lab.options.pin_dir.join("maps/PORTS").exists());
        drop(engine);
    });
}
