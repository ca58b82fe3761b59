use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::pci::tests::space;
use super::*;
use crate::contract::VfIndex;

const PF: &str = "0000:01:00.0";
const PORT: &str = "0000:00:03.0";

/// A host's files, in a folder of their own.
struct Files(tempfile::TempDir);

impl Files {
    fn empty() -> Files {
        Files(tempfile::tempdir().expect("a folder"))
    }

    /// A host with an IOMMU and a NIC of four VFs, two of which exist.
    fn host() -> Files {
        let files = Files::empty();
        files.file("proc/sys/kernel/osrelease", "7.2.0-1-amd64\n");
        files.file("proc/cpuinfo", "processor\t: 0\nvendor_id\t: GenuineIntel\n");
        files.file("proc/cmdline", "quiet intel_iommu=on iommu=pt\n");
        files.file("proc/interrupts", " 24:  1  0  IR-PCI-MSIX-0000:01:00.0  0-edge  pf0\n");
        files.folder("sys/class/iommu/dmar0");
        files.file("sys/firmware/acpi/tables/DMAR", "");
        files.file("sys/firmware/acpi/tables/APIC", "");
        files.folder("sys/module/vfio_pci");
        files.device(PORT, "0x060400", Some(3));
        files.device(PF, "0x020000", Some(7));
        files.file(&format!("{}/config", path(PORT)), "");
        files.bytes(
            &format!("{}/config", path(PORT)),
            &space(4, None, Some(Acs { capable: 0x1f, enabled: 0x1d })),
        );
        files.bytes(&format!("{}/config", path(PF)), &space(0, Some(8), None));
        for (name, value) in [
            ("vendor", "0x8086"),
            ("device", "0x10c9"),
            ("sriov_totalvfs", "4"),
            ("sriov_numvfs", "2"),
            ("sriov_drivers_autoprobe", "0"),
            ("sriov_vf_device", "10ca"),
        ] {
            files.file(&format!("{}/{name}", path(PF)), &format!("{value}\n"));
        }
        files.folder("sys/bus/pci/drivers/pfdriver");
        files.file("sys/module/pfdriver/version", "5.1\n");
        files.link("sys/bus/pci/drivers/pfdriver", &format!("{}/driver", path(PF)));
        for (index, name) in [(0, "0000:01:10.0"), (1, "0000:01:10.2")] {
            files.device(name, "0x020000", Some(20 + index));
            files.link(&path(name), &format!("{}/virtfn{index}", path(PF)));
            files.link(&path(PF), &format!("{}/physfn", path(name)));
        }
        files.folder(&format!("{}/net/eth7", path("0000:01:10.0")));
        files.link("sys/bus/pci/drivers/pfdriver", &format!("{}/driver", path("0000:01:10.0")));
        files.file(&format!("{}/driver_override", path("0000:01:10.0")), "(null)\n");
        files.file(&format!("{}/driver_override", path("0000:01:10.2")), "vfio-pci\n");
        files
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn folder(&self, name: &str) {
        fs::create_dir_all(self.path(name)).expect("a folder");
    }

    fn bytes(&self, name: &str, bytes: &[u8]) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("it lies somewhere")).expect("a folder");
        fs::write(path, bytes).expect("a file");
    }

    fn file(&self, name: &str, text: &str) {
        self.bytes(name, text.as_bytes());
    }

    fn link(&self, to: &str, name: &str) {
        let path = self.path(name);
        fs::create_dir_all(path.parent().expect("it lies somewhere")).expect("a folder");
        symlink(self.path(to), path).expect("a link");
    }

    fn remove(&self, name: &str) {
        let path = self.path(name);
        if path.is_dir() && !path.is_symlink() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
            .expect("it is there");
    }

    /// A PCI function, below [`PORT`] unless it is that.
    fn device(&self, name: &str, class: &str, group: Option<u32>) {
        self.file(&format!("{}/class", path(name)), class);
        self.link(&path(name), &format!("sys/bus/pci/devices/{name}"));
        if let Some(group) = group {
            let folder = format!("sys/kernel/iommu_groups/{group}");
            self.file(&format!("{folder}/type"), "identity\n");
            self.link(&path(name), &format!("{folder}/devices/{name}"));
            self.link(&folder, &format!("{}/iommu_group", path(name)));
        }
    }

    fn survey(&self) -> Survey {
        Survey::read(self.0.path(), "pf0", &link(Some(("pci", PF))))
    }

    fn surveyed(&self) -> Device {
        self.survey().device().expect("there is a device").clone()
    }
}

