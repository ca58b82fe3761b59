//! The guest's side, in this process: memory to share, and a driver of split rings that does what it is told, wrong or right.
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

/// A split ring, driven. Addresses are the guest's.
#[derive(Debug, Clone)]
pub struct DriverRing {
    /// Entries.
    pub size: u16,
    /// The descriptor table.
    pub descriptors: u64,
    /// The available ring.
    pub available: u64,
    /// The used ring.
    pub used: u64,
    next_descriptor: u16,
    available_index: u16,
    used_index: u16,
}

impl DriverRing {
    /// A ring of so many entries, its tables one behind the other from a guest address.
    #[must_use]
    pub fn new(size: u16, guest: u64) -> Self {
        let entries = u64::from(size);
        let available = guest + 16 * entries;
        let used = (available + 6 + 2 * entries).next_multiple_of(64);
        Self {
            size,
            descriptors: guest,
            available,
            used,
            next_descriptor: 0,
            available_index: 0,
            used_index: 0,
        }
    }

    /// The first guest address behind the tables.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.used + 6 + 8 * u64::from(self.size)
    }

    /// How the front-end has a guest address.
    #[must_use]
    pub fn user(guest: u64) -> u64 {
        guest - GUEST_BASE + USER_BASE
    }

    /// Writes one descriptor.
    pub fn set_descriptor(&self, ram: &GuestRam, index: u16, piece: Piece, next: u16) {
        ram.write(self.descriptors + 16 * u64::from(index), &descriptor(piece, next));
    }

    /// Makes a chain available, in the next free descriptors; the device is not shown it before [`show`](Self::show). Answers
    /// its head.
    pub fn post(&mut self, ram: &GuestRam, pieces: &[Piece]) -> u16 {
        let head = self.next_descriptor;
        for (index, (address, len, flags)) in pieces.iter().enumerate() {
            let at = self.next_descriptor;
            self.next_descriptor = (at + 1) % self.size;
            let more = if index + 1 < pieces.len() { NEXT } else { 0 };
            self.set_descriptor(ram, at, (*address, *len, flags | more), self.next_descriptor);
        }
        self.offer(ram, head);
        head
    }

    /// Makes a chain available that is a table at a guest address.
    pub fn post_indirect(&mut self, ram: &GuestRam, table: u64, pieces: &[Piece]) -> u16 {
        for (index, (address, len, flags)) in pieces.iter().enumerate() {
            let more = if index + 1 < pieces.len() { NEXT } else { 0 };
            let bytes = descriptor((*address, *len, flags | more), index as u16 + 1);
            ram.write(table + 16 * index as u64, &bytes);
        }
        self.post(ram, &[(table, 16 * pieces.len() as u32, INDIRECT)])
    }

    /// Puts a head into the available ring.
    pub fn offer(&mut self, ram: &GuestRam, head: u16) {
        let at = self.available + 4 + 2 * u64::from(self.available_index % self.size);
        ram.write(at, &head.to_le_bytes());
        self.available_index = self.available_index.wrapping_add(1);
    }

    /// Shows the device what was made available.
    pub fn show(&self, ram: &GuestRam) {
        self.show_index(ram, self.available_index);
    }

    /// Shows the device any available index.
    pub fn show_index(&self, ram: &GuestRam, index: u16) {
        fence(Ordering::SeqCst);
        ram.write(self.available + 2, &index.to_le_bytes());
        fence(Ordering::SeqCst);
    }

    /// Flags of the available ring: 1 asks for no interrupts.
    pub fn set_flags(&self, ram: &GuestRam, flags: u16) {
        ram.write(self.available, &flags.to_le_bytes());
    }

    /// Asks for an interrupt after this used index.
    pub fn set_used_event(&self, ram: &GuestRam, index: u16) {
        ram.write(self.available + 4 + 2 * u64::from(self.size), &index.to_le_bytes());
    }

    /// How far the device is.
    #[must_use]
    pub fn device_index(&self, ram: &GuestRam) -> u16 {
        fence(Ordering::SeqCst);
        ram.word(self.used + 2)
    }

    /// The available index after which the device wants a kick.
    #[must_use]
    pub fn available_event(&self, ram: &GuestRam) -> u16 {
        ram.word(self.used + 4 + 8 * u64::from(self.size))
    }

    /// Flags of the used ring: 1 asks for no kicks.
    #[must_use]
    pub fn device_flags(&self, ram: &GuestRam) -> u16 {
        ram.word(self.used)
    }

    /// The next chain that the device gave back: its head, and how much it wrote.
    pub fn reap(&mut self, ram: &GuestRam) -> Option<(u16, u32)> {
        if self.device_index(ram) == self.used_index {
            return None;
        }
        let at = self.used + 4 + 8 * u64::from(self.used_index % self.size);
        self.used_index = self.used_index.wrapping_add(1);
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
