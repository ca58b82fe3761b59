use sluice_eswitch::contract::VfIndex;
use sluice_eswitch::survey::{
    Acs, Cpu, EswitchMode, Group, Host, Iommu, Module, Offload, Parent, Port, PortKind, Release, Sriov,
    Version, Vf,
};

use super::*;

const RIGHTS: Rights = Rights { change: true, read_pci: true };
const ONE: Demand = Demand { vnics: 1, vfio: Vfio::Certain };

fn known(words: &[&str]) -> Reading<Vec<String>> {
    Reading::Known(words.iter().map(|word| (*word).to_owned()).collect())
}

fn named(text: &str) -> Reading<String> {
    Reading::Known(text.to_owned())
}

fn group_of(id: u32, others: &[&str]) -> Reading<Group> {
    let others = others.iter().map(|other| (*other).to_owned()).collect();
    Reading::Known(Group { id, domain: named("identity"), others })
}

/// A machine on which nothing is amiss, with two VFs of four.
fn fine() -> Survey {
    let vf = |index: u16| Vf {
        index: VfIndex(index),
        name: format!("0000:01:10.{}", index * 2),
        driver: named("igbvf"),
        driver_override: Reading::Absent,
        netdevs: vec![format!("eth{index}")],
        group: group_of(20 + u32::from(index), &[]),
    };
    let acs = Reading::Known(Acs { capable: 0x1f, enabled: 0x1d });
    let device = Device {
        bus: "pci".to_owned(),
        name: "0000:01:00.0".to_owned(),
        identity: "8086:10c9".to_owned(),
        driver: named("igb"),
        driver_version: Reading::Absent,
        firmware: Reading::Known(vec![Version { name: "fw".to_owned(), value: "1.2".to_owned() }]),
        role: Role::Pf,
        sriov: Sriov {
            total: Reading::Known(4),
            count: Reading::Known(2),
            autoprobe: Reading::Known(false),
            vf_device: named("10ca"),
            hardware_total: Reading::Known(8),
        },
        vfs: vec![vf(0), vf(1)],
        group: group_of(14, &[]),
        ports: vec![Port { name: "0000:00:03.0".to_owned(), kind: PortKind::Root, acs }],
        eswitch: Reading::Known(EswitchMode::Switchdev),
        tc_offload: Reading::Known(Offload { on: true, changeable: true }),
        changed: false,
    };
    Survey {
        netdev: "pf0".to_owned(),
        host: Host {
            kernel: Reading::Known(Release { major: 7, minor: 2 }),
            cpu: Reading::Known(Cpu::Intel),
            iommu: Iommu {
                units: known(&["dmar0"]),
                groups: Reading::Known(23),
                parameters: known(&["intel_iommu=on", "iommu=pt"]),
                tables: known(&["DMAR"]),
            },
            interrupt_remapping: Reading::Known(true),
            unsafe_interrupts: Reading::Known(false),
            vfio_pci: Module::Loaded,
            cls_flower: Module::BuiltIn,
        },
        nic: Nic::Device { is_up: true, device: Box::new(device) },
    }
}

/// The same with something else on the device.
fn with(change: impl FnOnce(&mut Device)) -> Survey {
    let mut survey = fine();
    if let Nic::Device { device, .. } = &mut survey.nic {
        change(device);
    }
    survey
}

/// The same with something else on the host.
fn on_host(change: impl FnOnce(&mut Host)) -> Survey {
    let mut survey = fine();
    change(&mut survey.host);
    survey
}

fn with_nic(nic: Nic) -> Survey {
    Survey { nic, ..fine() }
}

fn flat(finding: &Finding) -> Vec<&Finding> {
    std::iter::once(finding).chain(finding.children.iter().flat_map(flat)).collect()
}

/// The finding with this code: its level and remedy.
#[track_caller]
fn has(survey: &Survey, demand: Demand, code: Code) -> (Level, String) {
    let all = findings(survey, "blue", demand, RIGHTS);
    let found = flat(&all).into_iter().find(|finding| finding.code == code.as_str()).cloned();
    let found = found.unwrap_or_else(|| panic!("{code:?} is not in {all:#?}"));
    (found.level(), found.remedy)
}

