//! The guest's side, in this process: memory to share, and a driver of split and packed rings that does what it is
//! told, wrong or right.
//!
//! For tests, benches and fuzzing of the other side. Nothing that serves guests uses it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{Ordering, fence};

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};

use super::error::MemoryError;
use super::memory::{GuestMemory, RegionAddress};

/// Where the guest's memory begins, as the guest has it.
pub const GUEST_BASE: u64 = 0x4000_0000;
/// Where it begins, as the front-end has it.
pub const USER_BASE: u64 = 0x7f00_0000_0000;

/// Flags of descriptors: another follows, to be written, a table.
pub const NEXT: u16 = 1;
/// The device writes.
pub const WRITE: u16 = 2;
/// The descriptor is of a table of descriptors.
pub const INDIRECT: u16 = 4;

/// Memory of a guest, in a memfd.
#[derive(Debug)]
pub struct GuestRam {
    file: OwnedFd,
    memory: GuestMemory,
    at: RegionAddress,
}

impl GuestRam {
    /// So many bytes.
    ///
    /// # Errors
    ///
    /// The kernel has none to give.
    pub fn new(size: u64) -> Result<Self, MemoryError> {
        let file = memfd_create("guest", MemfdFlags::CLOEXEC).map_err(MemoryError::File)?;
        ftruncate(&file, size).map_err(MemoryError::File)?;
        let at = RegionAddress { guest: GUEST_BASE, size, user: USER_BASE, offset: 0 };
        let memory = GuestMemory::default().with(at, &file)?;
        Ok(Self { file, memory, at })
    }

    /// Where it is.
    #[must_use]
    pub fn address(&self) -> RegionAddress {
        self.at
    }

    /// The memory, to be read and written by guest addresses.
    #[must_use]
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// Takes memory away from under whoever has it mapped.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub fn truncate(&self, size: u64) -> Result<(), MemoryError> {
        ftruncate(&self.file, size).map_err(MemoryError::File)
    }

    /// Writes bytes at a guest address; what is outside is ignored.
    pub fn write(&self, guest: u64, bytes: &[u8]) {
        let _ = self.memory.write(guest, bytes);
    }

    /// Bytes at a guest address; zeros outside.
    #[must_use]
    pub fn read(&self, guest: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        let _ = self.memory.read(guest, &mut bytes);
        bytes
    }

    fn word(&self, guest: u64) -> u16 {
        let mut bytes = [0; 2];
        let _ = self.memory.read(guest, &mut bytes);
        u16::from_le_bytes(bytes)
    }
}

impl AsFd for GuestRam {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// A piece of memory in a chain: guest address, length, flags without [`NEXT`].
pub type Piece = (u64, u32, u16);

/// A ring, driven. Addresses are the guest's.
#[derive(Debug, Clone)]
pub struct DriverRing {
    /// Entries.
    pub size: u16,
    /// The descriptor table, or the packed ring.
    pub descriptors: u64,
    /// The available ring, or the driver's area.
    pub available: u64,
    /// The used ring, or the device's area.
    pub used: u64,
    side: Side,
}

/// How far the driver is.
#[derive(Debug, Clone)]
enum Side {
    Split { next_descriptor: u16, available_index: u16, used_index: u16 },
    Packed(Packed),
}

/// How far the driver of a packed ring is.
#[derive(Debug, Clone)]
struct Packed {
    /// The next slot to be made available, and the next that the device gives back, with their wrap counters.
    next: (u16, bool),
    reaped: (u16, bool),
    /// Chains given back, and the slots of each chain by its identifier.
    count: u16,
    slots: Vec<u16>,
    /// First slots of chains that the device does not see yet, and their flags.
    hidden: Vec<(u16, u16)>,
}

impl Packed {
    fn step((index, wrap): (u16, bool), slots: u16, size: u16) -> (u16, bool) {
        let index = u32::from(index) + u32::from(slots);
        let size = u32::from(size);
        if index < size { (index as u16, wrap) } else { ((index - size) as u16, !wrap) }
    }
}

/// A slot of a packed ring was made available, in the round with this wrap counter.
#[must_use]
pub fn available(wrap: bool) -> u16 {
    if wrap { AVAILABLE } else { USED }
}

/// A slot of a packed ring was given back, in the round with this wrap counter.
#[must_use]
pub fn used(wrap: bool) -> u16 {
    if wrap { AVAILABLE | USED } else { 0 }
}

const AVAILABLE: u16 = 1 << 7;
const USED: u16 = 1 << 15;

impl DriverRing {
    /// A split ring of so many entries, its tables one behind the other from a guest address.
    #[must_use]
    pub fn new(size: u16, guest: u64) -> Self {
        let entries = u64::from(size);
        let available = guest + 16 * entries;
        let used = (available + 6 + 2 * entries).next_multiple_of(64);
        let side = Side::Split { next_descriptor: 0, available_index: 0, used_index: 0 };
        Self { size, descriptors: guest, available, used, side }
    }

