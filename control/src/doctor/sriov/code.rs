//! Codes of findings about VFs: what programs go by. They stay when words change.

/// What was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// The group of an uplink.
    Uplink,
    /// No interface can have the name.
    BadName,
    /// There is no such interface.
    Missing,
    /// The kernel does not tell what is behind the interface.
    Unknown,
    /// The interface is made of software.
    Virtual,
    /// The device vanished.
    Gone,
    /// A device on a bus that has no VFs.
    OtherBus,
    /// The uplink is itself a VF.
    IsVf,
    /// The hardware shows no SR-IOV capability.
    CapabilityAbsent,
    /// The hardware has the capability, with no VFs.
    CapabilityEmpty,
    /// The hardware has VFs, and the kernel does not offer them.
    CapabilityHidden,
    /// There is no SR-IOV, and the hardware cannot be read.
    CapabilityUnknown,
    /// The PF's driver.
    Driver,
    /// The PF has none.
    DriverAbsent,
    /// The PF is down.
    LinkDown,
    /// There are VFs.
    Vfs,
    /// There could be VFs, and there are none.
    VfsNone,
    /// There are fewer VFs than vNICs that ask for one.
    VfsFew,
    /// The driver allows none.
    VfsDisabled,
    /// How many there are is not known.
    VfsUnknown,
    /// A VF may be driven only by a driver that it has not.
    VfOverride,
    /// New VFs get no driver by themselves.
    AutoprobeOff,
    /// New VFs get a driver at once.
    AutoprobeOn,
    /// Whether they do is not known.
    AutoprobeUnknown,
    /// The IOMMU is on.
    Iommu,
    /// The firmware offers an IOMMU, and the kernel does not use it.
    IommuOff,
    /// The firmware offers none.
    IommuAbsent,
    /// Each VF can be given away by itself.
    Isolated,
    /// Some VFs can only be given away with other devices.
    GroupShared,
    /// There is no VF yet to tell.
    GroupPending,
    /// Some groups cannot be read.
    GroupUnknown,
    /// Access control of a port is on.
    Acs,
    /// It is off, or in part.
    AcsOff,
    /// The port has none.
    AcsAbsent,
    /// It cannot be read.
    AcsUnknown,
    /// Interrupts are remapped.
    Remapping,
    /// They are not.
    RemappingOff,
    /// Whether they are is not known.
    RemappingUnknown,
    /// There is no eSwitch with modes: the driver's settings for VFs are all there is.
    EswitchAbsent,
    /// The eSwitch is in legacy mode.
    EswitchLegacy,
    /// The eSwitch is in switchdev mode.
    EswitchSwitchdev,
    /// The eSwitch holds all traffic.
    EswitchInactive,
    /// The eSwitch's mode is not known.
    EswitchUnknown,
    /// The PF takes flower rules.
    TcOffload,
    /// It does not, and could.
    TcOffloadOff,
    /// It cannot.
    TcOffloadAbsent,
    /// Whether it does is not known.
    TcOffloadUnknown,
    /// What the kernel's version means for VFs.
    Kernel,
    /// The modules are there.
    Modules,
    /// One is missing.
    ModulesMissing,
    /// What this process may do.
    Process,
    /// It may not program VFs.
    ProcessDenied,
    /// The device changed while it was examined.
    Changed,
}

impl Code {
    /// Its text in the API.
    pub const fn as_str(self) -> &'static str {
        match self {
            Code::Uplink => "sriov",
            Code::BadName => "sriov.nic.bad-name",
            Code::Missing => "sriov.nic.missing",
            Code::Unknown => "sriov.nic.unknown",
            Code::Virtual => "sriov.nic.virtual",
            Code::Gone => "sriov.nic.gone",
            Code::OtherBus => "sriov.nic.other-bus",
            Code::IsVf => "sriov.nic.is-vf",
            Code::CapabilityAbsent => "sriov.capability.absent",
            Code::CapabilityEmpty => "sriov.capability.empty",
            Code::CapabilityHidden => "sriov.capability.hidden",
            Code::CapabilityUnknown => "sriov.capability.unknown",
            Code::Driver => "sriov.driver",
            Code::DriverAbsent => "sriov.driver.absent",
            Code::LinkDown => "sriov.link.down",
            Code::Vfs => "sriov.vfs",
            Code::VfsNone => "sriov.vfs.none",
            Code::VfsFew => "sriov.vfs.few",
            Code::VfsDisabled => "sriov.vfs.disabled",
            Code::VfsUnknown => "sriov.vfs.unknown",
            Code::VfOverride => "sriov.vfs.override",
            Code::AutoprobeOff => "sriov.autoprobe.off",
            Code::AutoprobeOn => "sriov.autoprobe.on",
            Code::AutoprobeUnknown => "sriov.autoprobe.unknown",
            Code::Iommu => "sriov.iommu",
            Code::IommuOff => "sriov.iommu.off",
            Code::IommuAbsent => "sriov.iommu.absent",
            Code::Isolated => "sriov.isolation",
            Code::GroupShared => "sriov.isolation.shared",
            Code::GroupPending => "sriov.isolation.pending",
            Code::GroupUnknown => "sriov.isolation.unknown",
            Code::Acs => "sriov.acs",
            Code::AcsOff => "sriov.acs.off",
            Code::AcsAbsent => "sriov.acs.absent",
            Code::AcsUnknown => "sriov.acs.unknown",
            Code::Remapping => "sriov.interrupts",
            Code::RemappingOff => "sriov.interrupts.off",
            Code::RemappingUnknown => "sriov.interrupts.unknown",
            Code::EswitchAbsent => "sriov.eswitch.absent",
            Code::EswitchLegacy => "sriov.eswitch.legacy",
            Code::EswitchSwitchdev => "sriov.eswitch.switchdev",
            Code::EswitchInactive => "sriov.eswitch.inactive",
            Code::EswitchUnknown => "sriov.eswitch.unknown",
            Code::TcOffload => "sriov.tc-offload",
            Code::TcOffloadOff => "sriov.tc-offload.off",
            Code::TcOffloadAbsent => "sriov.tc-offload.absent",
            Code::TcOffloadUnknown => "sriov.tc-offload.unknown",
            Code::Kernel => "sriov.kernel",
            Code::Modules => "sriov.modules",
            Code::ModulesMissing => "sriov.modules.missing",
            Code::Process => "sriov.process",
            Code::ProcessDenied => "sriov.process.denied",
            Code::Changed => "sriov.changed",
        }
    }
}
