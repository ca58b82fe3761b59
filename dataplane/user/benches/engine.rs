//! What a frame costs in the engine, between ports in memory: nanoseconds of CPU time per frame of 64 bytes.
//!
//! `cargo bench -p sluice-user --bench engine`. Both vNICs have MAC and IP guard and ACL rules in both directions; frames
//! are UDP, of 1 or 1 000 flows. "Around it" is what the same frames cost without the engine: taking them from the pool,
//! filling them in, and giving them back; it is not in the other figures.

#![forbid(unsafe_code)]
#![allow(clippy::print_stdout, missing_docs)]

use std::net::{IpAddr, Ipv4Addr};

use nix::time::{ClockId, clock_gettime};
use sluice_pipeline::tables::Direction;
use sluice_policy::config::{
    Acl, AclAction, AclMatch, AclRule, Attachment, Config, Hook, Policy, Switch, Vnic,
};
use sluice_policy::ids::Ids;
use sluice_policy::image::{Binding, Bindings};
use sluice_policy::lower::{assign_ids, lower, ports};
use sluice_policy::net::{MacAddr, PortRange};
use sluice_user::engine::{Engine, Processor};
use sluice_user::frame::{Pool, Region, RegionLayout};
use sluice_user::memory::{MemoryReceive, link};
use sluice_user::port::{Accepts, BATCH, Batch, Receive, Transmit};

const ROUNDS: usize = 100_000;
const REPEATS: usize = 5;
const UDP: u8 = 17;

/// Gives every frame back at once.
#[derive(Debug)]
struct Sink;

impl Transmit for Sink {
    fn transmit(&mut self, pool: &mut Pool, batch: &mut Batch) -> usize {
        let sent = batch.len();
        batch.give(pool);
        sent
    }

    fn accepts(&self) -> Accepts {
        Accepts::ALL
    }
}

fn mac(number: u8) -> [u8; 6] {
    [2, 0, 0, 0, 0, number]
}

fn address(number: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 0, 0, number)
}

/// So many rules of distinct destination ports, and last one that lets the frames pass.
fn rules(count: usize) -> Vec<AclRule> {
    let mut rules = Vec::new();
    for direction in [Direction::FromVm, Direction::ToVm] {
        for number in 0..count {
            let port = 20_000 + number as u16;
            let is_last = number + 1 == count;
            let dst_ports = if is_last { vec![] } else { PortRange::new(port, port).into_iter().collect() };
            let matches = AclMatch { ip_proto: Some(UDP), dst_ports, ..AclMatch::default() };
            let action = if is_last { AclAction::Allow } else { AclAction::Deny };
            rules.push(AclRule { priority: (count - number) as u32, direction, matches, action });
        }
    }
    rules
}

fn vnic(number: u8, rule_count: usize) -> Vnic {
    let acl = Acl { rules: rules(rule_count), ..Acl::default() };
    let ip_guard = vec![IpAddr::V4(address(number))];
    Vnic {
        name: format!("vm{number}"),
        switch: "blue".into(),
        attach: Attachment::Tap(format!("vm{number}")),
        hook: Hook::Auto,
        full_checksums: false,
        mac: MacAddr(mac(number)),
        extra_macs: Vec::new(),
        sriov: None,
        up: true,
        policy: Policy { ip_guard, acl, ..Policy::default() },
    }
}

fn frame(flow: u16) -> Vec<u8> {
    let mut bytes = [&mac(2)[..], &mac(1), &[8, 0, 0x45, 0, 0, 50, 0, 0, 0, 0, 64, UDP, 0, 0]].concat();
    bytes.extend(address(1).octets());
    bytes.extend(address(2).octets());
    bytes.extend(flow.to_be_bytes());
    bytes.extend([0, 53, 0, 30, 0, 0]);
    bytes.resize(64, 0);
    bytes
}

fn cpu_time() -> u64 {
    let time = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).expect("every kernel has it");
    time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
}

/// The best of some repeats, in nanoseconds per frame.
fn measure(mut round: impl FnMut(usize)) -> f64 {
    let mut best = f64::MAX;
    for _ in 0..REPEATS {
        let begin = cpu_time();
        (0..ROUNDS).for_each(&mut round);
        best = best.min((cpu_time() - begin) as f64 / (ROUNDS * BATCH) as f64);
    }
    best
}

fn fill(pool: &mut Pool, batch: &mut Batch, templates: &[Vec<u8>], next: &mut usize) {
    while batch.room() > 0 {
        batch.push(pool.copy(&templates[*next]).expect("memory"));
        *next = (*next + 1) % templates.len();
    }
}

fn engine(
    rule_count: usize,
    region: &std::sync::Arc<Region>,
    is_sink: bool,
) -> (Processor, u32, Option<MemoryReceive>) {
    let config = Config {
        switches: vec![Switch { name: "blue".into(), uplink: None, internal: None, ageing_seconds: 300 }],
        acl_groups: Vec::new(),
        vnics: vec![vnic(1, rule_count), vnic(2, rule_count)],
    };
    let mut ids = Ids::default();
    assign_ids(&config, &mut ids).expect("numbers");
    let bindings: Bindings = (1..)
        .zip(ports(&config))
        .map(|(ifindex, spec)| (spec.name, Binding { ifindex, peer_redirect: false, xdp_target: false }))
        .collect();
    let image = lower(&config, &ids, &bindings).expect("an image");
    let engine = Engine::new();
    engine.apply(image);
    let [one, two] = ["vnic/vm1", "vnic/vm2"].map(|name| ids.ports.get(name).expect("a number"));
    let far = if is_sink {
        engine.attach(two, vec![Box::new(Sink)]);
        None
    } else {
        let (near, far) = link(1024, [Accepts::ALL; 2]).expect("a link");
        engine.attach(two, vec![Box::new(near.transmit)]);
        Some(far.receive)
    };
    (Processor::new(&engine, region), one, far)
}

fn main() {
    let region = Region::new(RegionLayout { small: 4096, large: 4 }).expect("memory");
    let mut batch = Batch::new();
    let mut next = 0;
    for flows in [1u16, 1000] {
        let templates: Vec<Vec<u8>> = (0..flows).map(|flow| frame(1000 + flow)).collect();
        let mut pool = Pool::new(&region);
        let around = measure(|_| {
            fill(&mut pool, &mut batch, &templates, &mut next);
            batch.give(&mut pool);
        });
        println!("{flows:4} flows, around it:             {around:6.1} ns");
        for rule_count in [0, 10, 1000] {
            for is_sink in [true, false] {
                let (mut processor, ingress, mut far) = engine(rule_count, &region, is_sink);
                let cost = measure(|round| {
                    fill(processor.pool(), &mut batch, &templates, &mut next);
                    processor.process(ingress, &mut batch, 1_000_000_000 + round as u64 * 1_000);
                    if let Some(far) = &mut far {
                        far.receive(processor.pool(), &mut batch);
                        assert_eq!(batch.len(), BATCH, "all frames pass");
                        batch.give(processor.pool());
                    }
                });
                let to = if is_sink { "a sink" } else { "a memory port" };
                println!("{flows:4} flows, {rule_count:4} rules, to {to:13} {:6.1} ns", cost - around);
            }
        }
    }
}
