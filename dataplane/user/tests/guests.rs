//! Machines with an IP stack under policy, between them an engine, and links that spoil frames: all in memory, by seed.

#![forbid(unsafe_code)]

use std::sync::Arc;

use sluice_pipeline::DropReason;
use sluice_pipeline::tables::Direction;
use sluice_policy::config::{
    AclAction, AclMatch, AclRule, Attachment, Config, Hook, Policy, Switch, VlanMode, Vnic,
};
use sluice_policy::generate::Rng;
use sluice_policy::ids::Ids;
use sluice_policy::image::Bindings;
use sluice_policy::lower::{assign_ids, lower};
use sluice_policy::net::{MacAddr, PortRange, VlanId};
use sluice_user::engine::{Engine, Processor};
use sluice_user::frame::{Region, RegionLayout};
use sluice_user::memory::{Faults, FaultyReceive, Guest, MemoryReceive, link};
use sluice_user::port::{Accepts, Batch, Receive as _};
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;
use smoltcp::wire::{IpAddress, IpCidr};

const ADDRESSES: [IpAddress; 2] = [IpAddress::v4(10, 0, 0, 1), IpAddress::v4(10, 0, 0, 2)];
const MACS: [[u8; 6]; 2] = [[2, 0, 0, 0, 0, 1], [2, 0, 0, 0, 0, 2]];
const TCP: u8 = 6;

/// Two machines, and what is between them.
struct World {
    engine: Engine,
    processor: Processor,
    region: Arc<Region>,
    ports: Vec<u32>,
    near: Vec<FaultyReceive<MemoryReceive>>,
    guests: Vec<Guest>,
    sockets: Vec<SocketHandle>,
    /// Microseconds.
    now: i64,
}

impl World {
    fn new(policies: [Policy; 2], faults: Faults) -> World {
        let region = Region::new(RegionLayout { small: 4096, large: 8 }).expect("memory");
        let vnics = MACS.iter().zip(policies).enumerate().map(|(number, (mac, policy))| Vnic {
            name: format!("vm{number}"),
            switch: "blue".into(),
            attach: Attachment::Tap(format!("vm{number}")),
            hook: Hook::Auto,
            full_checksums: false,
            mac: MacAddr(*mac),
            extra_macs: Vec::new(),
            sriov: None,
            up: true,
            policy,
        });
        let config = Config {
            switches: vec![Switch { name: "blue".into(), uplink: None, internal: None, ageing_seconds: 300 }],
            acl_groups: Vec::new(),
            vnics: vnics.collect(),
        };
        let mut ids = Ids::default();
        assign_ids(&config, &mut ids).expect("numbers");
        let engine = Engine::new();
        engine.apply(lower(&config, &ids, &Bindings::new()).expect("an image"));
        let processor = Processor::new(&engine, &region);
        let (mut ports, mut near, mut guests, mut sockets) = (vec![], vec![], vec![], vec![]);
        for (number, mac) in MACS.into_iter().enumerate() {
            let port = ids.ports.get(&format!("vnic/vm{number}")).expect("a number");
            let (ours, far) = link(256, [Accepts::ALL, Accepts::default()]).expect("a link");
            engine.attach(port, vec![Box::new(ours.transmit)]);
            near.push(FaultyReceive::new(ours.receive, faults, number as u64 + 1));
            let address = IpCidr::new(ADDRESSES[number], 24);
            let mut guest = Guest::new(far.receive, far.transmit, &region, mac, &[address], 1);
            let buffer = || tcp::SocketBuffer::new(vec![0; 65_536]);
            sockets.push(guest.sockets.add(tcp::Socket::new(buffer(), buffer())));
            guests.push(guest);
            ports.push(port);
        }
        World { engine, processor, region, ports, near, guests, sockets, now: 1_000_000 }
    }

