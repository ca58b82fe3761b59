//! A spare VF as a guest has it: programmed, opened, and its interface in the room, up, with a socket on it.

use std::thread;
use std::time::{Duration, Instant};

use sluice_policy::net::MacAddr;
use sluice_policy::placement::{Program, VfIndex, VfSettings};

use super::packet::Packets;
use super::room::Room;
use super::{ProbeError, run};
use crate::lifecycle::Action;
use crate::nic::Nic;

/// How long an interface may take to come, and to get a carrier.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between two looks at it.
const PERIOD: Duration = Duration::from_millis(10);

/// A VF that is open, in the room.
pub(super) struct Station {
    pub(super) socket: Packets,
    vf: VfIndex,
    ifindex: u32,
}

impl Station {
    /// Programs the VF, opens it, and takes it into the room. If that fails, the caller closes and cleans the VF.
    pub(super) fn open(
        nic: &mut dyn Nic,
        room: &mut Room,
        vf: VfIndex,
        settings: VfSettings,
    ) -> Result<Station, ProbeError> {
        let program = Program::Legacy(settings);
        run(nic, &Action::Close(vf))?;
        run(nic, &Action::Program { vf, program: program.clone(), is_open: false })?;
        run(nic, &Action::Open { vf, program })?;
        let deadline = Instant::now() + PATIENCE;
        let outside = wait(deadline, || Ok(interface(nic, vf)?))?.ok_or(ProbeError::NoInterface(vf))?;
        room.take(outside).map_err(ProbeError::refused("moving the VF's interface"))?;
        let list = ProbeError::refused;
        let inside = room
            .find(settings.mac)
            .map_err(list("listing the room's interfaces"))?
            .ok_or(ProbeError::NoInterface(vf))?;
        let opened = Station::start(room, vf, inside.ifindex, settings.mac, deadline);
        if opened.is_err() {
            // Where closing does not take the interface away, it must not stay behind.
            let _ = room.put_out(inside.ifindex);
        }
        opened
    }

    fn start(
        room: &mut Room,
        vf: VfIndex,
        ifindex: u32,
        mac: MacAddr,
        deadline: Instant,
    ) -> Result<Station, ProbeError> {
        room.set_up(ifindex).map_err(ProbeError::refused("setting the VF's interface up"))?;
        let running = wait(deadline, || {
            let inmate = room.find(mac).map_err(ProbeError::refused("listing the room's interfaces"))?;
            Ok(inmate.filter(|inmate| inmate.is_running))
        })?;
        if running.is_none() {
            return Err(ProbeError::NoCarrier("the VF gets no carrier while the PF has one".to_owned()));
        }
        let socket = room
            .enter(|| Packets::open(ifindex))
            .map_err(ProbeError::system("opening a packet socket on the VF"))?;
        Ok(Station { socket, vf, ifindex })
    }

    /// Which VF it is.
    pub(super) const fn vf(&self) -> VfIndex {
        self.vf
    }

    /// Closes the VF, and leaves its interface where it was found, if it stays.
    pub(super) fn close(self, nic: &mut dyn Nic, room: &mut Room) -> Result<(), ProbeError> {
        let vf = self.vf;
        if nic.opens_by_binding(vf)? {
            // The interface goes with the driver.
            return Ok(run(nic, &Action::Close(vf))?);
        }
        run(nic, &Action::Close(vf))?;
        room.put_out(self.ifindex).map_err(ProbeError::refused("putting the VF's interface back"))
    }
}

/// The interface of a VF outside.
fn interface(nic: &mut dyn Nic, vf: VfIndex) -> Result<Option<u32>, crate::contract::EswitchError> {
    let vfs = nic.eswitch().vfs()?;
    let netdev = vfs.into_iter().find(|one| one.index == vf).and_then(|one| one.netdev);
    Ok(netdev.and_then(|netdev| nix::net::if_::if_nametoindex(netdev.as_str()).ok()))
}

/// Asks again and again until there is something, or the deadline has passed.
fn wait<T>(
    deadline: Instant,
    mut ask: impl FnMut() -> Result<Option<T>, ProbeError>,
) -> Result<Option<T>, ProbeError> {
    loop {
        let found = ask()?;
        if found.is_some() || Instant::now() >= deadline {
            return Ok(found);
        }
        thread::sleep(PERIOD);
    }
}
