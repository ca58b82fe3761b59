//! The thread of one uplink: opens the NIC, steps its [`Manager`] when something happened or is being waited for, and
//! answers requests.
//!
//! A NIC that cannot be opened is tried again, and is the reason that vNICs are told meanwhile.

use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use sluice_eswitch::contract::EswitchError;
use sluice_eswitch::lifecycle::Timing;
use sluice_eswitch::nic::Nic;
use sluice_eswitch::probe::Verdict;
use sluice_policy::config::Config;
use sluice_policy::image::Backings;
use sluice_proto::v1;
use tokio::sync::oneshot;

use super::knowledge::{Finding, Findings};
use super::manager::{Manager, Outlook, Parts, PlugMaker, Report, SoftwarePath, World};
use super::record::RecordFile;
use crate::events::{self, Severity};

/// Pause between looks at a NIC, which notices of the kernel shorten.
const LOOK: Duration = Duration::from_millis(1000);
/// Least pause between looks: notices come in swarms.
const LOOK_MIN: Duration = Duration::from_millis(100);
/// Pause between questions to a plug that is waited for.
const POLL: Duration = Duration::from_millis(20);
/// Pause before a NIC is opened again.
const REOPEN: Duration = Duration::from_secs(1);

/// How a request to keep a vNIC on its software path, or to end that, ended.
pub type Settled = Result<v1::PathStatus, String>;

/// What the thread is told.
pub enum Message {
    /// The desired state.
    World(World),
    /// Something about a NIC may have changed.
    Hint,
    /// Take a vNIC's VF, and keep it for so long; answered when the vNIC is on its software path.
    Hold {
        /// The vNIC.
        vnic: String,
        /// Why.
        reason: String,
        /// For how long; for ever, if not given.
        time: Option<Duration>,
        /// Where it is then.
        done: oneshot::Sender<Settled>,
    },
    /// End a hold.
    Release {
        /// The vNIC.
        vnic: String,
        /// Where it is then.
        done: oneshot::Sender<Settled>,
    },
    /// An orchestrator's answer.
    Acknowledge {
        /// The answer.
        answer: v1::AcknowledgeVfRequest,
        /// Whether it was awaited.
        done: oneshot::Sender<bool>,
    },
    /// Find out what the NIC enforces.
    Probe {
        /// What was found.
        done: oneshot::Sender<Result<v1::ProbeUplinkResponse, String>>,
    },
    /// Nobody on this uplink asks for VFs any more: give everything back, and end.
    Retire(World),
    /// End, and leave everything as it is.
    Stop,
}

/// What the thread needs.
pub(super) struct Setting {
    pub(super) switch: String,
    pub(super) netdev: String,
    pub(super) open: std::sync::Arc<super::fleet::NicOpener>,
    pub(super) software: Box<dyn SoftwarePath>,
    pub(super) plugs: PlugMaker,
    pub(super) findings: Findings,
    pub(super) record: RecordFile,
    pub(super) timing: Timing,
    /// Only what the last daemon left is to be given back.
    pub(super) is_retiring: bool,
}

