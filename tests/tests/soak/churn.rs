//! Ports that come and go under load, by a seed: guests with rings that misbehave, veths and taps that vanish, policies that change.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use sluice_policy::generate::Rng;
use sluice_tests::lab::INTERFACE;
use sluice_tests::wire::{BROADCAST, Mac, mac_text, note, udp4};
use sluice_tests::{Lab, PacketSocket, Tap, Vm};

use crate::guest::{ENTRIES, Guest, Meeting, Mischief};

/// Numbers of those that come and go; their names and addresses follow from them.
pub(crate) const RINGS: [u16; 4] = [21, 22, 23, 24];
pub(crate) const VETHS: [u16; 3] = [31, 32, 33];
pub(crate) const TAPS: [u16; 2] = [41, 42];
/// Most frames that one of them sends between two looks.
const BURST: usize = 32;
/// Between two looks: about 20 000 frames a second from each.
const PAUSE: Duration = Duration::from_micros(1500);
/// How long a guest waits for the switch before it looks for orders again.
const RETRY: Duration = Duration::from_millis(5);

/// Policies, with the one that every port may begin with first.
const POLICIES: [&str; 12] = [
    "",
    "policy: {vlan: {access: 7}}",
    "policy: {vlan: {access: 8}, dhcpGuard: true, raGuard: true}",
    "policy: {allowSpoofing: true, learnLimit: 64}",
    "policy: {allowSpoofing: true, vlan: {trunk: {allowed: [\"7-9\"], native: 7}}}",
    "policy: {unknownUnicast: true}",
    "policy: {ipGuard: [\"10.77.0.1\", \"fd77::1\"]}",
    "policy: {rate: {fromVm: {bps: 20000000, burstBytes: 65536}, toVm: {bps: 20000000, burstBytes: 65536}}}",
    "policy: {acl: {groups: [many]}}",
    "policy: {acl: {groups: [few], rules: [{priority: 5, direction: TO_VM, match: {ipProto: udp}, action: DENY}]}}",
    "policy: {acl: {default: {fromVm: DENY, toVm: ALLOW}}}",
    "policy: {acl: {default: {fromVm: ALLOW, toVm: DENY}, groups: [few, many]}}",
];

/// The shared groups that policies name; `many` has so many rules.
pub(crate) fn groups(many: u64) -> String {
    let rule = |number: u64| {
        let port = 1000 + number;
        format!(
            "{{priority: {number}, direction: FROM_VM, match: {{ipProto: udp, dstPorts: [\"{port}\"]}}, action: DENY}}"
        )
    };
    let rules: Vec<String> = (1..=many).map(rule).collect();
    format!(
        "aclGroups:\n- {{name: few, rules: [{{priority: 9, direction: FROM_VM, match: {{ipProto: tcp}}, action: DENY}}]}}\n\
         - {{name: many, rules: [{}]}}\n",
        rules.join(", ")
    )
}

fn address(number: u16) -> Mac {
    let [high, low] = number.to_be_bytes();
    [0x02, 0, 0, 0, high, low]
}

/// A frame as one of them sends it: mostly to another of them, who may be there or not.
fn frame(rng: &mut Rng, own: u16) -> Vec<u8> {
    let peers = [&RINGS[..], &VETHS, &TAPS, &[99]].concat();
    let to = if rng.chance(1) { BROADCAST } else { address(*rng.pick(&peers)) };
    let from = if rng.chance(2) { address(rng.next() as u16) } else { address(own) };
    let tags: &[(u16, u16)] = if rng.chance(10) { &[(0x8100, 7)] } else { &[] };
    match rng.below(20) {
        0 => (0..14 + rng.below(1500)).map(|_| rng.byte()).collect(),
        1..8 => note(to, from, tags, "load"),
        _ => {
            let payload = vec![rng.byte(); rng.below(1400)];
            let ports = (rng.next() as u16, 1000 + rng.below(64) as u16);
            udp4(to, from, ([10, 77, 0, 1].into(), [10, 77, 0, 2].into()), ports, &payload)
        }
    }
}

