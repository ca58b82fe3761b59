//! devlink over generic netlink (linux/devlink.h, linux/genetlink.h): the eSwitch's mode, and its ports.

use sluice_policy::placement::Mode;

use crate::netlink::attr::{Attributes, Read};
use crate::netlink::{Connection, Raw, Refusal};

/// `GENL_ID_CTRL`, and its `CTRL_CMD_GETFAMILY`.
const CONTROLLER: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
const FAMILY_GROUPS: u16 = 7;
const GROUP_NAME: u16 = 1;
const GROUP_ID: u16 = 2;

const PORT_GET: u8 = 5;
const ESWITCH_GET: u8 = 29;
const ESWITCH_SET: u8 = 30;
const BUS_NAME: u16 = 1;
const DEV_NAME: u16 = 2;
const NETDEV_IFINDEX: u16 = 6;
const ESWITCH_MODE: u16 = 25;
const FLAVOUR: u16 = 77;
const PF_NUMBER: u16 = 127;
const VF_NUMBER: u16 = 128;
const FLAVOUR_PHYSICAL: u16 = 0;
const FLAVOUR_PCI_VF: u16 = 4;
/// Length of `struct genlmsghdr`.
const HEADER: usize = 4;

/// Name of a device: its bus and its address there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Handle {
    pub(crate) bus: String,
    pub(crate) device: String,
}

/// The mode of an eSwitch as devlink has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum EswitchMode {
    Legacy,
    Switchdev,
    /// Switchdev, with all traffic held; from kernel 6.19, where the driver has it.
    Held,
}

impl EswitchMode {
    const fn number(self) -> u16 {
        match self {
            EswitchMode::Legacy => 0,
            EswitchMode::Switchdev => 1,
            EswitchMode::Held => 2,
        }
    }

    /// The mode for whoever asks what is programmed.
    pub(crate) const fn mode(self) -> Mode {
        match self {
            EswitchMode::Legacy => Mode::Legacy,
            EswitchMode::Switchdev | EswitchMode::Held => Mode::Switchdev,
        }
    }
}

impl From<Mode> for EswitchMode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Legacy => EswitchMode::Legacy,
            Mode::Switchdev => EswitchMode::Switchdev,
        }
    }
}

/// What a port of the eSwitch is to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    Uplink,
    Vf { pf: u16, vf: u16 },
}

/// A port of the eSwitch that has an interface here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct DevlinkPort {
    pub(crate) ifindex: u32,
    pub(crate) flavour: Flavour,
}

/// A connection to devlink.
pub(crate) struct Devlink {
    connection: Connection,
    family: u16,
}

impl Devlink {
    pub(crate) fn open() -> Result<Devlink, Refusal> {
        let (connection, answers) = ask_for_family()?;
        let family = answers.iter().find_map(|answer| body(answer).u16(FAMILY_ID));
        let family =
            family.ok_or_else(|| std::io::Error::other("the kernel does not say devlink's number"))?;
        Ok(Devlink { connection, family })
    }

    /// The multicast group of devlink's notices.
    pub(crate) fn notices() -> Result<u32, Refusal> {
        let (_, answers) = ask_for_family()?;
        let group = answers.iter().find_map(|answer| {
            let groups = body(answer).nested(FAMILY_GROUPS);
            groups
                .values()
                .map(Read::new)
                .find(|group| group.text(GROUP_NAME).as_deref() == Some("config"))?
                .u32(GROUP_ID)
        });
        group.ok_or_else(|| std::io::Error::other("the kernel does not name devlink's notices").into())
    }

    /// The mode; a device without an eSwitch refuses.
    pub(crate) fn mode(&mut self, handle: &Handle) -> Result<EswitchMode, Refusal> {
        let answers = self.connection.request(self.family, &about(ESWITCH_GET, handle).into_bytes(), 0)?;
        match answers.iter().find_map(|answer| body(answer).u16(ESWITCH_MODE)) {
            Some(0) => Ok(EswitchMode::Legacy),
            Some(1) => Ok(EswitchMode::Switchdev),
            Some(2) => Ok(EswitchMode::Held),
            other => {
                Err(std::io::Error::other(format!("the eSwitch is in a mode not known, {other:?}")).into())
            }
        }
    }

