//! Veth pairs that stand for an eSwitch's ports: the near ends are the representors, with the rules on them; the far ends
//! are the VFs and the wire, where frames are sent and caught.

use std::collections::BTreeMap;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;
use sluice_eswitch::switchdev::{Counters, Representor, Representors, Rules};
use sluice_policy::placement::{FlowerProgram, RulePort, Target, VfIndex};
use sluice_tests::{Netns, PacketSocket};

/// As many as a scenario has vNICs.
pub(crate) const VFS: u16 = 8;
/// Room for the longest generated frame with a tag more.
const MTU: u32 = 9_500;
/// How long a frame may take from end to end.
const PATIENCE: Duration = Duration::from_secs(5);
/// What marks are made of: an ethertype that nobody answers, and nobody generates.
const MARK: [u8; 14] = [0x02, 0, 0, 0, 0xaa, 1, 0x02, 0, 0, 0, 0xaa, 2, 0x88, 0xb5];

/// What became of a frame on its way through the rules.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fate {
    /// A rule dropped it.
    Dropped,
    /// A rule gave it to software, or none matched.
    Software,
    /// It left there, with these bytes.
    Sent(Target, Vec<u8>),
}

/// The pairs. Frames go from end to end in the order in which they are sent, as all of them pass the queue of one CPU:
/// so when a mark that was sent after a frame has come out, the frame is where it goes.
pub(crate) struct Wires {
    rules: Rules,
    ports: Representors,
    ends: BTreeMap<Target, PacketSocket>,
    mark_in: PacketSocket,
    mark_out: PacketSocket,
    marks: u64,
    /// What the counters of each VF's rules must say.
    counted: BTreeMap<VfIndex, Counters>,
    sent_to_vfs: u64,
    // Last, so that sockets close before.
    _near: Netns,
    _far: Netns,
}

impl Wires {
    /// Makes them, and keeps the calling thread on one CPU.
    pub(crate) fn new() -> Result<Wires> {
        let mut cpus = CpuSet::new();
        cpus.set(0)?;
        sched_setaffinity(Pid::from_raw(0), &cpus).context("staying on one CPU")?;
        let name = |end: &str| format!("sl-{}-{end}", std::process::id());
        let (near, far) = (Netns::create(&name("near"))?, Netns::create(&name("far"))?);
        for netns in [&near, &far] {
            // Nothing but our frames.
            netns.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
        }
        let representors: Vec<String> = (0..VFS).map(|vf| format!("rep{vf}")).collect();
        let ends: Vec<String> = (0..VFS).map(|vf| format!("vf{vf}")).collect();
        let pairs = representors.iter().map(String::as_str).zip(ends.iter().map(String::as_str));
        let pairs: Vec<(&str, &str)> =
            pairs.chain([("rep-up", "wire"), ("mark0", "mark-in"), ("mark1", "mark-out")]).collect();
        let (mut near_lines, mut far_lines) = (String::new(), String::new());
        for (at_near, at_far) in &pairs {
            near_lines += &format!(
                "link add {at_near} mtu {MTU} type veth peer name {at_far} mtu {MTU} netns {}\n",
                far.name()
            );
            near_lines += &format!("link set {at_near} up\n");
            far_lines += &format!("link set {at_far} up\n");
        }
        near.ip_batch(&near_lines)?;
        far.ip_batch(&far_lines)?;
        // A mark takes as many hops as a frame.
        near.run(&["tc", "qdisc", "add", "dev", "mark0", "clsact"])?;
        let all = "filter add dev mark0 ingress matchall action mirred egress redirect dev mark1";
        near.run(&["tc"].into_iter().chain(all.split(' ')).collect::<Vec<_>>())?;

        let representor = |name: &str| -> Result<Representor> {
            let ifindex = near.ifindex(name)?.with_context(|| format!("there is no {name}"))?;
            Ok(Representor { ifindex, netdev: name.to_owned() })
        };
        let mut ports =
            Representors { switch_id: String::new(), uplink: representor("rep-up")?, vfs: BTreeMap::new() };
        let mut sockets = BTreeMap::from([(Target::Uplink, PacketSocket::open(&far, "wire")?)]);
        for (vf, (at_near, at_far)) in (0..VFS).map(VfIndex).zip(&pairs) {
            ports.vfs.insert(vf, representor(at_near)?);
            sockets.insert(Target::Vf(vf), PacketSocket::open(&far, at_far)?);
        }
        let rules = near.enter(|| Ok(Rules::in_software()?))?;
        Ok(Wires {
            rules,
            ports,
            ends: sockets,
            mark_in: PacketSocket::open(&far, "mark-in")?,
            mark_out: PacketSocket::open(&far, "mark-out")?,
            marks: 0,
            counted: BTreeMap::new(),
            sent_to_vfs: 0,
            _near: near,
            _far: far,
        })
    }