fn path(device: &str) -> String {
    let below = if device == PORT { String::new() } else { format!("/{PORT}") };
    format!("sys/devices/pci0000:00{below}/{device}")
}

fn link(parent: Option<(&str, &str)>) -> Link {
    let parent = parent.map(|(bus, device)| Parent { bus: bus.into(), device: device.into() });
    Link { ifindex: 4, is_up: true, kind: None, parent, members: Vec::new() }
}

#[test]
fn a_host_with_vfs_is_read_as_it_is() {
    let files = Files::host();
    let survey = files.survey();
    assert_eq!(
        survey.host,
        Host {
            kernel: Reading::Known(Release { major: 7, minor: 2 }),
            cpu: Reading::Known(Cpu::Intel),
            iommu: Iommu {
                units: Reading::Known(vec!["dmar0".to_owned()]),
                groups: Reading::Known(4),
                parameters: Reading::Known(vec!["intel_iommu=on".to_owned(), "iommu=pt".to_owned()]),
                tables: Reading::Known(vec!["DMAR".to_owned()]),
            },
            interrupt_remapping: Reading::Known(true),
            unsafe_interrupts: Reading::Absent,
            vfio_pci: Module::Loaded,
            cls_flower: Module::Unknown,
        }
    );
    let device = survey.device().expect("there is a device");
    assert_eq!((device.role.clone(), device.identity.as_str()), (Role::Pf, "8086:10c9"));
    assert_eq!(device.driver, Reading::Known("pfdriver".to_owned()));
    assert_eq!(device.driver_version, Reading::Known("5.1".to_owned()));
    assert_eq!(
        device.sriov,
        Sriov {
            total: Reading::Known(4),
            count: Reading::Known(2),
            autoprobe: Reading::Known(false),
            vf_device: Reading::Known("10ca".to_owned()),
            hardware_total: Reading::Known(8),
        }
    );
    let acs = Reading::Known(Acs { capable: 0x1f, enabled: 0x1d });
    assert_eq!(device.ports, [Port { name: PORT.to_owned(), kind: PortKind::Root, acs }]);
    let alone =
        |id| Reading::Known(Group { id, domain: Reading::Known("identity".to_owned()), others: Vec::new() });
    assert_eq!(
        device.vfs,
        [
            Vf {
                index: VfIndex(0),
                name: "0000:01:10.0".to_owned(),
                driver: Reading::Known("pfdriver".to_owned()),
                driver_override: Reading::Absent,
                netdevs: vec!["eth7".to_owned()],
                group: alone(20),
            },
            Vf {
                index: VfIndex(1),
                name: "0000:01:10.2".to_owned(),
                driver: Reading::Absent,
                driver_override: Reading::Known("vfio-pci".to_owned()),
                netdevs: Vec::new(),
                group: alone(21),
            },
        ]
    );
    assert!(!device.changed && device.is_pci());
    assert_eq!(device.eswitch, Reading::Unknown(Why::NotAsked));
}

#[test]
fn a_vf_knows_its_pf_and_a_plain_function_has_none() {
    let files = Files::host();
    let survey = Survey::read(files.0.path(), "eth7", &link(Some(("pci", "0000:01:10.0"))));
    assert_eq!(survey.device().expect("there is a device").role, Role::Vf(PF.to_owned()));
    for name in ["sriov_numvfs", "sriov_totalvfs"] {
        files.remove(&format!("{}/{name}", path(PF)));
    }
    let device = files.surveyed();
    assert_eq!((device.role, device.sriov.hardware_total), (Role::Plain, Reading::Known(8)));
    assert_eq!(device.vfs, []);
}

#[test]
fn group_mates_are_named_and_bridges_are_not() {
    let files = Files::host();
    let folder = "sys/kernel/iommu_groups/20/devices";
    files.link(&path(PORT), &format!("{folder}/{PORT}"));
    files.link(&path("0000:01:10.2"), &format!("{folder}/0000:01:10.2"));
    let device = files.surveyed();
    let group = device.vfs[0].group.known().expect("it has a group");
    assert_eq!(group.others, ["0000:01:10.2"]);
}