    /// Changes the mode. Drivers differ in whether VFs may exist then.
    pub(crate) fn set_mode(&mut self, handle: &Handle, mode: EswitchMode) -> Result<(), Refusal> {
        self.connection.request(self.family, &mode_request(handle, mode), 0).map(drop)
    }

    /// The eSwitch's ports that have interfaces and are uplinks or of VFs.
    pub(crate) fn ports(&mut self, handle: &Handle) -> Result<Vec<DevlinkPort>, Refusal> {
        let answers = self.connection.dump(self.family, &[PORT_GET, 1, 0, 0])?;
        Ok(answers.iter().filter_map(|answer| port(&body(answer), handle)).collect())
    }
}

fn ask_for_family() -> Result<(Connection, Vec<Raw>), Refusal> {
    let mut connection = Connection::open(netlink_sys::protocols::NETLINK_GENERIC)?;
    let question = Attributes::after(&[GET_FAMILY, 1, 0, 0]).text(FAMILY_NAME, "devlink").into_bytes();
    let answers = connection.request(CONTROLLER, &question, 0)?;
    Ok((connection, answers))
}

/// The device that a message of devlink is about.
pub(crate) fn handle_in(payload: &[u8]) -> Option<Handle> {
    let attributes = Read::new(payload.get(HEADER..)?);
    Some(Handle { bus: attributes.text(BUS_NAME)?, device: attributes.text(DEV_NAME)? })
}

fn body(message: &Raw) -> Read<'_> {
    Read::new(message.payload.get(HEADER..).unwrap_or_default())
}

fn about(command: u8, handle: &Handle) -> Attributes {
    Attributes::after(&[command, 1, 0, 0]).text(BUS_NAME, &handle.bus).text(DEV_NAME, &handle.device)
}

fn mode_request(handle: &Handle, mode: EswitchMode) -> Vec<u8> {
    about(ESWITCH_SET, handle).put(ESWITCH_MODE, &mode.number().to_ne_bytes()).into_bytes()
}

fn port(attributes: &Read<'_>, handle: &Handle) -> Option<DevlinkPort> {
    let is_ours = attributes.text(BUS_NAME)? == handle.bus && attributes.text(DEV_NAME)? == handle.device;
    let flavour = match attributes.u16(FLAVOUR)? {
        FLAVOUR_PHYSICAL => Flavour::Uplink,
        FLAVOUR_PCI_VF => Flavour::Vf { pf: attributes.u16(PF_NUMBER)?, vf: attributes.u16(VF_NUMBER)? },
        _ => return None,
    };
    is_ours.then_some(DevlinkPort { ifindex: attributes.u32(NETDEV_IFINDEX)?, flavour })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handle() -> Handle {
        Handle { bus: "pci".into(), device: "0000:01:00.0".into() }
    }

    #[test]
    fn the_mode_is_asked_for_as_devlink_does() {
        let golden = [
            &[30, 1, 0, 0][..],
            &[8, 0, 1, 0],
            b"pci\0",
            &[17, 0, 2, 0],
            b"0000:01:00.0\0\0\0\0",
            &[6, 0, 25, 0, 1, 0, 0, 0],
        ]
        .concat();
        assert_eq!(mode_request(&handle(), EswitchMode::Switchdev), golden);
    }

    #[test]
    fn ports_of_other_devices_and_kinds_are_left_out() {
        let of = |device: &str, flavour: u16| {
            Attributes::default()
                .text(BUS_NAME, "pci")
                .text(DEV_NAME, device)
                .put(FLAVOUR, &flavour.to_ne_bytes())
                .put(NETDEV_IFINDEX, &7_u32.to_ne_bytes())
                .put(PF_NUMBER, &0_u16.to_ne_bytes())
                .put(VF_NUMBER, &3_u16.to_ne_bytes())
                .into_bytes()
        };
        let read = |bytes: &[u8]| port(&Read::new(bytes), &handle());
        let vf = DevlinkPort { ifindex: 7, flavour: Flavour::Vf { pf: 0, vf: 3 } };
        assert_eq!(read(&of("0000:01:00.0", FLAVOUR_PCI_VF)), Some(vf));
        assert_eq!(
            read(&of("0000:01:00.0", FLAVOUR_PHYSICAL)).map(|port| port.flavour),
            Some(Flavour::Uplink)
        );
        assert_eq!(read(&of("0000:01:00.1", FLAVOUR_PCI_VF)), None);
        assert_eq!(read(&of("0000:01:00.0", 7)), None);
    }
}
