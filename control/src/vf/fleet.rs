//! The NICs' threads, one per uplink whose vNICs ask for VFs.
//!
//! Owned by the [`Core`](crate::core::Core), and called in the reconciler's thread; nothing here waits for a NIC.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use parking_lot::Mutex;
use sluice_eswitch::contract::EswitchError;
use sluice_eswitch::lifecycle::Timing;
use sluice_eswitch::nic::{HostNic, Nic};
use sluice_eswitch::watch::{Waker, Watch};
use sluice_policy::config::{Config, Switch, VfAttachment};
use sluice_policy::image::Backings;

use super::knowledge::Findings;
use super::manager::{SoftwarePath, World};
use super::plug::{self, Plug, netns};
use super::record::RecordFile;
use super::uplink::{self, Outbox, Setting};

pub use super::uplink::{Message, Settled};

/// How long a wait for notices lasts.
const NOTICES_WAIT: Duration = Duration::from_secs(10);

/// Opens the NIC that has this interface.
pub type NicOpener = dyn Fn(&str) -> Result<Box<dyn Nic>, EswitchError> + Send + Sync;
/// Makes a plug.
type Plugs = dyn Fn(&str, &VfAttachment) -> Box<dyn Plug> + Send + Sync;

/// What a fleet is made of.
#[derive(Clone)]
pub struct Equipment {
    /// Opens NICs.
    pub open: Arc<NicOpener>,
    /// Makes plugs.
    pub plugs: Arc<Plugs>,
    /// Where findings of probes are kept.
    pub state_dir: PathBuf,
    /// Where it is kept who holds which VF.
    pub runtime_dir: PathBuf,
    /// Patience.
    pub timing: Timing,
}

impl Equipment {
    /// This machine's NICs and the plugs that there are.
    ///
    /// Opens network namespaces that need more privileges than are kept: called before those are given up.
    pub fn of_host(state_dir: PathBuf, runtime_dir: PathBuf) -> Equipment {
        let host = Arc::new(netns::Host::open());
        Equipment {
            open: Arc::new(|netdev| Ok(Box::new(HostNic::open(netdev)?))),
            plugs: Arc::new(move |_, attach| plug::of_host(attach, &host)),
            state_dir,
            runtime_dir,
            // Guests take their time to find a device and to bring it up.
            timing: Timing { attach: 30_000, ..Timing::default() },
        }
    }
}

struct Uplink {
    netdev: String,
    outbox: Outbox,
    thread: JoinHandle<()>,
    is_retiring: bool,
}

/// The threads.
pub struct Fleet {
    equipment: Equipment,
    findings: Findings,
    software: Box<dyn Fn() -> Box<dyn SoftwarePath> + Send>,
    uplinks: BTreeMap<String, Uplink>,
    /// Records of the last daemon have been looked through.
    is_begun: bool,
    watcher: Option<Watcher>,
}

/// The thread that hears the kernel's notices, while there is anybody to tell.
struct Watcher {
    waker: Waker,
    outboxes: Outboxes,
}

/// Whom the watcher tells; `None` when it is to end.
type Outboxes = Arc<Mutex<Option<Vec<Outbox>>>>;

impl Watcher {
    /// Starts it; without notices, NICs are looked at at intervals only.
    fn start() -> Option<Watcher> {
        let watch = Watch::open().map_err(|error| tracing::warn!("{error}")).ok()?;
        let (waker, outboxes) = (watch.waker(), Outboxes::new(Mutex::new(Some(Vec::new()))));
        let listeners = Arc::clone(&outboxes);
        thread::Builder::new()
            .name("vf-notices".to_owned())
            .spawn(move || listen(watch, &listeners))
            .map_err(|error| {
                tracing::warn!("the thread for notices of NICs: {error}; they are read at intervals only")
            })
            .ok()?;
        Some(Watcher { waker, outboxes })
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        *self.outboxes.lock() = None;
        self.waker.wake();
    }
}

fn listen(mut watch: Watch, listeners: &Outboxes) {
    loop {
        let hints = watch.wait(NOTICES_WAIT);
        match &*listeners.lock() {
            None => return,
            Some(outboxes) => match hints {
                Ok(hints) if hints.is_empty() => {}
                Ok(_) => {
                    for outbox in outboxes {
                        // A thread that has ended needs none.
                        let _ = outbox.send(Message::Hint);
                    }
                }
                Err(error) => {
                    tracing::warn!("{error}");
                    return;
                }
            },
        }
    }
}

impl Fleet {
    /// A fleet without threads yet. `software` makes each its way back to the reconciler.
    pub fn new(equipment: Equipment, software: impl Fn() -> Box<dyn SoftwarePath> + Send + 'static) -> Fleet {
        let findings = Findings::open(&equipment.state_dir);
        Fleet {
            equipment,
            findings,
            software: Box::new(software),
            uplinks: BTreeMap::new(),
            is_begun: false,
            watcher: None,
        }
    }

