//! The probe's course: which frames are sent under which settings, and what it means which of them are heard.

use std::collections::hash_map::RandomState;
use std::fs;
use std::hash::{BuildHasher, Hasher};
use std::path::Path;
use std::time::{Duration, Instant};

use sluice_policy::config::Attestable;
use sluice_policy::net::{MacAddr, VlanId};
use sluice_policy::placement::{Capabilities, Evidence, PortVlan, VfIndex, VfSettings, VlanProtocol};

use super::exchange::{Heard, Nonce, Note, drain, listen, send};
use super::packet::Packets;
use super::room::Room;
use super::station::Station;
use super::{Finding, ProbeError, Verdict, rate};
use crate::contract::EswitchError;
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
    capabilities: Capabilities,
    room: Room,
    pf: Packets,
    pf_mac: MacAddr,
    /// The VF's address, and one that it does not have.
    own: MacAddr,
    foreign: MacAddr,
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
        let mut room = Room::open().map_err(ProbeError::system("making a network namespace"))?;
        let other_vlan = beside(vlan);
        for vlan in [vlan, other_vlan] {
            // Where there are no VLAN interfaces, the PF may be deaf to the VLAN, and less is found.
            let _ = room.join(ifindex, vlan);
        }
        let pf = Packets::open(ifindex).map_err(ProbeError::system("opening a packet socket on the PF"))?;
        let nonce = RandomState::new().build_hasher().finish().to_be_bytes();
        let [a, b, c, d, ..] = nonce;
        // Locally administered (IEEE 802c), and nobody's.
        let (own, foreign) = (MacAddr([0x02, a, b, c, d, 0x01]), MacAddr([0x02, a, b, c, d, 0x02]));
        Ok(Judge { nic, vf, capabilities, room, pf, pf_mac, own, foreign, vlan, other_vlan, nonce })
    }

    /// The whole course.
    pub(super) fn judge(mut self) -> Result<Vec<Finding>, ProbeError> {
        let (access, hears_vlan) = self.access_vlan()?;
        let (guards, free_kbps) = self.guards(hears_vlan)?;
        let rate = self.rate(free_kbps)?;
        Ok(guards.into_iter().chain([access, rate]).collect())
    }

    fn settings(&self) -> VfSettings {
        let spoofchk = self.capabilities.mac_guard != Evidence::Missing;
        VfSettings { mac: self.own, spoofchk, ..VfSettings::default() }
    }

    /// Opens the VF under these settings; the text says which the driver refuses.
    fn station(&mut self, settings: VfSettings) -> Result<Result<Station, String>, ProbeError> {
        match Station::open(self.nic, &mut self.room, self.vf, settings) {
            Ok(station) => Ok(Ok(station)),
            Err(ProbeError::Eswitch(EswitchError::Uncovered { detail, .. })) => Ok(Err(detail)),
            Err(error) => Err(error),
        }
    }

    fn leave(&mut self, station: Station) -> Result<(), ProbeError> {
        station.close(self.nic, &mut self.room, self.vf)
    }

    const fn to_pf(&self, kind: u8, source: MacAddr, tag: Option<VlanId>) -> Note {
        Note { destination: self.pf_mac, source, tag, kind }
    }

    const fn to_vf(&self, kind: u8, tag: Option<VlanId>) -> Note {
        Note { destination: self.own, source: self.pf_mac, tag, kind }
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

    /// The VF in a port VLAN. Also tells whether the PF hears frames of that VLAN.
    fn access_vlan(&mut self) -> Result<(Finding, bool), ProbeError> {
        let finding = |verdict, text: String| Finding { ability: Attestable::AccessVlan, verdict, text };
        let vlan = PortVlan { vid: self.vlan, qos: 0, protocol: VlanProtocol::Dot1q };
        let station = match self.station(VfSettings { vlan: Some(vlan), ..self.settings() })? {
            Ok(station) => station,
            Err(detail) => return Ok((finding(Verdict::Inconclusive, detail), false)),
        };
        // To the VF: its VLAN's frames, and no others.
        let control = self.to_vf(FROM_PF, Some(self.vlan));
        let suspects = [self.to_vf(FROM_PF_OTHER, Some(self.other_vlan)), self.to_vf(FROM_PF_UNTAGGED, None)];
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
        Ok((finding(verdict, text), inside > 0))
    }

    /// The VF without a port VLAN: its address, and tags of its own. Also measures what it can send.
    fn guards(&mut self, hears_vlan: bool) -> Result<(Vec<Finding>, u64), ProbeError> {
        let finding = |ability, verdict, text: String| Finding { ability, verdict, text };
        let both = |verdict, text: &str| {
            [Attestable::MacGuard, Attestable::Untagged]
                .map(|ability| finding(ability, verdict, text.to_owned()))
        };
        let station = match self.station(self.settings())? {
            Ok(station) => station,
            Err(detail) => return Ok((both(Verdict::Inconclusive, &detail).into(), 0)),
        };
        let control = self.to_pf(CONTROL, self.own, None);
        if !self.warm_up(&station.socket, &self.pf, &control)? {
            self.leave(station)?;
            let text = "nothing that the VF sends to the PF arrives; does an XDP program take it?";
            return Ok((both(Verdict::Inconclusive, text).into(), 0));
        }
        let free = rate::measure(
            &station.socket,
            &self.pf,
            self.nonce,
            &self.to_pf(LOAD, self.own, None),
            Duration::ZERO,
            rate::FREE,
        )
        .map_err(ProbeError::system("measuring"))?;
        let tagged = self.to_pf(TAGGED, self.own, Some(self.vlan));
        let (sent, heard) = self.rounds(&station.socket, &self.pf, &control, &[tagged])?;
        let tags = Counts::of(sent, &heard, TAGGED);
        // Last, since a NIC may shut a VF that spoofs.
        let spoofed = self.to_pf(SPOOFED, self.foreign, None);
        let (sent, heard) = self.rounds(&station.socket, &self.pf, &control, &[spoofed])?;
        let sources = Counts::of(sent, &heard, SPOOFED);
        self.leave(station)?;

        let mac = if self.settings().spoofchk {
            let text = format!(
                "with spoofchk {} of {ROUNDS} frames from another address arrived, and {} of {} from its own",
                sources.suspects, sources.controls, sources.sent
            );
            finding(Attestable::MacGuard, sources.verdict(), text)
        } else {
            finding(Attestable::MacGuard, Verdict::Inconclusive, "the driver has no spoofchk".to_owned())
        };
        let text = format!(
            "without a port VLAN {} of {ROUNDS} frames with a tag arrived, and {} of {} without",
            tags.suspects, tags.controls, tags.sent
        );
        let untagged = match tags.verdict() {
            Verdict::Enforced if !hears_vlan => {
                let text = format!("{text}; but the PF was never seen to hear that VLAN");
                finding(Attestable::Untagged, Verdict::Inconclusive, text)
            }
            verdict => finding(Attestable::Untagged, verdict, text),
        };
        Ok((vec![mac, untagged], free))
    }

    /// The VF with a limit.
    fn rate(&mut self, free_kbps: u64) -> Result<Finding, ProbeError> {
        let inconclusive =
            |text: String| Finding { ability: Attestable::RateFromVm, verdict: Verdict::Inconclusive, text };
        let Some(limit) = rate::limit(free_kbps) else {
            return Ok(inconclusive(format!("without a limit only {free_kbps} kbit/s arrived")));
        };
        let station = match self.station(VfSettings { max_rate_mbps: limit, ..self.settings() })? {
            Ok(station) => station,
            Err(detail) => return Ok(inconclusive(detail)),
        };
        let control = self.to_pf(CONTROL, self.own, None);
        let is_warm = self.warm_up(&station.socket, &self.pf, &control)?;
        let load = self.to_pf(LOAD, self.own, None);
        let limited = rate::measure_limited(&station.socket, &self.pf, self.nonce, &load)
            .map_err(ProbeError::system("measuring"))?;
        self.leave(station)?;
        if !is_warm {
            return Ok(inconclusive("nothing that the limited VF sends to the PF arrives".to_owned()));
        }
        Ok(rate::judge(free_kbps, limit, limited))
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