#[test]
fn without_an_iommu_there_are_no_groups() {
    let files = Files::host();
    for name in [PORT, PF, "0000:01:10.0", "0000:01:10.2"] {
        files.remove(&format!("{}/iommu_group", path(name)));
    }
    files.remove("sys/kernel/iommu_groups");
    files.remove("sys/class/iommu/dmar0");
    let survey = files.survey();
    assert_eq!(survey.host.iommu.units, Reading::Known(Vec::new()));
    assert!(survey.host.iommu.groups.is_absent());
    assert!(survey.device().expect("there is a device").vfs.iter().all(|vf| vf.group.is_absent()));
}

#[test]
fn what_an_ordinary_user_sees_of_config_is_unknown() {
    let files = Files::host();
    for name in [PF, PORT] {
        let config = format!("{}/config", path(name));
        let whole = fs::read(files.path(&config)).expect("a file");
        files.bytes(&config, &whole[..64]);
    }
    let device = files.surveyed();
    assert_eq!(device.sriov.hardware_total, Reading::Unknown(Why::Denied));
    let port = device.ports.first().expect("bridges are told by their class");
    assert_eq!((port.name.as_str(), &port.acs), (PORT, &Reading::Unknown(Why::Denied)));
}

#[test]
fn garbled_and_missing_files_are_readings_not_errors() {
    let files = Files::host();
    let pf = |name: &str| format!("{}/{name}", path(PF));
    files.file(&pf("sriov_numvfs"), "many\n");
    files.file(&pf("sriov_drivers_autoprobe"), "perhaps\n");
    files.remove(&pf("driver"));
    files.remove(&pf("sriov_totalvfs"));
    files.folder(&pf("sriov_totalvfs"));
    files.remove(&pf("iommu_group"));
    files.link("sys/bus", &pf("iommu_group"));
    let device = files.surveyed();
    assert_eq!(device.sriov.count, Reading::Unknown(Why::Garbled("many".to_owned())));
    assert_eq!(device.sriov.autoprobe, Reading::Unknown(Why::Garbled("perhaps".to_owned())));
    assert!(matches!(device.sriov.total, Reading::Unknown(Why::Failed(_))), "{:?}", device.sriov.total);
    assert_eq!((device.driver, device.role), (Reading::Absent, Role::Pf));
    assert_eq!(device.group, Reading::Unknown(Why::Garbled("bus".to_owned())));
    assert_eq!(device.vfs, [], "how many there are is not known");
}

#[test]
fn a_device_that_is_gone_and_one_that_was_never_there() {
    let files = Files::host();
    files.remove(&path(PF));
    assert!(matches!(files.survey().nic, Nic::Gone(parent) if parent.device == PF));
    let root = Path::new("/none");
    let virtual_ = Survey::read(root, "veth0", &Link { kind: Some("veth".into()), ..link(None) });
    assert_eq!(virtual_.nic, Nic::Virtual { kind: Some("veth".to_owned()), members: Vec::new() });
    // A VF of which only the link is left.
    let files = Files::host();
    files.remove(&path("0000:01:10.2"));
    assert_eq!(files.surveyed().vfs.len(), 1);
}

#[test]
fn other_buses_have_vfs_too() {
    let files = Files::empty();
    files.file("sys/devices/netdevsim7/sriov_numvfs", "3\n");
    files.link("sys/devices/netdevsim7", "sys/bus/netdevsim/devices/netdevsim7");
    let survey = Survey::read(files.0.path(), "eth0", &link(Some(("netdevsim", "netdevsim7"))));
    let device = survey.device().expect("there is a device");
    assert_eq!((device.role.clone(), device.is_pci()), (Role::Pf, false));
    assert_eq!((&device.sriov.count, &device.sriov.total), (&Reading::Known(3), &Reading::Absent));
}

#[test]
fn names_that_no_interface_has_are_not_asked_for() {
    for name in ["", ".", "..", "../../etc", "a/b", "two words", "sixteen-letters-", "colon:", "zero\0"] {
        assert_eq!(Survey::of(name).nic, Nic::BadName, "{name:?}");
    }
    assert_eq!(Survey::of("none-such").nic, Nic::Missing);
    assert!(matches!(Survey::of("lo").nic, Nic::Virtual { .. }));
}