    /// A packed ring of so many entries, its areas one behind the other from a guest address.
    #[must_use]
    pub fn packed(size: u16, guest: u64) -> Self {
        let available = guest + 16 * u64::from(size);
        let side = Side::Packed(Packed {
            next: (0, true),
            reaped: (0, true),
            count: 0,
            slots: vec![0; size.into()],
            hidden: Vec::new(),
        });
        Self { size, descriptors: guest, available, used: (available + 4).next_multiple_of(64), side }
    }

    /// A ring of the same kind and size at a guest address, as new.
    #[must_use]
    pub fn afresh(&self, guest: u64) -> Self {
        match self.side {
            Side::Split { .. } => DriverRing::new(self.size, guest),
            Side::Packed(_) => DriverRing::packed(self.size, guest),
        }
    }

    /// Where a new ring begins, as the front-end says it.
    #[must_use]
    pub fn base(&self) -> u32 {
        match self.side {
            Side::Split { .. } => 0,
            Side::Packed(_) => 0x8000_8000,
        }
    }

    /// The first guest address behind the tables.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.used
            + match self.side {
                Side::Split { .. } => 6 + 8 * u64::from(self.size),
                Side::Packed(_) => 4,
            }
    }

    /// How the front-end has a guest address.
    #[must_use]
    pub fn user(guest: u64) -> u64 {
        guest - GUEST_BASE + USER_BASE
    }

    /// Writes one descriptor of a split ring; `next` is where it goes on.
    pub fn set_descriptor(&self, ram: &GuestRam, index: u16, piece: Piece, next: u16) {
        ram.write(self.descriptors + 16 * u64::from(index), &descriptor(piece, next));
    }

    /// Writes one slot of a packed ring, with all its flags.
    pub fn set_slot(&self, ram: &GuestRam, index: u16, (address, len, flags): Piece, id: u16) {
        // The same bytes, but for the order of the last two words.
        ram.write(self.descriptors + 16 * u64::from(index), &descriptor((address, len, id), flags));
    }

    /// Makes a chain available, in the next free descriptors; the device is not shown it before [`show`](Self::show). Answers
    /// its head, which is its identifier.
    pub fn post(&mut self, ram: &GuestRam, pieces: &[Piece]) -> u16 {
        if let Side::Packed(_) = self.side {
            return self.post_packed(ram, pieces);
        }
        let Side::Split { next_descriptor, .. } = &mut self.side else { return 0 };
        let head = *next_descriptor;
        *next_descriptor = (head + pieces.len() as u16) % self.size;
        for (index, (address, len, flags)) in pieces.iter().enumerate() {
            let at = (head + index as u16) % self.size;
            let more = if index + 1 < pieces.len() { NEXT } else { 0 };
            self.set_descriptor(ram, at, (*address, *len, flags | more), (at + 1) % self.size);
        }
        self.offer(ram, head);
        head
    }

    fn post_packed(&mut self, ram: &GuestRam, pieces: &[Piece]) -> u16 {
        let size = self.size;
        let Side::Packed(packed) = &mut self.side else { return 0 };
        let id = packed.next.0;
        packed.slots[usize::from(id)] = pieces.len() as u16;
        let mut slots = Vec::new();
        for (index, (address, len, flags)) in pieces.iter().enumerate() {
            let (at, wrap) = packed.next;
            packed.next = Packed::step(packed.next, 1, size);
            let is_last = index + 1 == pieces.len();
            let all = flags | available(wrap) | if is_last { 0 } else { NEXT };
            if index == 0 {
                packed.hidden.push((at, all));
            }
            // The chain's identifier is in its last descriptor; until it is shown, the first looks as if it was given back.
            let shown = if index == 0 { used(!wrap) } else { all };
            slots.push((at, (*address, *len, shown), if is_last { id } else { 0xdead }));
        }
        for (at, piece, id) in slots {
            self.set_slot(ram, at, piece, id);
        }
        id
    }

    /// Makes a chain available that is a table at a guest address.
    pub fn post_indirect(&mut self, ram: &GuestRam, table: u64, pieces: &[Piece]) -> u16 {
        for (index, (address, len, flags)) in pieces.iter().enumerate() {
            let more = if index + 1 < pieces.len() { NEXT } else { 0 };
            let bytes = match self.side {
                Side::Split { .. } => descriptor((*address, *len, flags | more), index as u16 + 1),
                Side::Packed(_) => descriptor((*address, *len, 0), *flags),
            };
            ram.write(table + 16 * index as u64, &bytes);
        }
        self.post(ram, &[(table, 16 * pieces.len() as u32, INDIRECT)])
    }

    /// Puts a head into the available ring of a split ring.
    pub fn offer(&mut self, ram: &GuestRam, head: u16) {
        let Side::Split { available_index, .. } = &mut self.side else { return };
        let at = self.available + 4 + 2 * u64::from(*available_index % self.size);
        ram.write(at, &head.to_le_bytes());
        *available_index = available_index.wrapping_add(1);
    }