/// What has been done so far, and what came of it.
#[derive(Debug, Default)]
pub(crate) struct Deeds {
    /// By name.
    pub(crate) done: BTreeMap<String, u64>,
    /// Frames sent and received by those that come and go.
    pub(crate) sent: Arc<AtomicU64>,
    pub(crate) received: Arc<AtomicU64>,
    /// Connections of guests.
    pub(crate) connections: Arc<AtomicU64>,
}

impl Deeds {
    fn note(&mut self, deed: &str) {
        *self.done.entry(deed.to_owned()).or_default() += 1;
    }
}

enum Order {
    Misbehave(Mischief),
}

/// A machine that sends and receives in a thread of its own, until it is dropped.
struct Life {
    orders: Option<Sender<Order>>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl Life {
    fn start(name: &str, live: impl FnOnce(Receiver<Order>) -> Result<()> + Send + 'static) -> Result<Life> {
        let (orders, theirs) = channel();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || live(theirs))?;
        Ok(Life { orders: Some(orders), thread: Some(thread) })
    }

    fn order(&self, order: Order) {
        // Whoever has ended takes no orders.
        let _ = self.orders.as_ref().map(|orders| orders.send(order));
    }

    /// Ends it, and says how it fared.
    fn end(mut self) -> Result<()> {
        drop(self.orders.take());
        let thread = self.thread.take().context("it has ended")?;
        thread.join().map_err(|_| anyhow!("a machine panicked"))?
    }
}

impl Drop for Life {
    fn drop(&mut self) {
        drop(self.orders.take());
        if let Some(thread) = self.thread.take() {
            // A test that fails has said why.
            let _ = thread.join();
        }
    }
}

/// The life of a guest with rings: it connects again whenever it is alone.
fn live_with_rings(
    number: u16,
    meeting: Meeting,
    seed: u64,
    orders: &Receiver<Order>,
    (sent, received, connections): (&AtomicU64, &AtomicU64, &AtomicU64),
) -> Result<()> {
    let mut rng = Rng::new(seed);
    loop {
        let mut guest = loop {
            match orders.try_recv() {
                Err(TryRecvError::Disconnected) => return Ok(()),
                // Nobody is there to be bothered.
                Ok(Order::Misbehave(_)) | Err(TryRecvError::Empty) => {}
            }
            // Perhaps more than the port has, which refuses them.
            match Guest::meet(&meeting, 1 + rng.below(2), ENTRIES)? {
                Some(guest) => break guest,
                None => std::thread::sleep(RETRY),
            }
        };
        connections.fetch_add(1, Ordering::Relaxed);
        let mut is_slow = false;
        loop {
            match orders.try_recv() {
                Err(TryRecvError::Disconnected) => return Ok(()),
                Err(TryRecvError::Empty) => {}
                Ok(Order::Misbehave(mischief)) => {
                    // Some have full rings then, and frames on their way.
                    let goes_on = guest.misbehave(mischief, &mut rng);
                    if !goes_on {
                        std::thread::sleep(Duration::from_millis(rng.below(20) as u64));
                        break;
                    }
                }
            }
            if guest.is_alone() {
                break;
            }
            let count = rng.below(BURST);
            let pair = rng.below(guest.pairs());
            let some = (0..count).take_while(|_| guest.send(pair, [0; 12], &frame(&mut rng, number))).count();
            sent.fetch_add(some as u64, Ordering::Relaxed);
            guest.flush();
            // Now and then it takes nothing for a while, and its rings fill.
            is_slow = rng.chance(if is_slow { 99 } else { 1 });
            if !is_slow {
                let mut some = 0;
                for pair in 0..guest.pairs() {
                    while guest.receive(pair).is_some() {
                        some += 1;
                    }
                }
                guest.flush();
                received.fetch_add(some, Ordering::Relaxed);
            }
            std::thread::sleep(PAUSE);
        }
    }
}

/// The life of a machine on an interface, which may go at any moment.
fn live_on_wire(
    number: u16,
    seed: u64,
    orders: &Receiver<Order>,
    mut send: impl FnMut(&[u8]) -> Result<()>,
    mut receive: impl FnMut() -> Result<u64>,
    (sent, received): (&AtomicU64, &AtomicU64),
) {
    let mut rng = Rng::new(seed);
    while !matches!(orders.try_recv(), Err(TryRecvError::Disconnected)) {
        for _ in 0..rng.below(BURST) {
            if send(&frame(&mut rng, number)).is_err() {
                // The interface has gone, or its queue is full.
                break;
            }
            sent.fetch_add(1, Ordering::Relaxed);
        }
        if let Ok(count) = receive() {
            received.fetch_add(count, Ordering::Relaxed);
        }
        std::thread::sleep(PAUSE);
    }
}

