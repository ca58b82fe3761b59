//! The plug by QEMU's monitor: the VF, bound to `vfio-pci`, becomes a device of the VM, the primary of a failover pair if
//! there is one.
//!
//! A VM has at most one device by the configured identifier, and QEMU is asked for it before anything is done, so that
//! a restarted daemon, and one whose question was never answered, finds out how things are.
//!
//! **Active** means that QEMU has realised the device and holds its VFIO group. Of a failover pair QEMU does that when the
//! guest's virtio-net driver has negotiated `VIRTIO_NET_F_STANDBY`; of a guest that has not, QEMU would remember the
//! VF and plug it whenever it likes, so until then it is not told. Whether the guest's driver sends on the VF is not to
//! be seen from here: whoever needs to know looks at the VF's counters or for gratuitous frames.
//!
//! **Unplugging** asks the guest. One that clings keeps its device: `vfio-pci` lets go only when QEMU does. What protects
//! the network then is that the VF is closed in the NIC, where that is possible.
//!
//! [`monitor`] never waits for QEMU, and QEMU serves one client at a time, so a connection lasts for one transition.

mod monitor;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use super::driver::Function;
use super::{Candidate, Plug, PlugError, Progress};
use monitor::{Monitor, MonitorError, Refusal};

/// The driver on both sides.
const VFIO: &str = "vfio-pci";
/// Where QEMU keeps the devices that were given an identifier.
const PERIPHERAL: &str = "/machine/peripheral";
/// What a guest with a failover driver negotiates.
const STANDBY: &str = "VIRTIO_NET_F_STANDBY";
/// How long QEMU may be silent: plugging a VF pins all of the guest's memory.
const PATIENCE: Duration = Duration::from_secs(30);
/// How long a guest may take to let go after it was asked by force.
const GRACE: Duration = Duration::from_secs(2);
/// Steps that one call takes at most, as far as answers come at once.
const STEPS_MAX: usize = 8;

/// The plug of one vNIC.
#[derive(Debug)]
pub struct Qmp {
    socket: PathBuf,
    device: String,
    bus: Option<String>,
    failover_pair: Option<String>,
    /// QEMU's driver of the device.
    driver: &'static str,
    patience: Duration,
    monitor: Option<Monitor>,
    /// Since when there is no room in its queue.
    crowded_since: Option<Instant>,
    /// What the monitor was asked last.
    asked: Option<Question>,
    /// The VF that the rest is about.
    vf: Option<(String, u16)>,
    is_plugged: bool,
    was_active: bool,
    /// The guest was asked to let go.
    is_leaving: bool,
    /// It said no.
    clings: bool,
    /// Since when it is asked by force.
    forced_at: Option<Instant>,
}

/// What QEMU is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Question {
    /// The devices that there are.
    Devices,
    /// The function that the device stands for.
    Host,
    /// The guest's part of the failover pair.
    Standby,
    Add,
    Delete,
}

/// What the monitor has to say.
enum Talk {
    /// Nothing yet.
    Busy,
    /// It waits for a question.
    Idle,
    Answer(Question, Result<Value, Refusal>),
}

impl Qmp {
    /// A plug into the QEMU behind the monitor's `socket`. The device gets this identifier, on a bus such as a
    /// `pcie-root-port`; the failover pair is the identifier of a virtio-net device.
    pub fn new(socket: &str, device: &str, bus: Option<&str>, failover_pair: Option<&str>) -> Qmp {
        Qmp {
            socket: socket.into(),
            device: device.to_owned(),
            bus: bus.map(str::to_owned),
            failover_pair: failover_pair.map(str::to_owned),
            driver: VFIO,
            patience: PATIENCE,
            monitor: None,
            crowded_since: None,
            asked: None,
            vf: None,
            is_plugged: false,
            was_active: false,
            is_leaving: false,
            clings: false,
            forced_at: None,
        }
    }

