//! What the host as a whole gives to VFs: IOMMU, interrupt remapping, modules, the kernel's version.

use std::path::Path;

use super::reading::{Reading, Why, flag, garbled, long_text, names, text};

/// The host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Version of the kernel.
    pub kernel: Reading<Release>,
    /// Whose CPU it is: which firmware setting and which kernel parameter to name.
    pub cpu: Reading<Cpu>,
    /// Its IOMMU.
    pub iommu: Iommu,
    /// Whether the IOMMU remaps interrupts; unknown on machines whose `/proc/interrupts` does not tell.
    pub interrupt_remapping: Reading<bool>,
    /// VFIO's `allow_unsafe_interrupts`; absent while its module is not loaded.
    pub unsafe_interrupts: Reading<bool>,
    /// The module that gives VFs to VMs.
    pub vfio_pci: Module,
    /// The module behind flower rules.
    pub cls_flower: Module,
}

/// Major and minor number of a kernel.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Release {
    /// As the 6 in 6.19.
    pub major: u32,
    /// As the 19 in 6.19.
    pub minor: u32,
}

/// Makers of CPUs whose IOMMUs differ.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Cpu {
    /// VT-d.
    Intel,
    /// AMD-Vi.
    Amd,
    /// Anybody else, as `/proc/cpuinfo` has it.
    Other(String),
}

/// The host's IOMMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Iommu {
    /// Units in use, such as `dmar0`; none if it is off or there is none.
    pub units: Reading<Vec<String>>,
    /// How many groups it has.
    pub groups: Reading<usize>,
    /// The words of the kernel's command line that are about it, such as `intel_iommu=on`.
    pub parameters: Reading<Vec<String>>,
    /// ACPI tables that describe one: what the firmware offers. Absent on machines without ACPI.
    pub tables: Reading<Vec<String>>,
}

/// Whether a module of the kernel is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Module {
    /// Loaded, or part of the kernel and showing itself.
    Loaded,
    /// Part of the kernel.
    BuiltIn,
    /// On disk; the kernel loads it by itself or by `modprobe`.
    Available,
    /// Neither here nor on disk.
    Missing,
    /// There is no list of modules for this kernel.
    Unknown,
}

/// Signatures of ACPI tables about IOMMUs: Intel's, AMD's, Arm's.
const TABLES: [&str; 3] = ["DMAR", "IVRS", "IORT"];
const PARAMETERS: [&str; 5] = ["intel_iommu=", "amd_iommu=", "iommu=", "iommu.", "intremap="];

impl Host {
    pub(super) fn read(root: &Path) -> Host {
        let path = |path: &str| root.join(path);
        let release = text(&path("proc/sys/kernel/osrelease"));
        let modules = Modules::of(root, release.known().map(String::as_str));
        Host {
            kernel: release
                .and_then(|text| Release::parse(&text).map_or_else(|| garbled(&text), Reading::Known)),
            cpu: cpu(&path("proc/cpuinfo")),
            iommu: Iommu {
                units: names(&path("sys/class/iommu")),
                groups: names(&path("sys/kernel/iommu_groups")).map(|groups| groups.len()),
                parameters: text(&path("proc/cmdline")).map(|line| parameters(&line)),
                tables: names(&path("sys/firmware/acpi/tables")).map(|tables| {
                    tables
                        .into_iter()
                        .filter(|name| TABLES.contains(&name.trim_end_matches(char::is_numeric)))
                        .collect()
                }),
            },
            interrupt_remapping: long_text(&path("proc/interrupts")).and_then(|text| remapping(&text)),
            unsafe_interrupts: flag(&path("sys/module/vfio_iommu_type1/parameters/allow_unsafe_interrupts")),
            vfio_pci: modules.presence("vfio_pci"),
            cls_flower: modules.presence("cls_flower"),
        }
    }
}

impl Release {
    fn parse(text: &str) -> Option<Release> {
        let mut numbers = text.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some(Release { major: numbers.next()?.ok()?, minor: numbers.next()?.ok()? })
    }
}

fn cpu(path: &Path) -> Reading<Cpu> {
    long_text(path).and_then(|text| {
        let maker = text.lines().find_map(|line| line.strip_prefix("vendor_id")?.split_once(':'));
        match maker.map(|(_, maker)| maker.trim()) {
            Some("GenuineIntel") => Reading::Known(Cpu::Intel),
            Some("AuthenticAMD" | "HygonGenuine") => Reading::Known(Cpu::Amd),
            Some(maker) => Reading::Known(Cpu::Other(maker.to_owned())),
            None => Reading::Unknown(Why::NotTold),
        }
    })
}

