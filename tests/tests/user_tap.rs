//! The tap between the two engines: bytes, tags and offloads as they are on either side.

#![forbid(unsafe_code)]

use std::net::UdpSocket;
use std::num::NonZeroU16;

use anyhow::{Context, Result, ensure};
use sluice_tests::wire::{BROADCAST, carries, mac, note};
use sluice_tests::{Lab, Netns, PATIENCE, PacketSocket, wait_until};
use sluice_user::frame::{Checksum, Frame, Gso, GsoKind, Offload, Pool, Region, RegionLayout};
use sluice_user::offload::fill_checksum;
use sluice_user::port::{Batch, Receive, Transmit};
use sluice_user::tap::{FromTap, Tap, ToTap};

const NAME: &str = "slu-test";

/// A tap in a namespace of its own, and both of its ends.
struct Bench {
    netns: Netns,
    tap: Tap,
    from: FromTap,
    to: ToTap,
    pool: Pool,
    region: std::sync::Arc<Region>,
    _lab: Lab,
}

impl Bench {
    fn new() -> Result<Bench> {
        let lab = Lab::new()?;
        let netns = lab.netns("tap")?;
        let tap = netns.enter(|| Ok(Tap::open(NAME)?))?;
        let region = Region::new(RegionLayout { small: 64, large: 4 })?;
        let (from, to) = tap.queue();
        Ok(Bench { netns, tap, from, to, pool: Pool::new(&region), region, _lab: lab })
    }

    fn send(&mut self, frame: Frame) -> usize {
        let mut batch = Batch::new();
        batch.push(frame);
        self.to.transmit(&mut self.pool, &mut batch)
    }

    /// The next frame that is as wanted.
    fn receive(&mut self, wanted: impl Fn(&Frame) -> bool) -> Result<Frame> {
        wait_until("a frame comes out of the tap", PATIENCE, || {
            let mut batch = Batch::new();
            self.from.receive(&mut self.pool, &mut batch);
            let found = batch.drain().find(&wanted);
            Ok(found)
        })
    }
}

/// 5 000 bytes of TCP over IPv4, to be cut to 1 000, behind a tag.
fn super_frame(pool: &mut Pool) -> Result<Frame> {
    let mut bytes = [&mac(2)[..], &mac(1), &[0x81, 0, 0, 7, 8, 0, 0x45, 0]].concat();
    bytes.extend((5040u16).to_be_bytes());
    bytes.extend([0, 1, 0, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2]);
    bytes.extend([0, 80, 0, 81, 0, 0, 0, 0, 0, 0, 0, 0, 0x50, 0x10, 1, 0, 0, 0, 0, 0]);
    bytes.extend([9; 5000]);
    let mut frame = pool.copy(&bytes).context("no chunk")?;
    let gso = Gso { kind: GsoKind::TcpV4, size: NonZeroU16::new(1000).context("not 0")?, ecn: false };
    frame.set_offload(Offload { checksum: Checksum::Partial { start: 38, offset: 16 }, gso: Some(gso) })?;
    Ok(frame)
}

#[test]
fn frames_pass_as_they_are() -> Result<()> {
    let mut bench = Bench::new()?;
    let kernel = PacketSocket::open(&bench.netns, NAME)?;
    for (tags, text) in
        [(&[][..], "plain"), (&[(0x8100, 7)], "tagged"), (&[(0x88a8, 9), (0x8100, 7)], "twice")]
    {
        let bytes = note(BROADCAST, mac(1), tags, text);
        let frame = bench.pool.copy(&bytes).context("no chunk")?;
        ensure!(bench.send(frame) == 1, "{text} was not sent");
        let received = kernel.expect(text, PATIENCE, |frame| carries(frame, text))?;
        ensure!(received == bytes, "{text}: {received:02x?}");
        kernel.send(&bytes)?;
        let frame = bench.receive(|frame| carries(frame.bytes(), text))?;
        ensure!(frame.bytes() == bytes, "{text}: {:02x?}", frame.bytes());
    }
    let frame = super_frame(&mut bench.pool)?;
    let bytes = frame.bytes().to_vec();
    ensure!(bench.send(frame) == 1, "the super-frame was not sent");
    let received = kernel.expect("the super-frame", PATIENCE, |frame| frame.len() > 4_000)?;
    ensure!(received == bytes, "the super-frame has {} bytes, not {}", received.len(), bytes.len());
    ensure!(bench.region.outstanding() == 0 && bench.tap.refused() == 0, "{:?}", bench.region);
    Ok(())
}

#[test]
fn the_kernel_leaves_checksums_to_us() -> Result<()> {
    let mut bench = Bench::new()?;
    bench.netns.address(NAME, "10.1.1.1/24")?;
    bench.netns.run(&["ip", "neigh", "add", "10.1.1.2", "lladdr", "02:00:00:00:00:02", "dev", NAME])?;
    bench.netns.enter(|| {
        let socket = UdpSocket::bind("10.1.1.1:9")?;
        socket.send_to(b"from the kernel's own stack", "10.1.1.2:9")?;
        Ok(())
    })?;
    let mut frame = bench.receive(|frame| carries(frame.bytes(), "own stack"))?;
    let partial = Checksum::Partial { start: 34, offset: 6 };
    ensure!(frame.offload() == Offload { checksum: partial, gso: None }, "{:?}", frame.offload());
    fill_checksum(&mut frame);
    let bytes = frame.bytes();
    // The sum of everything and the pseudo header is all ones (RFC 1071).
    let pseudo: u32 = [0x0a01u32, 0x0101, 0x0a01, 0x0102, 17, 8 + 27].iter().sum();
    let words = bytes[34..]
        .chunks(2)
        .map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |byte| u32::from(*byte)));
    let sum = words.sum::<u32>() + pseudo;
    let folded = (sum & 0xffff) + (sum >> 16);
    ensure!((folded & 0xffff) + (folded >> 16) == 0xffff, "the checksum is wrong: {folded:#x}");
    Ok(())
}

#[test]
fn a_tap_that_somebody_removes_is_gone_for_good() -> Result<()> {
    let mut bench = Bench::new()?;
    let taken = bench.netns.enter(|| Ok(Tap::open(NAME).err().map(|error| error.to_string())))?;
    ensure!(taken.is_some_and(|error| error.contains(NAME)), "there is one already");
    ensure!(!bench.tap.is_gone(), "it is there");
    bench.netns.run(&["ip", "link", "del", NAME])?;
    ensure!(bench.tap.is_gone(), "it is gone");
    let frame = bench.pool.copy(&note(BROADCAST, mac(1), &[], "lost")).context("no chunk")?;
    ensure!(bench.send(frame) == 0, "nothing can be sent");
    let mut batch = Batch::new();
    bench.from.receive(&mut bench.pool, &mut batch);
    ensure!(batch.is_empty() && bench.region.outstanding() == 0, "no frame is lost");
    let again = bench.netns.enter(|| Ok(Tap::open(NAME)?))?;
    ensure!(!again.is_gone(), "another takes its place");
    drop(again);
    ensure!(bench.netns.ifindex(NAME)?.is_none(), "a tap goes with its owner");
    Ok(())
}