    /// Another VF is another matter.
    fn turn_to(&mut self, vf: &Candidate) {
        let name = (vf.pf.clone(), vf.index);
        if self.vf.as_ref() != Some(&name) {
            self.vf = Some(name);
            self.is_plugged = false;
            self.was_active = false;
            self.stay();
        }
    }

    /// Forgets that the guest was asked to let go.
    fn stay(&mut self) {
        self.is_leaving = false;
        self.clings = false;
        self.forced_at = None;
    }

    /// Lets others talk to QEMU.
    fn hang_up(&mut self) {
        self.monitor = None;
        self.asked = None;
    }

    fn failed(&self, operation: &str, detail: impl std::fmt::Display) -> PlugError {
        PlugError::Failed {
            operation: format!("{operation} by QEMU's monitor {}", self.socket.display()),
            detail: detail.to_string(),
        }
    }

    fn refused(&self, what: &str, refusal: &Refusal) -> PlugError {
        PlugError::Refused(format!("QEMU does not {what} {}: {}", self.device, refusal.words))
    }

    /// Sends and takes what it can.
    fn talk(&mut self) -> Result<Talk, PlugError> {
        let talk = self.try_to_talk();
        if talk.is_err() {
            self.hang_up();
        }
        talk.map_err(|error| match error {
            MonitorError::Absent(error) => PlugError::Absent { path: self.socket.clone(), error },
            error => self.failed("talking", error),
        })
    }

    fn try_to_talk(&mut self) -> Result<Talk, MonitorError> {
        let monitor = match &mut self.monitor {
            Some(monitor) => monitor,
            None => {
                let since = *self.crowded_since.get_or_insert_with(Instant::now);
                match Monitor::connect(&self.socket, self.patience) {
                    Err(MonitorError::Crowded) if since.elapsed() < self.patience => return Ok(Talk::Busy),
                    connected => {
                        self.crowded_since = None;
                        self.monitor.insert(connected?)
                    }
                }
            }
        };
        let answer = monitor.turn()?;
        while let Some(event) = monitor.take_event() {
            tracing::debug!(event.name, event.device, "QEMU tells");
            if event.name == "DEVICE_UNPLUG_GUEST_ERROR" && event.device == self.device {
                self.clings = true;
            }
        }
        Ok(match (answer, self.asked) {
            (Some(answer), Some(question)) => {
                self.asked = None;
                Talk::Answer(question, answer)
            }
            _ if monitor.is_idle() => Talk::Idle,
            _ => Talk::Busy,
        })
    }

    fn ask(&mut self, question: Question, vf: &Candidate) {
        let Some(monitor) = &mut self.monitor else { return };
        let (command, arguments) = match question {
            Question::Devices => ("qom-list", json!({"path": PERIPHERAL})),
            Question::Host => {
                ("qom-get", json!({"path": format!("{PERIPHERAL}/{}", self.device), "property": "host"}))
            }
            Question::Standby => {
                let pair = self.failover_pair.as_deref().unwrap_or_default();
                ("x-query-virtio-status", json!({"path": format!("{PERIPHERAL}/{pair}/virtio-backend")}))
            }
            Question::Add => {
                let mut arguments = json!({"driver": self.driver, "id": self.device});
                if self.driver == VFIO {
                    arguments["host"] = json!(vf.pci);
                }
                for (name, value) in [("bus", &self.bus), ("failover_pair_id", &self.failover_pair)] {
                    if let Some(value) = value {
                        arguments[name] = json!(value);
                    }
                }
                ("device_add", arguments)
            }
            Question::Delete => ("device_del", json!({"id": self.device})),
        };
        monitor.ask(command, &arguments);
        self.asked = Some(question);
    }

    /// Whether the device is among these.
    fn is_among(&self, devices: &Value) -> bool {
        let devices = devices.as_array().map(Vec::as_slice).unwrap_or_default();
        devices.iter().any(|device| device["name"].as_str() == Some(&self.device))
    }

    /// The VF as the host's kernel knows it, where it is one that QEMU takes by VFIO.
    fn function(&self, vf: &Candidate) -> Option<Function> {
        vf.pci.as_deref().filter(|_| self.driver == VFIO).map(Function::new)
    }

