//! The probe's course: which frames are sent under which settings, and what it means which of them are heard.

use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::{BuildHasher, Hasher};
use std::path::Path;
use std::time::{Duration, Instant};

use sluice_policy::config::Attestable;
use sluice_policy::net::{MacAddr, VlanId};
use sluice_policy::placement::{
    Capabilities, Evidence, PortVlan, Program, VfIndex, VfSettings, VlanProtocol,
};

use super::exchange::{Heard, Nonce, Note, drain, listen, send};
use super::packet::Packets;
use super::room::Room;
use super::station::Station;
use super::{Finding, ProbeError, Verdict, rate, run};
use crate::contract::EswitchError;
use crate::lifecycle::Action;
use crate::nic::{Nic, usage};

/// Rounds of frames that should pass and frames that should not.
const ROUNDS: u32 = 8;
/// How long a fresh way may take to carry anything.
const WARM_UP: Duration = Duration::from_secs(5);
/// How long frames may take then.
const FLIGHT: Duration = Duration::from_millis(500);

/// Kinds of frames.
const CONTROL: u8 = 1;
const SPOOFED: u8 = 2;
const TAGGED: u8 = 3;
const FROM_PF: u8 = 4;
const FROM_PF_OTHER: u8 = 5;
const FROM_PF_UNTAGGED: u8 = 6;
const LOAD: u8 = 7;

/// Everything that the probe needs.
pub(super) struct Judge<'a> {
    nic: &'a mut dyn Nic,
    vf: VfIndex,
    /// Another spare VF, to hear whether tags pass.
    witness: Option<VfIndex>,
    capabilities: Capabilities,
    room: Room,
    /// One of its own for the witness, as both interfaces may have been given the same name.
    witness_room: Room,
    pf: Packets,
    pf_mac: MacAddr,
    /// The VF's address, one that it does not have, and that of the witness.
    own: MacAddr,
    foreign: MacAddr,
    witness_mac: MacAddr,
    vlan: VlanId,
    other_vlan: VlanId,
    nonce: Nonce,
}

/// How many frames of each kind were heard.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Counts {
    sent: u32,
    controls: u32,
    /// The first and the last control arrived: the way was open all the time.
    is_open: bool,
    suspects: u32,
}

impl Counts {
    /// What it means for whoever should stop the suspects.
    fn verdict(self) -> Verdict {
        match self {
            Counts { suspects: 1.., .. } => Verdict::Refuted,
            Counts { is_open: true, sent, controls, .. } if controls >= sent / 2 => Verdict::Enforced,
            _ => Verdict::Inconclusive,
        }
    }

    fn of(sent: u32, heard: &[Heard], suspect: u8) -> Counts {
        let of = |kind| heard.iter().filter(move |heard| heard.kind == kind);
        let has = |number| of(CONTROL).any(|heard| heard.number == number);
        let count = |kind| u32::try_from(of(kind).count()).unwrap_or(u32::MAX);
        let is_open = sent > 0 && has(0) && has(sent - 1);
        Counts { sent, controls: count(CONTROL), is_open, suspects: count(suspect) }
    }
}