/// Runs until it is stopped, or retired and done.
pub(super) fn run(mut setting: Setting, world: World, receiver: &Receiver<Message>) {
    let mut inbox =
        Inbox { receiver, world, holds: BTreeMap::new(), retiring: setting.is_retiring, stopped: false };
    let Some(nic) = open(&mut setting, &mut inbox) else { return };
    let start = Instant::now();
    let epoch = u64::try_from(events::now().as_millis()).unwrap_or(0);
    let findings = setting.findings.clone();
    let mut manager = Manager::new(Parts {
        switch: setting.switch,
        nic,
        software: setting.software,
        plugs: setting.plugs,
        findings: setting.findings,
        record: setting.record,
        timing: setting.timing,
        epoch,
    });
    let clock = || u64::try_from(start.elapsed().as_millis()).unwrap_or(u64::MAX);
    manager.set_world(clock(), inbox.world.clone());
    for (vnic, (reason, time, since)) in std::mem::take(&mut inbox.holds) {
        let left = time.map(|time| time.saturating_sub(since.elapsed()));
        let until = left.map(|left| clock() + u64::try_from(left.as_millis()).unwrap_or(u64::MAX / 2));
        manager.hold(&vnic, &reason, until);
    }
    let (mut look_at, mut looked) = (Instant::now(), Instant::now());
    let mut waiting: Vec<(String, oneshot::Sender<Settled>)> = Vec::new();
    loop {
        let look = look_at <= Instant::now();
        manager.step(clock(), look);
        if look {
            looked = Instant::now();
            look_at = looked + LOOK;
        }
        settle(&manager, clock(), &mut waiting);
        if inbox.retiring && manager.is_idle() {
            manager.finish();
            return;
        }
        let pause = look_at.saturating_duration_since(Instant::now());
        let pause = if manager.is_busy() { pause.min(POLL) } else { pause };
        match receiver.recv_timeout(pause) {
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) | Ok(Message::Stop) => return,
            Ok(Message::Hint) => look_at = look_at.min(looked + LOOK_MIN),
            Ok(Message::World(world)) => manager.set_world(clock(), world),
            Ok(Message::Retire(world)) => {
                inbox.retiring = true;
                manager.set_world(clock(), world);
            }
            Ok(Message::Hold { vnic, reason, time, done }) => {
                let until =
                    time.map(|time| clock() + u64::try_from(time.as_millis()).unwrap_or(u64::MAX / 2));
                manager.hold(&vnic, &reason, until);
                waiting.push((vnic, done));
            }
            Ok(Message::Release { vnic, done }) => {
                manager.release(clock(), &vnic);
                manager.step(clock(), false);
                // Whoever asked may have gone.
                let _ = done.send(status(&manager, clock(), &vnic));
            }
            Ok(Message::Acknowledge { answer, done }) => {
                let _ = done.send(manager.acknowledge(&answer));
            }
            Ok(Message::Probe { done }) => {
                let _ = done.send(probe(&mut manager, &findings));
                look_at = Instant::now();
            }
        }
    }
}

/// The messages that come while there is no NIC yet.
struct Inbox<'a> {
    receiver: &'a Receiver<Message>,
    world: World,
    /// vNICs that are to stay on their software path when the NIC is there: why, and for how long from when on.
    holds: BTreeMap<String, (String, Option<Duration>, Instant)>,
    retiring: bool,
    stopped: bool,
}

impl Inbox<'_> {
    /// Waits for so long, answering that there is no NIC.
    fn wait(&mut self, time: Duration, trouble: &str) {
        let until = Instant::now() + time;
        while !self.stopped && !self.retiring {
            match self.receiver.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Err(RecvTimeoutError::Timeout) | Ok(Message::Hint) => return,
                Err(RecvTimeoutError::Disconnected) | Ok(Message::Stop) => self.stopped = true,
                Ok(Message::World(world)) => {
                    self.world = world;
                    return;
                }
                Ok(Message::Retire(world)) => {
                    self.world = world;
                    self.retiring = true;
                }
                // Those who asked may have gone.
                Ok(Message::Hold { vnic, reason, time, done }) => {
                    self.holds.insert(vnic, (reason, time, Instant::now()));
                    let _ = done.send(Ok(unavailable(trouble)));
                }
                Ok(Message::Release { vnic, done }) => {
                    self.holds.remove(&vnic);
                    let _ = done.send(Ok(unavailable(trouble)));
                }
                Ok(Message::Acknowledge { done, .. }) => {
                    let _ = done.send(false);
                }
                Ok(Message::Probe { done }) => {
                    let _ = done.send(Err(trouble.to_owned()));
                }
            }
        }
    }
}