    /// A millisecond passes.
    fn step(&mut self) {
        self.now += 1_000;
        self.guests.iter_mut().for_each(|guest| guest.poll(self.now));
        let mut batch = Batch::new();
        for (port, near) in self.ports.iter().zip(&mut self.near) {
            near.receive(self.processor.pool(), &mut batch);
            self.processor.process(*port, &mut batch, self.now as u64 * 1_000);
        }
    }

    fn socket(&mut self, number: usize) -> &mut tcp::Socket<'static> {
        self.guests[number].sockets.get_mut(self.sockets[number])
    }

    /// The first machine sends bytes to the other's port; how many arrived, in order, within so many milliseconds.
    fn transfer(&mut self, port: u16, data: &[u8], milliseconds: usize) -> usize {
        self.socket(1).listen(port).expect("it can listen");
        let handle = self.sockets[0];
        let (interface, sockets) = self.guests[0].stack();
        let socket = sockets.get_mut::<tcp::Socket<'_>>(handle);
        socket.connect(interface.context(), (ADDRESSES[1], port), 50_000).expect("it can connect");
        let (mut sent, mut received) = (0, Vec::new());
        for _ in 0..milliseconds {
            self.step();
            if self.socket(0).can_send() && sent < data.len() {
                sent += self.socket(0).send_slice(&data[sent..]).expect("it is open");
            }
            if self.socket(1).can_recv() {
                let read = |bytes: &mut [u8]| (bytes.len(), received.extend_from_slice(bytes));
                self.socket(1).recv(read).expect("it is open");
            }
            if received.len() == data.len() {
                break;
            }
        }
        assert!(data.starts_with(&received), "bytes were changed on their way");
        received.len()
    }
}

fn data(length: usize) -> Vec<u8> {
    let mut rng = Rng::new(9);
    (0..length).map(|_| rng.byte()).collect()
}

/// What is sent to one port of TCP is dropped.
fn closed(port: u16) -> Policy {
    let mut policy = Policy::default();
    policy.acl.rules = vec![AclRule {
        priority: 10,
        direction: Direction::FromVm,
        matches: AclMatch {
            ip_proto: Some(TCP),
            dst_ports: PortRange::new(port, port).into_iter().collect(),
            ..AclMatch::default()
        },
        action: AclAction::Deny,
    }];
    policy
}

fn access(vid: u32) -> Policy {
    Policy { vlan: VlanMode::Access(VlanId::new(vid).expect("a VLAN")), ..closed(81) }
}

#[test]
fn tcp_gets_through_whatever_happens_to_frames() {
    let faults =
        Faults { loss: 20, duplication: 20, reordering: 50, corruption: 20, delay: 30, longest_delay: 4 };
    let mut world = World::new([closed(81), Policy::default()], faults);
    let data = data(300_000);
    assert_eq!(world.transfer(80, &data, 3_600_000), data.len());
    let spoilt = world.near.iter().map(|near| near.spoilt());
    assert!(
        spoilt.clone().all(|spoilt| spoilt.lost > 0 && spoilt.corrupted > 0),
        "{:?}",
        Vec::from_iter(spoilt)
    );
    let World { engine, processor, region, near, guests, .. } = world;
    drop((engine, processor, near, guests));
    assert_eq!(region.outstanding(), 0);
}

#[test]
fn policy_separates_machines() {
    let data = data(10_000);
    // In one VLAN, with the port open; with it closed; and in two VLANs.
    let mut world = World::new([access(5), access(5)], Faults::default());
    assert_eq!(world.transfer(80, &data, 10_000), data.len());
    let mut world = World::new([access(5), access(5)], Faults::default());
    assert_eq!(world.transfer(81, &data, 10_000), 0);
    assert!(world.engine.drops(world.ports[0], DropReason::AclFromVm) > 0);
    let mut world = World::new([access(5), access(6)], Faults::default());
    assert_eq!(world.transfer(80, &data, 10_000), 0);
    assert!(world.engine.drops(world.ports[0], DropReason::NoDestination) > 0, "ARP finds nobody");
}