    /// Binds `vfio-pci` to the VF, where opening it has not.
    fn bind(&self, vf: &Candidate) -> Result<(), PlugError> {
        let Some(function) = self.function(vf) else {
            if self.driver == VFIO {
                return Err(PlugError::Refused("the VF is no PCI function, which VFIO demands".into()));
            }
            return Ok(());
        };
        if function.is_for_vms() {
            return Ok(());
        }
        let bound = function.take_driver().and_then(|()| function.give_driver(Some(VFIO)));
        bound.map_err(|error| PlugError::Failed {
            operation: format!("binding {VFIO} to the VF {}", vf.pci.as_deref().unwrap_or_default()),
            detail: error.to_string(),
        })
    }

    /// One step towards the plugged device, by what QEMU says.
    fn plug_step(&mut self, vf: &Candidate, talk: Talk) -> Result<Option<Progress>, PlugError> {
        match talk {
            Talk::Busy => return Ok(Some(Progress::Pending)),
            Talk::Idle | Talk::Answer(Question::Delete, _) => self.ask(Question::Devices, vf),
            Talk::Answer(Question::Devices, Ok(devices)) if self.is_among(&devices) => {
                self.ask(Question::Host, vf);
            }
            Talk::Answer(Question::Devices, Ok(_)) if self.failover_pair.is_some() => {
                self.ask(Question::Standby, vf);
            }
            Talk::Answer(Question::Devices, Ok(_)) => self.ask(Question::Add, vf),
            Talk::Answer(Question::Devices, Err(refusal)) => return Err(self.refused("list", &refusal)),
            Talk::Answer(Question::Host, answer) => {
                // Emulated devices have no such property.
                let other = answer.ok().and_then(|host| host.as_str().map(str::to_owned));
                return match other.filter(|host| Some(host) != vf.pci.as_ref()) {
                    Some(host) => Err(PlugError::Refused(format!(
                        "QEMU has a device {} already, which is {host}; it must be unplugged first",
                        self.device
                    ))),
                    None => Ok(Some(Progress::Done)),
                };
            }
            Talk::Answer(Question::Standby, Ok(status)) => {
                let features = status["guest-features"]["dev-features"].as_array();
                let is_standby = |text: &Value| text.as_str().is_some_and(|text| text.starts_with(STANDBY));
                if !features.is_some_and(|features| features.iter().any(is_standby)) {
                    // The guest may have been asked while it boots.
                    return Ok(Some(Progress::Pending));
                }
                self.ask(Question::Add, vf);
            }
            // QEMU before 7.2 does not tell.
            Talk::Answer(Question::Standby, Err(refusal)) if refusal.class == "CommandNotFound" => {
                self.ask(Question::Add, vf);
            }
            Talk::Answer(Question::Standby, Err(refusal)) => {
                let pair = self.failover_pair.as_deref().unwrap_or_default();
                return Err(PlugError::Refused(format!(
                    "QEMU knows no virtio-net device {pair} for a failover pair: {}",
                    refusal.words
                )));
            }
            Talk::Answer(Question::Add, Ok(_)) => return Ok(Some(Progress::Done)),
            Talk::Answer(Question::Add, Err(refusal)) => return Err(self.refused("plug", &refusal)),
        }
        Ok(None)
    }