/// Opens the NIC, however long it takes; `None` when that is no longer wanted.
fn open(setting: &mut Setting, inbox: &mut Inbox<'_>) -> Option<Box<dyn Nic>> {
    let mut told = None;
    loop {
        let error: EswitchError = match (setting.open)(&setting.netdev) {
            Ok(nic) => return Some(nic),
            Err(error) => error,
        };
        let trouble = error.to_string();
        let report = absent(setting, &inbox.world, &trouble, told.as_ref() != Some(&trouble));
        setting.software.report(report);
        // VFs of a NIC that is not there serve nobody, whatever the record says.
        if told.is_some() || setting.software.set(&setting.switch, Backings::default()).is_ok() {
            told = Some(trouble.clone());
        }
        inbox.wait(REOPEN, &trouble);
        if inbox.stopped || inbox.retiring {
            return None;
        }
    }
}

fn unavailable(trouble: &str) -> v1::PathStatus {
    let mut status = v1::PathStatus { message: trouble.to_owned(), ..v1::PathStatus::default() };
    status.set_path(v1::path_status::Path::Software);
    status.set_reason(v1::path_status::Reason::NicUnavailable);
    status
}

fn absent(setting: &Setting, world: &World, trouble: &str, is_news: bool) -> Report {
    let wants = |config: &Config| -> BTreeMap<String, v1::PathStatus> {
        let vnics = config.vnics.iter().filter(|vnic| vnic.switch == setting.switch && vnic.wants_vf());
        vnics.map(|vnic| (vnic.name.clone(), unavailable(trouble))).collect()
    };
    Report {
        switch: setting.switch.clone(),
        revision: world.revision,
        paths: wants(&world.config),
        nic: v1::NicStatus {
            pf: setting.netdev.clone(),
            message: trouble.to_owned(),
            ..v1::NicStatus::default()
        },
        counters: Vec::new(),
        outlook: Outlook::default(),
        events: if is_news { vec![(Severity::Warning, trouble.to_owned())] } else { Vec::new() },
    }
}

fn status(manager: &Manager, now: u64, vnic: &str) -> Settled {
    manager
        .status(now, vnic)
        .ok_or_else(|| format!("vNIC {vnic} does not ask for a VF, so it is on its software path"))
}

/// Answers those whose vNIC is on its software path.
fn settle(manager: &Manager, now: u64, waiting: &mut Vec<(String, oneshot::Sender<Settled>)>) {
    let mut still = Vec::new();
    for (vnic, done) in waiting.drain(..) {
        let found = status(manager, now, &vnic);
        let is_settled = found
            .as_ref()
            .map_or(true, |status| status.path() == v1::path_status::Path::Software && status.vf.is_none());
        if is_settled {
            // Whoever asked may have gone.
            let _ = done.send(found);
        } else {
            still.push((vnic, done));
        }
    }
    *waiting = still;
}

/// Has the NIC probed with a spare VF, and keeps what was found. The NIC's other VFs are not looked at meanwhile.
fn probe(manager: &mut Manager, findings: &Findings) -> Result<v1::ProbeUplinkResponse, String> {
    let vlan = manager.spare_vlans()?;
    let (nic, vf) = manager.spare()?;
    let report = sluice_eswitch::probe::probe(nic, vf, vlan).map_err(|error| error.to_string())?;
    let kind = report.identity.key();
    let certain = report.findings.iter().filter_map(|found| {
        let finding = match found.verdict {
            Verdict::Enforced => Finding::Enforced,
            Verdict::Refuted => Finding::Refuted,
            Verdict::Inconclusive => return None,
        };
        Some((found.ability.name().to_owned(), finding))
    });
    let certain = certain.collect();
    findings.keep(&kind, &certain).map_err(|error| {
        format!("what was found is forgotten when the daemon ends, as it cannot be written: {error}")
    })?;
    let list = report.findings.iter().map(|found| v1::ProbeFinding {
        feature: found.ability.name().to_owned(),
        verdict: match found.verdict {
            Verdict::Enforced => v1::probe_finding::Verdict::Enforced,
            Verdict::Refuted => v1::probe_finding::Verdict::Refuted,
            Verdict::Inconclusive => v1::probe_finding::Verdict::Inconclusive,
        }
        .into(),
        text: found.text.clone(),
    });
    Ok(v1::ProbeUplinkResponse { identity: kind, findings: list.collect() })
}

/// Where messages to the thread go.
pub(super) type Outbox = Sender<Message>;