    /// Shows the device what was made available.
    pub fn show(&mut self, ram: &GuestRam) {
        match &mut self.side {
            Side::Split { available_index, .. } => {
                let index = *available_index;
                self.show_index(ram, index);
            }
            Side::Packed(packed) => {
                fence(Ordering::SeqCst);
                for (at, flags) in packed.hidden.drain(..).rev() {
                    ram.write(self.descriptors + 16 * u64::from(at) + 14, &flags.to_le_bytes());
                }
                fence(Ordering::SeqCst);
            }
        }
    }

    /// Shows the device of a split ring any available index.
    pub fn show_index(&self, ram: &GuestRam, index: u16) {
        fence(Ordering::SeqCst);
        ram.write(self.available + 2, &index.to_le_bytes());
        fence(Ordering::SeqCst);
    }

    /// Flags of the available ring, or of the driver's area: 1 asks for no interrupts.
    pub fn set_flags(&self, ram: &GuestRam, flags: u16) {
        let at = match self.side {
            Side::Split { .. } => self.available,
            Side::Packed(_) => self.available + 2,
        };
        ram.write(at, &flags.to_le_bytes());
    }

    /// Asks for an interrupt after this used index, or, of a packed ring, at this place with its wrap counter in the highest bit.
    pub fn set_used_event(&self, ram: &GuestRam, index: u16) {
        match self.side {
            Side::Split { .. } => {
                ram.write(self.available + 4 + 2 * u64::from(self.size), &index.to_le_bytes());
            }
            Side::Packed(_) => {
                let [a, b] = index.to_le_bytes();
                ram.write(self.available, &[a, b, 2, 0]);
            }
        }
    }

    /// How many chains the device has given back, of those that were shown and reaped in turn.
    #[must_use]
    pub fn device_index(&self, ram: &GuestRam) -> u16 {
        fence(Ordering::SeqCst);
        let Side::Packed(packed) = &self.side else { return ram.word(self.used + 2) };
        let (mut at, mut count) = (packed.reaped, packed.count);
        for _ in 0..self.size {
            let Some((id, _)) = self.given_back(ram, at) else { break };
            at = Packed::step(at, packed.slots.get(usize::from(id)).copied().unwrap_or(1), self.size);
            count = count.wrapping_add(1);
        }
        count
    }

    /// What the slot of a packed ring says, if it was given back: identifier, and how much was written.
    fn given_back(&self, ram: &GuestRam, (index, wrap): (u16, bool)) -> Option<(u16, u32)> {
        let at = self.descriptors + 16 * u64::from(index);
        let flags = ram.word(at + 14);
        if flags & (AVAILABLE | USED) != used(wrap) {
            return None;
        }
        fence(Ordering::SeqCst);
        let mut bytes = [0; 4];
        let _ = ram.memory.read(at + 8, &mut bytes);
        Some((ram.word(at + 12), if flags & WRITE != 0 { u32::from_le_bytes(bytes) } else { 0 }))
    }

    /// The available index after which the device wants a kick, or the place with its wrap counter.
    #[must_use]
    pub fn available_event(&self, ram: &GuestRam) -> u16 {
        match self.side {
            Side::Split { .. } => ram.word(self.used + 4 + 8 * u64::from(self.size)),
            Side::Packed(_) => ram.word(self.used),
        }
    }

    /// Flags of the used ring, or of the device's area: 1 asks for no kicks.
    #[must_use]
    pub fn device_flags(&self, ram: &GuestRam) -> u16 {
        match self.side {
            Side::Split { .. } => ram.word(self.used),
            Side::Packed(_) => ram.word(self.used + 2),
        }
    }

    /// The next chain that the device gave back: its head, and how much it wrote.
    pub fn reap(&mut self, ram: &GuestRam) -> Option<(u16, u32)> {
        if let Side::Packed(packed) = &self.side {
            let (id, written) = self.given_back(ram, packed.reaped)?;
            let slots = packed.slots.get(usize::from(id)).copied()?;
            let reaped = Packed::step(packed.reaped, slots, self.size);
            if let Side::Packed(packed) = &mut self.side {
                packed.reaped = reaped;
                packed.count = packed.count.wrapping_add(1);
            }
            return Some((id, written));
        }
        let device = self.device_index(ram);
        let Side::Split { used_index, .. } = &mut self.side else { return None };
        if device == *used_index {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(*used_index % self.size);
        *used_index = used_index.wrapping_add(1);
        let mut bytes = [0; 4];
        let _ = ram.memory.read(at + 4, &mut bytes);
        Some((ram.word(at), u32::from_le_bytes(bytes)))
    }
}

fn descriptor((address, len, flags): Piece, next: u16) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&len.to_le_bytes());
    bytes[12..14].copy_from_slice(&flags.to_le_bytes());
    bytes[14..].copy_from_slice(&next.to_le_bytes());
    bytes
}