/// With a demand it is as bad as this, and the remedy says so; without, it is a note at worst.
#[track_caller]
fn told(survey: &Survey, code: Code, level: Level, remedy: &str) {
    let (found, said) = has(survey, ONE, code);
    assert_eq!(found, level, "{code:?}");
    assert!(said.contains(remedy), "the remedy of {code:?} is `{said}`");
    let quiet = findings(survey, "blue", Demand::default(), RIGHTS);
    assert!(flat(&quiet).iter().all(|finding| finding.level() <= Level::Note), "{quiet:#?}");
}

#[test]
fn a_machine_where_nothing_is_amiss_is_well() {
    let all = findings(&fine(), "blue", ONE, RIGHTS);
    let amiss: Vec<&Finding> =
        flat(&all).into_iter().filter(|finding| finding.level() != Level::Ok).collect();
    assert!(amiss.is_empty(), "{amiss:#?}");
    assert_eq!((all.title.as_str(), all.code.as_str()), ("uplink pf0 (SR-IOV)", "sriov"));
    assert!(all.detail.contains("1 vNIC asks"));
    assert!(flat(&all).iter().all(|finding| finding.code.starts_with("sriov")));
}

#[test]
fn uplinks_that_are_no_pf_say_so_once() {
    let veth = || Nic::Virtual { kind: Some("veth".to_owned()), members: Vec::new() };
    let gone = || Nic::Gone(Parent { bus: "pci".to_owned(), device: "0000:01:00.0".to_owned() });
    told(&with_nic(veth()), Code::Virtual, Level::Problem, "SR-IOV NIC");
    told(&with_nic(Nic::BadName), Code::BadName, Level::Problem, "ip link");
    told(&with_nic(Nic::Missing), Code::Missing, Level::Warning, "plug it in");
    told(&with_nic(Nic::Unknown(Why::Denied)), Code::Unknown, Level::Note, "");
    told(&with_nic(gone()), Code::Gone, Level::Warning, "ask again");
    let plain = |bus: &str| {
        let bus = bus.to_owned();
        with(|device| (device.role, device.bus) = (Role::Plain, bus))
    };
    told(&plain("virtio"), Code::OtherBus, Level::Problem, "SR-IOV NIC");
    told(
        &with(|device| device.role = Role::Vf("0000:02:00.0".to_owned())),
        Code::IsVf,
        Level::Problem,
        "0000:02:00.0",
    );
    for survey in [with_nic(veth()), with_nic(Nic::Missing), plain("virtio"), plain("pci")] {
        let quiet = findings(&survey, "blue", Demand::default(), RIGHTS);
        assert_eq!((quiet.level(), quiet.children.len()), (Level::Note, 1), "{quiet:#?}");
    }
}

#[test]
fn a_function_without_sriov_says_where_it_is_lacking() {
    let lacking = |hardware, driver: &str| {
        let driver = named(driver);
        with(|device| {
            (device.role, device.driver, device.sriov.hardware_total) = (Role::Plain, driver, hardware);
        })
    };
    let told = |survey: &Survey, code, remedy| told(survey, code, Level::Problem, remedy);
    told(&lacking(Reading::Absent, "igb"), Code::CapabilityAbsent, "firmware");
    told(
        &lacking(Reading::Absent, "mlx5_core"),
        Code::CapabilityAbsent,
        "mstconfig -d 0000:01:00.0 set SRIOV_EN=1",
    );
    told(&lacking(Reading::Known(0), "bnxt_en"), Code::CapabilityEmpty, "enable_sriov");
    told(&lacking(Reading::Known(8), "igb"), Code::CapabilityHidden, "CONFIG_PCI_IOV");
    told(&lacking(Reading::Unknown(Why::Denied), "igb"), Code::CapabilityUnknown, "lspci -vvs 0000:01:00.0");
    told(&with(|device| device.sriov.total = Reading::Known(0)), Code::VfsDisabled, "firmware");
}

