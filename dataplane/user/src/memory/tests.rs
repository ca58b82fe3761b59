use std::sync::Arc;

use sluice_policy::generate::Rng;
use smoltcp::iface::SocketHandle;
use smoltcp::socket::tcp;
use smoltcp::wire::{IpAddress, IpCidr};

use super::*;
use crate::frame::{Region, RegionLayout};
use crate::port::BATCH;

fn region() -> Arc<Region> {
    Region::new(RegionLayout { small: 2048, large: 8 }).expect("memory")
}

fn numbered(pool: &mut Pool, number: u32) -> Frame {
    pool.copy(&number.to_be_bytes().repeat(16)).expect("memory")
}

fn number(frame: &Frame) -> u32 {
    u32::from_be_bytes(*frame.bytes().first_chunk().expect("a number"))
}

#[test]
fn frames_cross_in_order_and_a_full_queue_refuses() {
    let region = region();
    let mut pool = Pool::new(&region);
    let (mut one, mut two) = link(40, [Accepts::default(), Accepts::ALL]).expect("a link");
    assert_eq!((one.transmit.accepts(), two.transmit.accepts()), (Accepts::ALL, Accepts::default()));
    let mut batch = Batch::new();
    let mut sent = 0;
    for first in [0, 30] {
        (first..first + 30).for_each(|n| batch.push(numbered(&mut pool, n)));
        sent += one.transmit.transmit(&mut pool, &mut batch);
        assert!(batch.is_empty());
    }
    assert_eq!(sent, 40);
    assert_eq!(region.outstanding(), 40);
    let mut received = Vec::new();
    for wanted in [BATCH, 40 - BATCH, 0] {
        two.receive.receive(&mut pool, &mut batch);
        assert_eq!(batch.len(), wanted);
        received.extend(batch.drain().map(|frame| number(&frame)));
    }
    assert!(received.into_iter().eq(0..40));
}

#[test]
fn the_bell_rings_for_a_sleeper_only() {
    let region = region();
    let mut pool = Pool::new(&region);
    let (mut one, mut two) = link(8, [Accepts::ALL; 2]).expect("a link");
    let mut send = |pool: &mut Pool| {
        let mut batch = Batch::new();
        batch.push(numbered(pool, 1));
        one.transmit.transmit(pool, &mut batch);
        one.transmit.flush();
    };
    let rings = |port: &MemoryPort| {
        let mut fds =
            [nix::poll::PollFd::new(port.receive.event().expect("an event"), nix::poll::PollFlags::POLLIN)];
        nix::poll::poll(&mut fds, 0u8).expect("it can be polled") == 1
    };
    send(&mut pool);
    assert!(!rings(&two), "nobody sleeps");
    assert!(!two.receive.arm(), "there is a frame");
    let mut batch = Batch::new();
    two.receive.receive(&mut pool, &mut batch);
    assert!(two.receive.arm());
    assert!(!rings(&two));
    send(&mut pool);
    assert!(rings(&two));
    two.receive.disarm();
    assert!(!rings(&two));
    send(&mut pool);
    assert!(!rings(&two));
}

/// What comes of frames 0 to `count`, sent by tens.
fn through(faults: Faults, seed: u64, count: u32) -> (Vec<Vec<u8>>, Spoilt) {
    let region = region();
    let mut pool = Pool::new(&region);
    let (mut one, two) = link(64, [Accepts::ALL; 2]).expect("a link");
    let mut receive = FaultyReceive::new(two.receive, faults, seed);
    let (mut batch, mut received) = (Batch::new(), Vec::new());
    for first in (0..count).step_by(10) {
        (first..first + 10).for_each(|n| batch.push(numbered(&mut pool, n)));
        one.transmit.transmit(&mut pool, &mut batch);
        receive.receive(&mut pool, &mut batch);
        received.extend(batch.frames().iter().map(|frame| frame.bytes().to_vec()));
        batch.give(&mut pool);
    }
    for _ in 0..=faults.longest_delay {
        receive.receive(&mut pool, &mut batch);
        received.extend(batch.frames().iter().map(|frame| frame.bytes().to_vec()));
        batch.give(&mut pool);
    }
    assert_eq!(region.outstanding(), 0, "no fault loses memory");
    (received, receive.spoilt())
}