    /// One step towards the unplugged device, by what QEMU says.
    fn unplug_step(
        &mut self,
        vf: &Candidate,
        by_force: bool,
        talk: Talk,
    ) -> Result<Option<Progress>, PlugError> {
        match talk {
            Talk::Busy => return Ok(Some(Progress::Pending)),
            Talk::Answer(Question::Devices, Ok(devices)) if !self.is_among(&devices) => {
                return Ok(Some(Progress::Done));
            }
            Talk::Answer(Question::Devices, Ok(_)) => {
                if !self.is_leaving || (by_force && self.forced_at.is_none()) {
                    self.is_leaving = true;
                    self.clings = false;
                    self.forced_at = by_force.then(Instant::now);
                    self.ask(Question::Delete, vf);
                    return Ok(None);
                }
                let out_of_grace = self.forced_at.is_some_and(|at| at.elapsed() > GRACE);
                if self.clings || out_of_grace {
                    // It is asked anew at the next call.
                    self.stay();
                    return Err(PlugError::Refused(format!(
                        "the guest does not let go of {}; nothing but closing the VF in the NIC, or ending the VM, \
                         takes it away",
                        self.device
                    )));
                }
                return Ok(Some(Progress::Pending));
            }
            Talk::Answer(Question::Devices, Err(refusal)) => return Err(self.refused("list", &refusal)),
            // Whether it is being unplugged already, or is gone, shows in the list.
            Talk::Idle | Talk::Answer(..) => self.ask(Question::Devices, vf),
        }
        Ok(None)
    }
}

impl Plug for Qmp {
    fn check(&mut self) -> Result<(), PlugError> {
        match Path::new(&self.socket).metadata() {
            Ok(_) => Ok(()),
            Err(error) => Err(PlugError::Absent { path: self.socket.clone(), error }),
        }
    }

    fn plug(&mut self, vf: &Candidate) -> Result<Progress, PlugError> {
        self.turn_to(vf);
        self.stay();
        if self.is_plugged {
            return Ok(Progress::Done);
        }
        self.bind(vf)?;
        for _ in 0..STEPS_MAX {
            let talk = self.talk()?;
            match self.plug_step(vf, talk) {
                Ok(None) => {}
                Ok(Some(Progress::Pending)) => break,
                Ok(Some(Progress::Done)) => {
                    self.is_plugged = true;
                    return Ok(Progress::Done);
                }
                Err(error) => {
                    self.hang_up();
                    return Err(error);
                }
            }
        }
        Ok(Progress::Pending)
    }

    fn is_active(&mut self, vf: &Candidate) -> Result<bool, PlugError> {
        self.turn_to(vf);
        if let Some(function) = self.function(vf)
            && (self.was_active || !self.is_plugged)
        {
            // Trying the group while QEMU is about to open it could get into its way, so that is done only when it has
            // it already, or by a daemon that knows nothing yet.
            self.was_active = function.is_in_a_vm();
            return Ok(self.was_active);
        }
        for _ in 0..STEPS_MAX {
            match self.talk()? {
                Talk::Busy => break,
                Talk::Answer(Question::Devices, Ok(devices)) => {
                    let is_there = self.is_among(&devices);
                    if is_there {
                        self.was_active = true;
                        self.hang_up();
                    }
                    return Ok(is_there);
                }
                Talk::Answer(Question::Devices, Err(refusal)) => return Err(self.refused("list", &refusal)),
                Talk::Idle | Talk::Answer(..) => self.ask(Question::Devices, vf),
            }
        }
        Ok(self.was_active)
    }

    fn unplug(&mut self, vf: &Candidate, by_force: bool) -> Result<Progress, PlugError> {
        self.turn_to(vf);
        self.is_plugged = false;
        self.was_active = false;
        let function = self.function(vf);
        if function.as_ref().is_some_and(|function| !function.is_for_vms()) {
            // No VM has it, and none gets it.
            self.hang_up();
            return Ok(Progress::Done);
        }
        let is_held = || function.as_ref().is_some_and(Function::is_in_a_vm);
        for _ in 0..STEPS_MAX {
            let talk = match self.talk() {
                // The VM has ended.
                Err(PlugError::Absent { .. }) if !is_held() => return Ok(Progress::Done),
                talk => talk?,
            };
            match self.unplug_step(vf, by_force, talk) {
                Ok(None) => {}
                Ok(Some(Progress::Pending)) => break,
                Ok(Some(Progress::Done)) => {
                    self.hang_up();
                    self.stay();
                    // QEMU may close what it had a little later.
                    return Ok(if is_held() { Progress::Pending } else { Progress::Done });
                }
                Err(error) => {
                    self.hang_up();
                    return Err(error);
                }
            }
        }
        Ok(Progress::Pending)
    }
}