fn parameters(line: &str) -> Vec<String> {
    let is_about = |word: &&str| PARAMETERS.iter().any(|parameter| word.starts_with(parameter));
    line.split_ascii_whitespace().filter(is_about).map(str::to_owned).collect()
}

/// On x86, the names of interrupt chips begin with `IR-` where interrupts are remapped; no other file says so.
fn remapping(text: &str) -> Reading<bool> {
    let has = |wanted: &str| text.split_ascii_whitespace().any(|word| word.starts_with(wanted));
    if has("IR-") {
        Reading::Known(true)
    } else if has("IO-APIC") {
        Reading::Known(false)
    } else {
        Reading::Unknown(Why::NotTold)
    }
}

/// The lists of modules of the running kernel.
struct Modules {
    loaded: std::path::PathBuf,
    built_in: Reading<String>,
    on_disk: Reading<String>,
}

impl Modules {
    fn of(root: &Path, release: Option<&str>) -> Modules {
        let list = |name: &str| match release.filter(|release| !release.contains('/')) {
            Some(release) => long_text(&root.join("lib/modules").join(release).join(name)),
            None => Reading::Absent,
        };
        Modules {
            loaded: root.join("sys/module"),
            built_in: list("modules.builtin"),
            on_disk: list("modules.dep"),
        }
    }

    fn presence(&self, module: &str) -> Module {
        if self.loaded.join(module).is_dir() {
            return Module::Loaded;
        }
        let lists = |list: &Reading<String>| Some(list.known()?.lines().any(|line| is_of(line, module)));
        match (lists(&self.built_in), lists(&self.on_disk)) {
            (Some(true), _) => Module::BuiltIn,
            (_, Some(true)) => Module::Available,
            (Some(false), Some(false)) => Module::Missing,
            _ => Module::Unknown,
        }
    }
}

/// Whether a line such as `kernel/net/sched/cls_flower.ko.xz: …` is about a module. File names may have dashes.
fn is_of(line: &str, module: &str) -> bool {
    let path = line.split(':').next().unwrap_or_default();
    let file = path.rsplit('/').next().unwrap_or_default();
    file.split('.').next().unwrap_or_default().replace('-', "_") == module
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn a_folder_without_anything_is_a_host_of_which_nothing_is_known() {
        let root = tempfile::tempdir().expect("a folder");
        let host = Host::read(root.path());
        assert!(host.kernel.is_absent() && host.cpu.is_absent() && host.interrupt_remapping.is_absent());
        assert!(
            host.iommu.units.is_absent() && host.iommu.groups.is_absent() && host.iommu.tables.is_absent()
        );
        assert_eq!((host.vfio_pci, host.cls_flower), (Module::Unknown, Module::Unknown));
    }

    #[test]
    fn modules_are_loaded_built_in_on_disk_or_missing() {
        let root = tempfile::tempdir().expect("a folder");
        let lists = root.path().join("lib/modules/6.19.0-1");
        fs::create_dir_all(&lists).expect("a folder");
        fs::create_dir_all(root.path().join("sys/module/loaded")).expect("a folder");
        fs::write(lists.join("modules.builtin"), "kernel/drivers/vfio/built-in-mod.ko\n").expect("a file");
        fs::write(lists.join("modules.dep"), "kernel/a/on_disk.ko.xz: kernel/b/other.ko.xz\n")
            .expect("a file");
        let modules = Modules::of(root.path(), Some("6.19.0-1"));
        let presence = |name| modules.presence(name);
        assert_eq!((presence("loaded"), presence("built_in_mod")), (Module::Loaded, Module::BuiltIn));
        assert_eq!((presence("on_disk"), presence("other")), (Module::Available, Module::Missing));
        let none = Modules::of(root.path(), Some("../6.19.0-1"));
        assert_eq!(none.presence("on_disk"), Module::Unknown);
    }

    #[test]
    fn the_command_line_and_interrupts_are_read_by_words() {
        assert_eq!(
            parameters("quiet intel_iommu=on iommu=pt root=/dev/x_iommu=1 intremap=off\n"),
            ["intel_iommu=on", "iommu=pt", "intremap=off"]
        );
        assert_eq!(remapping(" 24: 1 0 IR-PCI-MSIX-0000:00:01.0 0-edge virtio0\n"), Reading::Known(true));
        assert_eq!(remapping(" 24: 1 0 IO-APIC 5-edge ACPI:Ged\n"), Reading::Known(false));
        assert_eq!(remapping(" 24: 1 0 GICv3 27 Level arch_timer\n"), Reading::Unknown(Why::NotTold));
        assert_eq!(Release::parse("6.19-rc1"), Some(Release { major: 6, minor: 19 }));
        assert_eq!(Release::parse("six"), None);
    }
}