#[test]
fn faults_are_as_frequent_as_asked_and_the_same_for_the_same_seed() {
    let none = Faults::default();
    let (clean, spoilt) = through(none, 1, 10_000);
    assert_eq!((clean.len(), spoilt), (10_000, Spoilt::default()));
    let about = |count: u64| (700..1300).contains(&count);
    let (frames, spoilt) = through(Faults { loss: 100, ..none }, 1, 10_000);
    assert!(about(spoilt.lost) && frames.len() as u64 == 10_000 - spoilt.lost);
    let (frames, spoilt) = through(Faults { duplication: 100, ..none }, 1, 10_000);
    assert!(about(spoilt.duplicated) && frames.len() as u64 == 10_000 + spoilt.duplicated);
    let (frames, spoilt) = through(Faults { corruption: 100, ..none }, 1, 10_000);
    let changed = frames.iter().zip(&clean).filter(|(frame, clean)| frame != clean).count();
    assert!(about(spoilt.corrupted) && changed as u64 == spoilt.corrupted && frames.len() == 10_000);
    for faults in [Faults { reordering: 100, ..none }, Faults { delay: 100, longest_delay: 5, ..none }] {
        let (mut frames, spoilt) = through(faults, 1, 10_000);
        assert!(spoilt.reordered + spoilt.delayed > 700, "{spoilt:?}");
        assert!(!frames.is_sorted());
        frames.sort();
        assert_eq!(frames, clean, "all of them come");
    }
    let all =
        Faults { loss: 50, duplication: 50, reordering: 50, corruption: 50, delay: 50, longest_delay: 3 };
    assert_eq!(through(all, 7, 1000), through(all, 7, 1000));
    assert_ne!(through(all, 7, 1000).0, through(all, 8, 1000).0);
}

const ADDRESSES: [IpAddress; 2] = [IpAddress::v4(10, 0, 0, 1), IpAddress::v4(10, 0, 0, 2)];

fn socket(guest: &mut Guest) -> SocketHandle {
    let buffer = || tcp::SocketBuffer::new(vec![0; 65_536]);
    guest.sockets.add(tcp::Socket::new(buffer(), buffer()))
}

/// TCP delivers everything, in order and unchanged, whatever happens to frames.
#[test]
fn guests_talk_over_a_link_that_spoils_frames() {
    let region = region();
    let (one, two) = link(256, [Accepts::default(); 2]).expect("a link");
    let faults =
        Faults { loss: 30, duplication: 30, reordering: 50, corruption: 20, delay: 30, longest_delay: 4 };
    let mut guests = [(one, 1u8), (two, 2)].map(|(port, number)| {
        let receive = FaultyReceive::new(port.receive, faults, u64::from(number));
        let address = IpCidr::new(ADDRESSES[usize::from(number) - 1], 24);
        Guest::new(receive, port.transmit, &region, [2, 0, 0, 0, 0, number], &[address], 1)
    });
    let sockets = guests.each_mut().map(socket);
    let [client, server] = &mut guests;
    server.sockets.get_mut::<tcp::Socket<'_>>(sockets[1]).listen(80).expect("it can listen");
    let (interface, stack) = client.stack();
    let connection = stack.get_mut::<tcp::Socket<'_>>(sockets[0]);
    connection.connect(interface.context(), (ADDRESSES[1], 80), 50_000).expect("it can connect");
    let mut rng = Rng::new(3);
    let data: Vec<u8> = (0..200_000).map(|_| rng.byte()).collect();
    let (mut sent, mut received) = (0, Vec::new());
    let mut now = 0;
    while received.len() < data.len() {
        now += 1_000;
        assert!(now < 3_600_000_000, "an hour of the guests' time has passed: {} bytes came", received.len());
        let [client, server] = &mut guests;
        client.poll(now);
        server.poll(now);
        let socket = client.sockets.get_mut::<tcp::Socket<'_>>(sockets[0]);
        if socket.can_send() && sent < data.len() {
            sent += socket.send_slice(&data[sent..]).expect("it is open");
        }
        let socket = server.sockets.get_mut::<tcp::Socket<'_>>(sockets[1]);
        if socket.can_recv() {
            socket.recv(|bytes| (bytes.len(), received.extend_from_slice(bytes))).expect("it is open");
        }
    }
    assert!(received == data, "bytes were changed on their way");
    drop(guests);
    assert_eq!(region.outstanding(), 0);
}