impl<'a> Judge<'a> {
    /// Makes the room, and listens on the PF.
    pub(super) fn open(
        nic: &'a mut dyn Nic,
        vf: VfIndex,
        witness: Option<VfIndex>,
        vlan: VlanId,
        capabilities: Capabilities,
    ) -> Result<Judge<'a>, ProbeError> {
        let netdev = nic.netdev().to_owned();
        let read = |name: &str| fs::read_to_string(Path::new("/sys/class/net").join(&netdev).join(name)).ok();
        if usage::is_up(&netdev) != Some(true) || read("carrier").is_none_or(|text| text.trim() != "1") {
            return Err(ProbeError::NoCarrier(format!("{netdev} is down, or has no carrier")));
        }
        let gone = || EswitchError::DeviceGone { detail: format!("{netdev} is not there") };
        let pf_mac = read("address").and_then(|text| text.trim().parse().ok()).ok_or_else(gone)?;
        let ifindex = nix::net::if_::if_nametoindex(netdev.as_str()).map_err(|_| gone())?;
        let make_room = || Room::open().map_err(ProbeError::system("making a network namespace"));
        let (mut room, witness_room) = (make_room()?, make_room()?);
        for vlan in [vlan, beside(vlan)] {
            // Where there are no VLAN interfaces, the PF may be deaf to the VLAN, and less is found.
            let _ = room.join(ifindex, vlan);
        }
        let pf = Packets::open(ifindex).map_err(ProbeError::system("opening a packet socket on the PF"))?;
        let nonce = RandomState::new().build_hasher().finish().to_be_bytes();
        let [a, b, c, d, ..] = nonce;
        // Locally administered (IEEE 802c), and nobody's.
        let [own, foreign, witness_mac] = [1, 2, 3].map(|last| MacAddr([0x02, a, b, c, d, last]));
        let other_vlan = beside(vlan);
        Ok(Judge {
            nic,
            vf,
            witness,
            capabilities,
            room,
            witness_room,
            pf,
            pf_mac,
            own,
            foreign,
            witness_mac,
            vlan,
            other_vlan,
            nonce,
        })
    }

    /// The whole course.
    pub(super) fn judge(mut self) -> Result<Vec<Finding>, ProbeError> {
        let access = self.access_vlan()?;
        let [mac, untagged, rate] = self.without_vlan()?;
        Ok(vec![mac, untagged, access, rate])
    }

    fn settings(&self) -> VfSettings {
        let spoofchk = self.capabilities.mac_guard != Evidence::Missing;
        VfSettings { mac: self.own, spoofchk, ..VfSettings::default() }
    }

    fn in_vlan(&self, settings: VfSettings) -> VfSettings {
        let vlan = PortVlan { vid: self.vlan, qos: 0, protocol: VlanProtocol::Dot1q };
        VfSettings { vlan: Some(vlan), ..settings }
    }

    /// Opens a VF under these settings; the text says which the driver refuses.
    fn station(&mut self, vf: VfIndex, settings: VfSettings) -> Result<Result<Station, String>, ProbeError> {
        let room = if vf == self.vf { &mut self.room } else { &mut self.witness_room };
        match Station::open(self.nic, room, vf, settings) {
            Ok(station) => Ok(Ok(station)),
            Err(ProbeError::Eswitch(EswitchError::Uncovered { detail, .. })) => Ok(Err(detail)),
            Err(error) => Err(error),
        }
    }

    fn leave(&mut self, station: Station) -> Result<(), ProbeError> {
        let room = if station.vf() == self.vf { &mut self.room } else { &mut self.witness_room };
        station.close(self.nic, room)
    }

    const fn to_pf(&self, kind: u8, source: MacAddr, tag: Option<VlanId>) -> Note {
        Note { destination: self.pf_mac, source, tag, kind }
    }

    const fn pf_to(&self, kind: u8, destination: MacAddr, tag: Option<VlanId>) -> Note {
        Note { destination, source: self.pf_mac, tag, kind }
    }

    /// Sends controls until the first is heard. `false` if none is.
    fn warm_up(&self, from: &Packets, to: &Packets, control: &Note) -> Result<bool, ProbeError> {
        let deadline = Instant::now() + WARM_UP;
        while Instant::now() < deadline {
            self.send(from, control, u32::MAX)?;
            let heard = self.listen(to, Duration::from_millis(100), |heard| !heard.is_empty())?;
            if heard.iter().any(|heard| heard.kind == control.kind) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Sends suspects among controls, controls first and last; what of them is heard.
    fn rounds(
        &self,
        from: &Packets,
        to: &Packets,
        control: &Note,
        suspects: &[Note],
    ) -> Result<(u32, Vec<Heard>), ProbeError> {
        drain(to, self.nonce, |_, _| {}).map_err(ProbeError::system("receiving"))?;
        for round in 0..ROUNDS {
            self.send(from, control, round)?;
            for suspect in suspects {
                self.send(from, suspect, round)?;
            }
        }
        self.send(from, control, ROUNDS)?;
        let is_last = |heard: &Heard| heard.kind == control.kind && heard.number == ROUNDS;
        let heard = self.listen(to, FLIGHT, |heard| heard.iter().any(is_last))?;
        Ok((ROUNDS + 1, heard.into_iter().filter(|heard| heard.number <= ROUNDS).collect()))
    }

    fn send(&self, from: &Packets, note: &Note, number: u32) -> Result<(), ProbeError> {
        let frame = note.bytes(self.nonce, number, 0);
        send(from, &frame, Instant::now() + FLIGHT).map(drop_it).map_err(ProbeError::system("sending"))
    }

    fn listen(
        &self,
        to: &Packets,
        time: Duration,
        is_done: impl Fn(&[Heard]) -> bool,
    ) -> Result<Vec<Heard>, ProbeError> {
        listen(to, self.nonce, Instant::now() + time, is_done).map_err(ProbeError::system("receiving"))
    }

    /// The VF in a port VLAN.
    fn access_vlan(&mut self) -> Result<Finding, ProbeError> {
        let finding = |verdict, text| Finding { ability: Attestable::AccessVlan, verdict, text };
        let station = match self.station(self.vf, self.in_vlan(self.settings()))? {
            Ok(station) => station,
            Err(detail) => return Ok(finding(Verdict::Inconclusive, detail)),
        };
        // To the VF: its VLAN's frames, and no others.
        let control = self.pf_to(FROM_PF, self.own, Some(self.vlan));
        let suspects = [
            self.pf_to(FROM_PF_OTHER, self.own, Some(self.other_vlan)),
            self.pf_to(FROM_PF_UNTAGGED, self.own, None),
        ];
        let is_warm = self.warm_up(&self.pf, &station.socket, &control)?;
        let (_, inward) = self.rounds(&self.pf, &station.socket, &control, &suspects)?;
        // From the VF: in its VLAN, whatever it tags itself.
        let own = self.to_pf(CONTROL, self.own, None);
        let tagged = self.to_pf(TAGGED, self.own, Some(self.other_vlan));
        let (_, outward) = self.rounds(&station.socket, &self.pf, &own, &[tagged])?;
        self.leave(station)?;

        let vid = self.vlan.get();
        let seen = |kind| inward.iter().filter(|heard| heard.kind == kind).count();
        let (received, strange) = (seen(FROM_PF), seen(FROM_PF_OTHER) + seen(FROM_PF_UNTAGGED));
        let with_tag = inward.iter().filter(|heard| heard.kind == FROM_PF && heard.tag.is_some()).count();
        let inside = outward.iter().filter(|heard| heard.tag == Some(vid)).count();
        let outside = outward.len() - inside;
        let text = format!(
            "in port VLAN {vid} the VF heard {received} frames of that VLAN ({with_tag} of them with a tag) and \
             {strange} of others, and of its own {inside} came to the PF in that VLAN and {outside} otherwise"
        );
        let verdict = if strange + with_tag + outside > 0 {
            Verdict::Refuted
        } else if is_warm && received > ROUNDS as usize / 2 && inside > ROUNDS as usize / 2 {
            Verdict::Enforced
        } else {
            Verdict::Inconclusive
        };
        Ok(finding(verdict, text))
    }

    /// The VF without a port VLAN: its address, tags of its own, and its rate.
    fn without_vlan(&mut self) -> Result<[Finding; 3], ProbeError> {
        let silent = |text: &str| {
            [Attestable::MacGuard, Attestable::Untagged, Attestable::RateFromVm].map(|ability| Finding {
                ability,
                verdict: Verdict::Inconclusive,
                text: text.to_owned(),
            })
        };
        let station = match self.station(self.vf, self.settings())? {
            Ok(station) => station,
            Err(detail) => return Ok(silent(&detail)),
        };
        let control = self.to_pf(CONTROL, self.own, None);
        if !self.warm_up(&station.socket, &self.pf, &control)? {
            self.leave(station)?;
            return Ok(silent("nothing that the VF sends to the PF arrives; does an XDP program take it?"));
        }
        let untagged = self.untagged(&station)?;
        let rate = self.rate(&station)?;
        // Last, since a NIC may shut a VF that spoofs.
        let mac = self.mac_guard(&station)?;
        self.leave(station)?;
        Ok([mac, untagged, rate])
    }

    fn mac_guard(&self, station: &Station) -> Result<Finding, ProbeError> {
        let finding = |verdict, text| Finding { ability: Attestable::MacGuard, verdict, text };
        if !self.settings().spoofchk {
            return Ok(finding(Verdict::Inconclusive, "the driver has no spoofchk".to_owned()));
        }
        let control = self.to_pf(CONTROL, self.own, None);
        let spoofed = self.to_pf(SPOOFED, self.foreign, None);
        let (sent, heard) = self.rounds(&station.socket, &self.pf, &control, &[spoofed])?;
        let counts = Counts::of(sent, &heard, SPOOFED);
        let Counts { suspects, controls, .. } = counts;
        let text = format!(
            "with spoofchk {suspects} of {ROUNDS} frames from another address arrived, and {controls} of {sent} from \
             its own"
        );
        Ok(finding(counts.verdict(), text))
    }

    /// The VF sends tags to another VF that is in that VLAN, and that hears the PF's frames of it at the same time.
    fn untagged(&mut self, station: &Station) -> Result<Finding, ProbeError> {
        let finding = |verdict, text| Finding { ability: Attestable::Untagged, verdict, text };
        let Some(vf) = self.witness else {
            let text = "there is no second spare VF, to hear whether tags pass".to_owned();
            return Ok(finding(Verdict::Inconclusive, text));
        };
        let settings = VfSettings { mac: self.witness_mac, ..self.settings() };
        let witness = match self.station(vf, self.in_vlan(settings))? {
            Ok(witness) => witness,
            Err(detail) => return Ok(finding(Verdict::Inconclusive, detail)),
        };
        let control = self.pf_to(CONTROL, self.witness_mac, Some(self.vlan));
        let tagged =
            Note { destination: self.witness_mac, source: self.own, tag: Some(self.vlan), kind: TAGGED };
        let own = self.to_pf(CONTROL, self.own, None);
        let is_warm = self.warm_up(&self.pf, &witness.socket, &control)?;
        drain(&witness.socket, self.nonce, |_, _| {}).map_err(ProbeError::system("receiving"))?;
        drain(&self.pf, self.nonce, |_, _| {}).map_err(ProbeError::system("receiving"))?;
        for round in 0..ROUNDS {
            self.send(&self.pf, &control, round)?;
            self.send(&station.socket, &own, round)?;
            self.send(&station.socket, &tagged, round)?;
        }
        // The VF is heard after its last tag; then whoever hears the PF once more would have heard that tag.
        self.send(&station.socket, &own, ROUNDS)?;
        let is_last = |heard: &Heard| heard.kind == CONTROL && heard.number == ROUNDS;
        let at_pf = self.listen(&self.pf, FLIGHT, |heard| heard.iter().any(is_last))?;
        self.send(&self.pf, &control, ROUNDS)?;
        let at_witness = self.listen(&witness.socket, FLIGHT, |heard| heard.iter().any(is_last))?;
        self.leave(witness)?;

        let way = Counts::of(ROUNDS + 1, &at_pf, TAGGED);
        let counts = Counts::of(ROUNDS + 1, &at_witness, TAGGED);
        let verdict = match counts.verdict() {
            Verdict::Enforced if !is_warm || way.verdict() != Verdict::Enforced => Verdict::Inconclusive,
            verdict => verdict,
        };
        let text = format!(
            "without a port VLAN {} of {ROUNDS} frames with a tag came to a VF in that VLAN, which heard {} of {} of \
             the PF's, and {} of {} without came to the PF",
            counts.suspects, counts.controls, counts.sent, way.controls, way.sent
        );
        Ok(finding(verdict, text))
    }

    fn rate(&mut self, station: &Station) -> Result<Finding, ProbeError> {
        let finding =
            |text| Finding { ability: Attestable::RateFromVm, verdict: Verdict::Inconclusive, text };
        let before = self.measure(station, Duration::ZERO, rate::FREE)?;
        let Some(limit) = rate::limit(before) else {
            return Ok(finding(format!("without a limit only {before} kbit/s arrived")));
        };
        let settings = self.settings();
        match self.reprogram(VfSettings { max_rate_mbps: limit, ..settings }) {
            Err(EswitchError::Uncovered { detail, .. }) => return Ok(finding(detail)),
            result => result?,
        }
        let limited = self.measure(station, rate::BURST, rate::LIMITED)?;
        self.reprogram(settings)?;
        let after = self.measure(station, Duration::ZERO, rate::FREE)?;
        Ok(rate::judge(before, limit, limited, after))
    }

    /// Changes the open VF's settings, by one.
    fn reprogram(&mut self, settings: VfSettings) -> Result<(), EswitchError> {
        let program = Program::Legacy(settings);
        run(self.nic, &Action::Program { vf: self.vf, program, is_open: true })
    }

    fn measure(&self, station: &Station, skipped: Duration, time: Duration) -> Result<u64, ProbeError> {
        let load = self.to_pf(LOAD, self.own, None);
        rate::measure(&station.socket, &self.pf, self.nonce, &load, skipped, time)
            .map_err(ProbeError::system("measuring"))
    }
}

/// Whether a frame found room is not told: what was not sent is not heard, which is told.
const fn drop_it(_: bool) {}

/// The VLAN behind this one, or before the last.
fn beside(vlan: VlanId) -> VlanId {
    let number = u32::from(vlan.get());
    VlanId::new(number + 1).or_else(|_| VlanId::new(number - 1)).unwrap_or(vlan)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(controls: &[u32], suspects: u32) -> Verdict {
        let control = |number: &u32| Heard { tag: None, kind: CONTROL, number: *number };
        let suspect = |number| Heard { tag: None, kind: SPOOFED, number };
        let heard: Vec<Heard> = controls.iter().map(control).chain((0..suspects).map(suspect)).collect();
        Counts::of(9, &heard, SPOOFED).verdict()
    }

    #[test]
    fn silence_proves_something_only_among_what_is_heard() {
        let all: Vec<u32> = (0..9).collect();
        assert_eq!(counts(&all, 0), Verdict::Enforced);
        assert_eq!(counts(&all, 1), Verdict::Refuted);
        assert_eq!(counts(&[], 1), Verdict::Refuted, "whatever was heard was let pass");
        assert_eq!(counts(&[], 0), Verdict::Inconclusive);
        assert_eq!(counts(&all[..8], 0), Verdict::Inconclusive, "it went silent");
        assert_eq!(counts(&all[1..], 0), Verdict::Inconclusive);
        assert_eq!(counts(&[0, 8], 0), Verdict::Inconclusive, "too few to tell from loss");
    }

    #[test]
    fn there_is_a_vlan_beside_each() {
        for number in [1, 100, 4094] {
            let vlan = VlanId::new(number).expect("a VLAN");
            assert_ne!(beside(vlan), vlan);
        }
    }
}