#[test]
fn vfs_that_are_missing_can_be_made() {
    let none = with(|device| {
        (device.sriov.count, device.sriov.autoprobe) = (Reading::Known(0), Reading::Known(true));
        device.vfs.clear();
    });
    let path = "/sys/class/net/pf0/device/sriov_";
    let first = format!("echo 0 > {path}drivers_autoprobe, then echo 1 > {path}numvfs");
    told(&none, Code::VfsNone, Level::Problem, &first);
    told(&none, Code::AutoprobeOn, Level::Note, &format!("echo 0 > {path}drivers_autoprobe"));
    told(&none, Code::GroupPending, Level::Ok, "");
    let many = |vnics| Demand { vnics, ..ONE };
    let (_, remedy) = has(&none, many(9), Code::VfsNone);
    assert!(remedy.ends_with(&format!("echo 4 > {path}numvfs")), "no more than there can be: {remedy}");
    let (level, remedy) = has(&fine(), many(3), Code::VfsFew);
    assert!(level == Level::Note && remedy.contains("echo 3 >"), "{remedy}");
    let all = with(|device| device.sriov.total = Reading::Known(2));
    assert!(has(&all, many(3), Code::VfsFew).1.contains("weight"));
    assert_eq!(has(&fine(), many(2), Code::Vfs).0, Level::Ok);
}

#[test]
fn what_stands_in_the_way_of_vfs_that_exist_is_told() {
    told(
        &with(|device| device.driver = Reading::Absent),
        Code::DriverAbsent,
        Level::Problem,
        "drivers_probe",
    );
    let mut down = fine();
    if let Nic::Device { is_up, .. } = &mut down.nic {
        *is_up = false;
    }
    told(&down, Code::LinkDown, Level::Warning, "ip link set pf0 up");
    let waiting = with(|device| {
        (device.vfs[1].driver, device.vfs[1].driver_override) = (Reading::Absent, named("vfio-pci"));
    });
    told(&waiting, Code::VfOverride, Level::Note, "0000:01:10.2/driver_override");
    told(&with(|device| device.changed = true), Code::Changed, Level::Note, "again");
    let garbled = Reading::Unknown(Why::Garbled("many".to_owned()));
    told(&with(|device| device.sriov.count = garbled), Code::VfsUnknown, Level::Note, "");
    let all = findings(&fine(), "blue", ONE, Rights { change: false, read_pci: false });
    assert_eq!(all.level(), Level::Problem);
    assert!(flat(&all).iter().any(|finding| finding.code == Code::ProcessDenied.as_str()));
}

#[test]
fn the_iommu_is_off_or_not_there_and_matters_to_vms_only() {
    let off = |parameters: &[&str], tables: Reading<Vec<String>>, cpu| {
        let parameters = known(parameters);
        on_host(|host| {
            host.iommu = Iommu { units: known(&[]), groups: Reading::Absent, parameters, tables };
            host.cpu = cpu;
        })
    };
    let intel = || Reading::Known(Cpu::Intel);
    let unused = off(&[], known(&["DMAR"]), intel());
    told(&unused, Code::IommuOff, Level::Problem, "boot with intel_iommu=on iommu=pt");
    let emulated = off(&[], known(&["DMAR"]), Reading::Known(Cpu::Amd));
    told(&emulated, Code::IommuOff, Level::Problem, "boot with intel_iommu=on");
    let refused = off(&["intel_iommu=off"], known(&["DMAR"]), intel());
    told(&refused, Code::IommuOff, Level::Problem, "take intel_iommu=off from");
    told(&off(&[], known(&[]), intel()), Code::IommuAbsent, Level::Problem, "enable VT-d");
    told(&off(&[], known(&[]), Reading::Known(Cpu::Amd)), Code::IommuAbsent, Level::Problem, "AMD-Vi");
    told(&off(&[], Reading::Absent, Reading::Absent), Code::IommuAbsent, Level::Problem, "if it has one");
    for (vfio, level) in
        [(Vfio::None, Level::Note), (Vfio::Maybe, Level::Warning), (Vfio::Certain, Level::Problem)]
    {
        let demand = Demand { vnics: 1, vfio };
        assert_eq!(has(&unused, demand, Code::IommuOff).0, level);
        let no_remapping = on_host(|host| host.interrupt_remapping = Reading::Known(false));
        assert_eq!(has(&no_remapping, demand, Code::RemappingOff).0, level);
        let no_vfio = on_host(|host| host.vfio_pci = Module::Missing);
        assert_eq!(has(&no_vfio, demand, Code::ModulesMissing).0, level);
    }
    let forced = on_host(|host| {
        (host.interrupt_remapping, host.unsafe_interrupts) = (Reading::Known(false), Reading::Known(true));
    });
    told(&forced, Code::RemappingOff, Level::Warning, "VT-d");
    let untold = on_host(|host| host.interrupt_remapping = Reading::Unknown(Why::NotTold));
    told(&untold, Code::RemappingUnknown, Level::Note, "");
}