/// Who comes and goes.
enum Kind {
    Rings { listens: bool },
    Veth(Vm),
    Tap,
}

struct Place {
    number: u16,
    kind: Kind,
    life: Option<Life>,
    has_vnic: bool,
}

impl Place {
    fn name(&self) -> String {
        format!("vm{}", self.number)
    }

    fn port(&self) -> String {
        format!("p{}", self.number)
    }
}

/// All that come and go.
pub(crate) struct Crowd<'a> {
    lab: &'a Lab,
    places: Vec<Place>,
    rng: Rng,
    pub(crate) deeds: Deeds,
}

impl<'a> Crowd<'a> {
    /// Nobody is there yet.
    pub(crate) fn new(lab: &'a Lab, seed: u64) -> Result<Crowd<'a>> {
        let mut places = Vec::new();
        let mut add = |number, kind| places.push(Place { number, kind, life: None, has_vnic: false });
        for number in RINGS {
            add(number, Kind::Rings { listens: number == RINGS[0] });
        }
        for number in VETHS {
            let vm = lab.bare_vm(number)?;
            lab.host().run(&["ip", "link", "del", &vm.port])?;
            add(number, Kind::Veth(vm));
        }
        for number in TAPS {
            add(number, Kind::Tap);
        }
        Ok(Crowd { lab, places, rng: Rng::new(seed), deeds: Deeds::default() })
    }

    fn socket(&self, number: u16) -> PathBuf {
        self.lab.places().socket.with_file_name(format!("vm{number}.sock"))
    }

    /// Somebody does something.
    pub(crate) fn turn(&mut self) -> Result<()> {
        let at = self.rng.below(self.places.len());
        let place = &self.places[at];
        let is_there = place.life.is_some();
        match (place.has_vnic, is_there, self.rng.below(10)) {
            // The port before the machine, or the machine before the port.
            (false, _, 0..6) => self.apply(at, "a port comes"),
            (_, false, _) => self.come(at),
            (_, true, 0) => self.leave(at),
            (true, true, 1..3) => self.delete(at),
            (true, true, 3..5) => self.apply(at, "a policy changes"),
            (true, true, 5) => self.edit_group(),
            (_, true, _) => self.misbehave(at),
        }
    }

    /// A machine appears.
    fn come(&mut self, at: usize) -> Result<()> {
        let socket = self.socket(self.places[at].number);
        let place = &mut self.places[at];
        let (number, seed) = (place.number, self.rng.next());
        let (sent, received) = (Arc::clone(&self.deeds.sent), Arc::clone(&self.deeds.received));
        let (name, port) = (place.name(), place.port());
        let life = match &place.kind {
            Kind::Rings { listens } => {
                let meeting = if *listens { Meeting::listen(&socket)? } else { Meeting::Connect(socket) };
                let connections = Arc::clone(&self.deeds.connections);
                let live = move |orders: Receiver<Order>| {
                    live_with_rings(number, meeting, seed, &orders, (&*sent, &*received, &*connections))
                };
                Life::start(&name, live)?
            }
            Kind::Veth(vm) => {
                self.lab.wire(vm, &[])?;
                let socket = PacketSocket::open(&vm.netns, INTERFACE)?;
                let live = move |orders: Receiver<Order>| {
                    let receive = || Ok(socket.drain(|_| true)?.len() as u64);
                    let send = |frame: &[u8]| socket.send(frame);
                    live_on_wire(number, seed, &orders, send, receive, (&sent, &received));
                    Ok(())
                };
                Life::start(&name, live)?
            }
            Kind::Tap => {
                let tap = Tap::open(self.lab.host(), &port)?;
                self.lab.host().run(&["ip", "link", "set", &port, "up"])?;
                let live = move |orders: Receiver<Order>| {
                    let receive = || Ok(tap.drain()?.len() as u64);
                    let send = |frame: &[u8]| tap.send(frame);
                    live_on_wire(number, seed, &orders, send, receive, (&sent, &received));
                    Ok(())
                };
                Life::start(&name, live)?
            }
        };
        place.life = Some(life);
        self.deeds.note("a machine comes");
        Ok(())
    }

    /// A machine is gone; so is its interface, or its connection.
    fn leave(&mut self, at: usize) -> Result<()> {
        let Some(life) = self.places[at].life.take() else { return Ok(()) };
        match &self.places[at].kind {
            // Under its feet.
            Kind::Veth(vm) => {
                self.lab.host().run(&["ip", "link", "del", &vm.port])?;
                life.end()?;
            }
            Kind::Rings { .. } | Kind::Tap => life.end()?,
        }
        self.deeds.note("a machine leaves");
        Ok(())
    }

    /// Its port is wanted, with some policy.
    fn apply(&mut self, at: usize, deed: &str) -> Result<()> {
        let policy = *self.rng.pick(&POLICIES);
        let queues = 1 + self.rng.below(2);
        let place = &mut self.places[at];
        let attach = match place.kind {
            Kind::Rings { listens } => {
                let socket = self.lab.places().socket.with_file_name(format!("vm{}.sock", place.number));
                let mode = if listens { "CLIENT" } else { "SERVER" };
                // With another number of queues it is another port.
                format!("vhostUser: {{path: {}, mode: {mode}, queues: {queues}}}", socket.display())
            }
            Kind::Veth(_) => format!("veth: {}", place.port()),
            Kind::Tap => format!("tap: {}", place.port()),
        };
        let (name, mac) = (place.name(), mac_text(address(place.number)));
        let yaml = format!(
            "vnics:\n- {{name: {name}, switch: blue, attach: {{{attach}}}, mac: \"{mac}\", {policy}}}\n"
        );
        // It is stored even if the port cannot be served yet.
        place.has_vnic = true;
        self.deeds.note(deed);
        self.accept(&yaml)
    }

    /// Applies; that a port is not there yet is no failure.
    fn accept(&self, yaml: &str) -> Result<()> {
        self.lab.sluice().apply(yaml).map(drop).with_context(|| format!("applying {yaml}"))
    }

    fn delete(&mut self, at: usize) -> Result<()> {
        let name = self.places[at].name();
        self.places[at].has_vnic = false;
        self.deeds.note("a port goes");
        self.lab.sluice().run(&["delete", "vnic", &name]).map(drop)
    }

    fn edit_group(&mut self) -> Result<()> {
        let many = 1 + self.rng.below(64) as u64;
        self.deeds.note("a group changes");
        self.accept(&groups(many))
    }

    fn misbehave(&mut self, at: usize) -> Result<()> {
        let place = &self.places[at];
        if !matches!(place.kind, Kind::Rings { .. }) {
            return self.leave(at);
        }
        let mischief = *self.rng.pick(&Mischief::ALL);
        if let Some(life) = &place.life {
            life.order(Order::Misbehave(mischief));
        }
        self.deeds.note(&format!("{mischief:?}"));
        Ok(())
    }

    /// Everybody goes, and every port.
    pub(crate) fn disperse(&mut self) -> Result<()> {
        for at in 0..self.places.len() {
            self.leave(at)?;
            if self.places[at].has_vnic {
                self.delete(at)?;
            }
        }
        self.accept(&groups(1))
    }

    /// Everybody comes once, has a port, misbehaves in every way and goes, so that whatever is made once has been made.
    pub(crate) fn rehearse(&mut self) -> Result<()> {
        for at in 0..self.places.len() {
            self.come(at)?;
            self.apply(at, "a port comes")?;
        }
        let started = Instant::now();
        while self.deeds.connections.load(Ordering::Relaxed) < RINGS.len() as u64 {
            if started.elapsed() > sluice_tests::PATIENCE {
                bail!("not all guests have connected within {:?}", sluice_tests::PATIENCE);
            }
            std::thread::sleep(RETRY);
        }
        for mischief in Mischief::ALL {
            for place in &self.places {
                if let Some(life) = &place.life {
                    life.order(Order::Misbehave(mischief));
                }
            }
            self.edit_group()?;
        }
        self.disperse()
    }
}