    /// Puts these programs, and no others, in place.
    pub(crate) fn program(&mut self, programs: &BTreeMap<VfIndex, FlowerProgram>) -> Result<()> {
        for vf in (0..VFS).map(VfIndex) {
            self.rules.remove(&self.ports, vf)?;
        }
        self.counted.clear();
        self.sent_to_vfs = 0;
        for (vf, program) in programs {
            self.rules.program(&self.ports, *vf, program).with_context(|| format!("programming {vf}"))?;
            self.counted.insert(*vf, Counters::default());
        }
        Ok(())
    }

    /// Sends a frame from an end, and says what became of it.
    pub(crate) fn pass(&mut self, from: Target, frame: &[u8]) -> Result<Fate> {
        self.ends[&from].send(frame)?;
        let mut arrived = self.arrived()?;
        let Some((target, bytes)) = arrived.pop() else {
            return match from {
                // Rules on the uplink send to VFs, and never drop; `settle` looks whether that is true.
                Target::Uplink => Ok(Fate::Software),
                Target::Vf(vf) => self.unsent(vf),
            };
        };
        ensure!(arrived.is_empty(), "it left twice: at {target:?}, and {arrived:02x?}");
        match from {
            Target::Uplink => self.sent_to_vfs += 1,
            Target::Vf(vf) => self.counted.entry(vf).or_default().sent += 1,
        }
        Ok(Fate::Sent(target, bytes))
    }

    /// Sends a frame from a VF without asking what becomes of it.
    pub(crate) fn send(&self, vf: VfIndex, frame: &[u8]) -> Result<()> {
        self.ends[&Target::Vf(vf)].send(frame)
    }

    /// All that has come out since it was last asked, once all that was sent has.
    pub(crate) fn arrived(&mut self) -> Result<Vec<(Target, Vec<u8>)>> {
        self.marks += 1;
        let mark = [&MARK[..], &self.marks.to_be_bytes(), &[0; 40]].concat();
        self.mark_in.send(&mark)?;
        self.mark_out.expect("a mark comes out", PATIENCE, |frame| frame == mark)?;
        let mut arrived = Vec::new();
        for (target, end) in &self.ends {
            arrived.extend(end.drain(|_| true)?.into_iter().map(|frame| (*target, frame)));
        }
        Ok(arrived)
    }

    /// What a VF's rules have counted since they were written.
    pub(crate) fn counters(&mut self, vf: VfIndex) -> Result<Counters> {
        Ok(self.rules.counters(&self.ports, vf, RulePort::Own)?)
    }

    /// What became of a frame of a VF that has not come out anywhere: one counter has risen.
    fn unsent(&mut self, vf: VfIndex) -> Result<Fate> {
        let found = self.counters(vf)?;
        let before = self.counted.entry(vf).or_default();
        let dropped = Counters { dropped: before.dropped + 1, ..*before };
        let software = Counters { software: before.software + 1, ..*before };
        let fate = match found {
            _ if found == dropped => Fate::Dropped,
            _ if found == software => Fate::Software,
            _ if found == *before => bail!("no rule of {vf} has decided about a frame: {found:?}"),
            _ => bail!("counters of {vf} went from {before:?} to {found:?} by a frame that came out nowhere"),
        };
        *before = found;
        Ok(fate)
    }

    /// Compares all counters with what came out.
    pub(crate) fn settle(&mut self) -> Result<()> {
        let mut sent_to_vfs = 0;
        for (vf, counted) in self.counted.clone() {
            let found = self.counters(vf)?;
            ensure!(found == counted, "the rules of {vf} have counted {found:?}, and {counted:?} was seen");
            let from_uplink = self.rules.counters(&self.ports, vf, RulePort::Uplink)?;
            ensure!(from_uplink.dropped == 0, "a rule on the uplink has dropped: {from_uplink:?}");
            sent_to_vfs += from_uplink.sent;
        }
        ensure!(
            sent_to_vfs == self.sent_to_vfs,
            "rules on the uplink have sent {sent_to_vfs} frames, and {} came out",
            self.sent_to_vfs
        );
        Ok(())
    }
}