#[test]
fn vfs_that_share_a_group_are_named_with_what_to_do() {
    let shared = |acs: Reading<Acs>| {
        with(|device| {
            for vf in &mut device.vfs {
                vf.group = group_of(3, &["0000:02:00.0"]);
            }
            device.ports[0].acs = acs;
        })
    };
    let off = Reading::Known(Acs { capable: 0x1f, enabled: 0 });
    told(&shared(off), Code::GroupShared, Level::Warning, "off in port 0000:00:03.0");
    told(&shared(Reading::Absent), Code::GroupShared, Level::Warning, "to a slot behind");
    let all = findings(&shared(Reading::Absent), "blue", ONE, RIGHTS);
    let group = flat(&all).into_iter().find(|finding| finding.code == Code::GroupShared.as_str()).cloned();
    let group = group.expect("it is told");
    assert!(group.detail.contains("VFs 0-1") && group.detail.contains("0000:02:00.0"), "{}", group.detail);
    let hidden = with(|device| device.ports[0].acs = Reading::Unknown(Why::Denied));
    told(&hidden, Code::AcsUnknown, Level::Ok, "");
    let unread = with(|device| device.vfs[1].group = Reading::Unknown(Why::Denied));
    told(&unread, Code::GroupUnknown, Level::Note, "");
}

#[test]
fn rules_need_switchdev_and_an_interface_that_takes_them() {
    let mode = |eswitch, on, changeable| {
        with(|device| {
            (device.eswitch, device.tc_offload) = (eswitch, Reading::Known(Offload { on, changeable }));
        })
    };
    let switchdev = || Reading::Known(EswitchMode::Switchdev);
    told(
        &mode(switchdev(), false, true),
        Code::TcOffloadOff,
        Level::Warning,
        "ethtool -K pf0 hw-tc-offload on",
    );
    told(&mode(switchdev(), false, false), Code::TcOffloadAbsent, Level::Warning, "driver");
    let legacy = mode(Reading::Known(EswitchMode::Legacy), false, true);
    told(&legacy, Code::EswitchLegacy, Level::Ok, "devlink dev eswitch set pci/0000:01:00.0 mode switchdev");
    let all = findings(&legacy, "blue", ONE, RIGHTS);
    assert_eq!(all.level(), Level::Ok, "legacy mode needs no rules: {all:#?}");
    told(&mode(Reading::Absent, false, false), Code::EswitchAbsent, Level::Ok, "");
    let held = mode(Reading::Known(EswitchMode::SwitchdevInactive), true, true);
    told(&held, Code::EswitchInactive, Level::Warning, "mode switchdev");
    told(
        &mode(Reading::Known(EswitchMode::Other(9)), true, true),
        Code::EswitchUnknown,
        Level::Warning,
        "legacy",
    );
    told(&mode(Reading::Unknown(Why::Denied), true, true), Code::EswitchUnknown, Level::Note, "");
    told(&on_host(|host| host.cls_flower = Module::Missing), Code::ModulesMissing, Level::Problem, "modules");
}

#[test]
fn demand_counts_vnics_that_may_get_a_vf() {
    let mut demand = Demand::default();
    let by = |kind| Some(v1::VfAttachment { kind: Some(kind) });
    demand.add(&v1::Sriov { weight: Some(0), attach: by(Plug::Qmp(v1::QmpAttachment::default())) });
    assert_eq!(demand, Demand::default(), "a weight of 0 means never");
    demand.add(&v1::Sriov { weight: None, attach: by(Plug::Netns(v1::NetnsAttachment::default())) });
    assert_eq!(demand, Demand { vnics: 1, vfio: Vfio::None });
    demand.add(&v1::Sriov { weight: Some(9), attach: by(Plug::Qmp(v1::QmpAttachment::default())) });
    demand.add(&v1::Sriov { weight: Some(9), attach: by(Plug::External(v1::ExternalAttachment::default())) });
    assert_eq!(demand, Demand { vnics: 3, vfio: Vfio::Certain });
}

#[test]
fn numbers_are_shown_as_ranges() {
    assert_eq!(vfs::ranges(&[0, 1, 2, 5, 7, 8]), "0-2, 5, 7-8");
    assert_eq!(vfs::ranges(&[]), "");
}