    /// Where vNICs were when the last daemon ended, for the engine's first pass.
    pub fn former(equipment: &Equipment, config: &Config) -> BTreeMap<String, Backings> {
        let of_switch = |switch: &Switch| {
            let mut backings = Backings::default();
            RecordFile::new(&equipment.runtime_dir, &switch.name).read().add_to(&switch.name, &mut backings);
            // What is gone from the configuration has no port.
            backings.vnics.retain(|name, _| {
                config
                    .vnics
                    .iter()
                    .any(|vnic| vnic.name == *name && vnic.switch == switch.name && vnic.wants_vf())
            });
            (backings != Backings::default()).then(|| (switch.name.clone(), backings))
        };
        config.switches.iter().filter_map(of_switch).collect()
    }

    /// Tells every thread of the desired state; starts and retires threads. Called again at intervals, since a thread
    /// can only be replaced when it has given its VFs back.
    pub fn set_world(&mut self, world: &World) {
        self.uplinks.retain(|_, uplink| !uplink.thread.is_finished());
        for uplink in &mut self.uplinks {
            let wanted = wanted_uplink(&world.config, uplink.0);
            let uplink = uplink.1;
            let message = if wanted == Some(&uplink.netdev) && !uplink.is_retiring {
                Message::World(world.clone())
            } else {
                uplink.is_retiring = true;
                Message::Retire(without_claims(world))
            };
            // A thread that has just ended is replaced the next time.
            let _ = uplink.outbox.send(message);
        }
        if !std::mem::replace(&mut self.is_begun, true) {
            self.begin(world);
        }
        for switch in &world.config.switches {
            if let Some(netdev) = wanted_uplink(&world.config, &switch.name)
                && !self.uplinks.contains_key(&switch.name)
            {
                self.start(&switch.name, netdev, world, false);
            }
        }
        if self.uplinks.is_empty() {
            self.watcher = None;
        } else {
            self.watcher = self.watcher.take().or_else(Watcher::start);
        }
        if let Some(watcher) = &self.watcher {
            *watcher.outboxes.lock() =
                Some(self.uplinks.values().map(|uplink| uplink.outbox.clone()).collect());
        }
    }

    /// What the last daemon left at uplinks where nobody asks for VFs now is given back.
    fn begin(&mut self, world: &World) {
        for switch in RecordFile::switches(&self.equipment.runtime_dir) {
            let record = RecordFile::new(&self.equipment.runtime_dir, &switch).read();
            let is_same = wanted_uplink(&world.config, &switch) == Some(&record.netdev);
            if !record.netdev.is_empty() && !is_same {
                self.start(&switch, &record.netdev, &without_claims(world), true);
            }
        }
    }

    /// Switches whose NICs are looked after.
    pub fn switches(&self) -> impl Iterator<Item = &str> {
        let alive = self.uplinks.iter().filter(|(_, uplink)| !uplink.thread.is_finished());
        alive.map(|(switch, _)| switch.as_str())
    }

    fn start(&mut self, switch: &str, netdev: &str, world: &World, is_retiring: bool) {
        let (outbox, inbox) = channel();
        let plugs = Arc::clone(&self.equipment.plugs);
        let setting = Setting {
            switch: switch.to_owned(),
            netdev: netdev.to_owned(),
            open: Arc::clone(&self.equipment.open),
            software: (self.software)(),
            plugs: Box::new(move |name, attachment| plugs(name, attachment)),
            findings: self.findings.clone(),
            record: RecordFile::new(&self.equipment.runtime_dir, switch),
            timing: self.equipment.timing,
            is_retiring,
        };
        let world = world.clone();
        let thread = thread::Builder::new()
            .name(format!("vf-{switch}").chars().take(15).collect())
            .spawn(move || uplink::run(setting, world, &inbox));
        match thread {
            Ok(thread) => {
                let uplink = Uplink { netdev: netdev.to_owned(), outbox, thread, is_retiring };
                self.uplinks.insert(switch.to_owned(), uplink);
            }
            // Tried again by the next pass that looks at everything.
            Err(error) => tracing::error!("the thread of {netdev}: {error}"),
        }
    }

    /// Sends a message to a switch's thread; gives it back if there is none.
    ///
    /// # Errors
    /// The message.
    pub fn send(&self, switch: &str, message: Message) -> Result<(), Message> {
        match self.uplinks.get(switch) {
            Some(uplink) => uplink.outbox.send(message).map_err(|error| error.0),
            None => Err(message),
        }
    }

    /// Has every thread look at its NIC.
    pub fn hint(&self) {
        for uplink in self.uplinks.values() {
            // A thread that has ended needs none.
            let _ = uplink.outbox.send(Message::Hint);
        }
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        for uplink in self.uplinks.values() {
            // Those that have ended are what is wanted.
            let _ = uplink.outbox.send(Message::Stop);
        }
    }
}

/// The uplink's interface of a switch on which somebody asks for a VF.
fn wanted_uplink<'a>(config: &'a Config, switch: &str) -> Option<&'a String> {
    let uplink = config.switches.iter().find(|one| one.name == switch)?.uplink.as_ref()?;
    config.vnics.iter().any(|vnic| vnic.switch == switch && vnic.wants_vf()).then_some(&uplink.netdev)
}

/// The same world, in which nobody asks for a VF.
fn without_claims(world: &World) -> World {
    let mut config = (*world.config).clone();
    for vnic in &mut config.vnics {
        vnic.sriov = None;
    }
    World { config: Arc::new(config), ..world.clone() }
}
