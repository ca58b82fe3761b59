//! What a frame costs at a vhost-user port: nanoseconds per frame from the guest and to it, by kind of ring, size and layout of
//! buffers.
//!
//! One thread plays both sides in turns, and only the port's side is timed, in batches of 32, against a port that was set up over a
//! real socket. `cargo bench -p sluice-user --bench vhost`.

use std::error::Error;
use std::io::Write;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use sluice_user::frame::{Pool, Region, RegionLayout};
use sluice_user::port::{BATCH, Batch, Receive, Transmit};
use sluice_user::vhost::driver::{DriverRing, GUEST_BASE, GuestRam, WRITE};
use sluice_user::vhost::features::bit;
use sluice_user::vhost::{FromGuest, Mode, Port, PortConfig, ToGuest};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::EventFd;

const RAM: u64 = 64 << 20;
const BUFFERS: u64 = GUEST_BASE + (1 << 20);
const SIZE: u16 = 256;
const BATCHES: u32 = 20_000;

/// How frames lie in the guest.
#[derive(Clone, Copy)]
enum Layout {
    /// Header and frame in one buffer.
    One,
    /// The header in a buffer of its own.
    Apart,
    /// As apart, by an indirect table.
    Indirect,
}

struct Guest {
    ram: GuestRam,
    rings: [DriverRing; 2],
    /// As long as it lives, so does the connection.
    _front: Frontend,
}

impl Guest {
    fn new(socket: UnixStream, packed: bool) -> Result<Guest, Box<dyn Error>> {
        let ram = GuestRam::new(RAM)?;
        let ring = if packed { DriverRing::packed } else { DriverRing::new };
        let to = ring(SIZE, GUEST_BASE);
        let from = ring(SIZE, to.end().next_multiple_of(4096));
        let rings = [to, from];
        let mut front = Frontend::from_stream(socket, 2);
        front.set_owner()?;
        let not_taken = bit::LOG_ALL | if packed { 0 } else { bit::RING_PACKED };
        let features = front.get_features()? & !not_taken;
        let protocol = front.get_protocol_features()?;
        front.set_protocol_features(protocol)?;
        front.set_features(features)?;
        let at = ram.address();
        front.set_mem_table(&[VhostUserMemoryRegionInfo {
            guest_phys_addr: at.guest,
            memory_size: at.size,
            userspace_addr: at.user,
            mmap_offset: at.offset,
            mmap_handle: ram.as_fd().as_raw_fd(),
        }])?;
        for (index, ring) in rings.iter().enumerate() {
            front.set_vring_num(index, SIZE)?;
            front.set_vring_base(index, ring.base() as u16)?;
            front.set_vring_addr(
                index,
                &VringConfigData {
                    queue_max_size: SIZE,
                    queue_size: SIZE,
                    flags: 0,
                    desc_table_addr: DriverRing::user(ring.descriptors),
                    used_ring_addr: DriverRing::user(ring.used),
                    avail_ring_addr: DriverRing::user(ring.available),
                    log_addr: None,
                },
            )?;
            front.set_vring_kick(index, &EventFd::new(0)?)?;
            front.set_vring_enable(index, true)?;
        }
        // Answered only after all that came before was done.
        front.get_features()?;
        Ok(Guest { ram, rings, _front: front })
    }

    fn post(&mut self, ring: usize, slot: u64, len: u32, flags: u16, layout: Layout) {
        let at = BUFFERS + slot * 2048;
        let ring = &mut self.rings[ring];
        let apart = [(at, 12, flags), (at + 12, len, flags)];
        match layout {
            Layout::One => ring.post(&self.ram, &[(at, 12 + len, flags)]),
            Layout::Apart => ring.post(&self.ram, &apart),
            Layout::Indirect => ring.post_indirect(&self.ram, at + 1920, &apart),
        };
    }
}

/// Nanoseconds per frame of the middle batch: what others do on the machine does not count.
fn median(mut times: Vec<Duration>) -> f64 {
    times.sort_unstable();
    times[times.len() / 2].as_nanos() as f64 / BATCH as f64
}

fn from_guest(guest: &mut Guest, end: &mut FromGuest, pool: &mut Pool, len: u32, layout: Layout) -> f64 {
    let (mut times, mut count) = (Vec::new(), 0);
    let mut batch = Batch::new();
    for turn in 0..BATCHES {
        for index in 0..BATCH as u64 {
            guest.post(1, (u64::from(turn) * BATCH as u64 + index) % 512, len, 0, layout);
        }
        guest.rings[1].show(&guest.ram);
        let begun = Instant::now();
        end.receive(pool, &mut batch);
        times.push(begun.elapsed());
        count += batch.len();
        batch.recycle(pool);
        while guest.rings[1].reap(&guest.ram).is_some() {}
    }
    assert_eq!(count, BATCH * BATCHES as usize, "every frame came");
    median(times)
}

fn to_guest(guest: &mut Guest, end: &mut ToGuest, pool: &mut Pool, len: u32, layout: Layout) -> f64 {
    let (mut times, mut count) = (Vec::new(), 0);
    let bytes = vec![0xa5; len as usize];
    let mut batch = Batch::new();
    for turn in 0..BATCHES {
        for index in 0..BATCH as u64 {
            guest.post(0, (u64::from(turn) * BATCH as u64 + index) % 512, 1800, WRITE, layout);
        }
        guest.rings[0].show(&guest.ram);
        for _ in 0..BATCH {
            batch.add(pool, bytes.len()).expect("there are chunks").bytes_mut().copy_from_slice(&bytes);
        }
        let begun = Instant::now();
        count += end.transmit(pool, &mut batch);
        end.flush();
        times.push(begun.elapsed());
        while guest.rings[0].reap(&guest.ram).is_some() {}
    }
    assert_eq!(count, BATCH * BATCHES as usize, "every frame went");
    median(times)
}

/// A port with a guest, both ready.
struct Pair {
    guest: Guest,
    ends: (FromGuest, ToGuest),
    _port: Port,
}

impl Pair {
    fn new(folder: &Path, packed: bool) -> Result<Pair, Box<dyn Error>> {
        let path = folder.join(if packed { "packed" } else { "split" });
        let config = PortConfig {
            path: path.clone(),
            mode: Mode::Server,
            queue_pairs: 1,
            mtu: 1500,
            offloads: true,
            standby: false,
        };
        let port = Port::open(config, Box::new(|_| {}))?;
        let ends = port.queues().remove(0);
        Ok(Pair { guest: Guest::new(UnixStream::connect(path)?, packed)?, ends, _port: port })
    }

    /// From the guest, and to it.
    fn measure(&mut self, pool: &mut Pool, len: u32, layout: Layout) -> [f64; 2] {
        let (from, to) = &mut self.ends;
        [
            from_guest(&mut self.guest, from, pool, len, layout),
            to_guest(&mut self.guest, to, pool, len, layout),
        ]
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let folder = tempfile::tempdir()?;
    let mut split = Pair::new(folder.path(), false)?;
    let mut packed = Pair::new(folder.path(), true)?;
    let mut pool = Pool::new(&Region::new(RegionLayout { small: 1024, large: 4 })?);
    let mut out = std::io::stdout().lock();
    writeln!(out, "ns per frame           from the guest       to the guest")?;
    writeln!(out, "                       split   packed       split   packed")?;
    for (name, layout) in [("one", Layout::One), ("apart", Layout::Apart), ("indirect", Layout::Indirect)] {
        for len in [64, 512, 1500] {
            let [split, packed] = [&mut split, &mut packed].map(|pair| pair.measure(&mut pool, len, layout));
            write!(out, "{name:>10} {len:>5} bytes   {:>5.1}   {:>5.1}", split[0], packed[0])?;
            writeln!(out, "        {:>5.1}   {:>5.1}", split[1], packed[1])?;
        }
    }
    Ok(())
}
