//! Guest memory: the regions that a front-end shares, mapped into this process.
//!
//! All of it can change at any time, and some of it may vanish: nothing here hands out a reference to bytes in it. Bytes are copied
//! in and out, by address and bounds-checked; words that both sides use are atomics. Every mapping lies between pages that
//! nobody may touch, and a file that shrinks breaks its mapping, not the process (see [`sigbus`](super::sigbus)).
//!
//! The session's thread builds a [`GuestMemory`] and gives it to the queues; workers only copy. What each frame needs is inlined
//! in any case: left to itself, the compiler calls it, and a copy of known length becomes one of any length.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64};

use rustix::fs::{FileType, fstat, fstatfs};

use super::error::MemoryError;
use super::header::{HeaderKind, MAX_HEADER, RawHeader};
use super::sigbus::Registration;
pub(super) use crate::hint::{Access, CACHE_LINE, prefetch};

const PAGE: u64 = 4096;
/// The largest page that a file may be made of.
const HUGEST_PAGE: u64 = 1 << 30;
/// No guest has more memory than this. It keeps one front-end from using up the address space.
const LARGEST_GUEST: u64 = 8 << 40;
/// How many regions a guest may have: what QEMU uses with memory slots.
pub(super) const MAX_REGIONS: usize = 509;

/// File systems whose pages come from this machine's memory or disks. A page of any other (FUSE, network file systems) may keep a
/// worker waiting for as long as somebody pleases.
const LOCAL_FILE_SYSTEMS: [u64; 6] = [
    0x0102_1994, // tmpfs, memfd
    0x9584_58f6, // hugetlbfs
    0x8584_58f6, // ramfs
    0xef53,      // ext2, 3, 4
    0x5846_5342, // xfs
    0x9123_683e, // btrfs
];

/// A part of a file, mapped shared. Reads and writes are bounds-checked copies.
#[derive(Debug)]
pub struct Mapping {
    /// The first of the bytes asked for.
    start: NonNull<u8>,
    len: usize,
    /// All address space that belongs to this value, guard pages included.
    reserved: (usize, usize),
    registration: Option<Registration>,
}

// SAFETY: the mapping belongs to this value; access is by copies and atomics, never by references to plain bytes.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset`.
    ///
    /// # Errors
    ///
    /// The file is not of memory or of a local disk, is shorter than what is asked for, or cannot be mapped.
    pub fn new(file: &OwnedFd, offset: u64, len: u64) -> Result<Self, MemoryError> {
        let status = fstat(file).map_err(MemoryError::File)?;
        if FileType::from_raw_mode(status.st_mode) != FileType::RegularFile {
            return Err(MemoryError::NotAFile);
        }
        let file_system = fstatfs(file).map_err(MemoryError::File)?.f_type as u64 & 0xffff_ffff;
        if !LOCAL_FILE_SYSTEMS.contains(&file_system) {
            return Err(MemoryError::FileSystem { magic: file_system });
        }
        let size = status.st_size.unsigned_abs();
        let end = offset.checked_add(len).filter(|_| len > 0 && len <= LARGEST_GUEST);
        let end = end.ok_or(MemoryError::Length { offset, len })?;
        if end > size {
            return Err(MemoryError::Short { size, end });
        }
        // Files of huge pages say so by their block size, and are mapped in units of it.
        let align = (status.st_blksize as u64).max(PAGE);
        if !align.is_power_of_two() || align > HUGEST_PAGE {
            return Err(MemoryError::PageSize(align));
        }
        let skip = offset & (align - 1);
        let mapped = (skip + len).next_multiple_of(align) as usize;
        Self::map(file, offset - skip, skip as usize, len as usize, mapped, align as usize)
    }

    fn map(
        file: &OwnedFd,
        offset: u64,
        skip: usize,
        len: usize,
        mapped: usize,
        align: usize,
    ) -> Result<Self, MemoryError> {
        let page = PAGE as usize;
        let total = mapped + 2 * align + 2 * page;
        let failed = || MemoryError::Map(std::io::Error::last_os_error());
        // SAFETY: a fresh anonymous reservation; the fixed mapping lies wholly inside it, with at least a page before and after.
        // On failure the reservation is given back. Nothing points into either yet.
        unsafe {
            let nowhere = std::ptr::null_mut();
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
            let reserved = libc::mmap(nowhere, total, libc::PROT_NONE, flags, -1, 0);
            if reserved == libc::MAP_FAILED {
                return Err(failed());
            }
            let base = (reserved as usize + page).next_multiple_of(align);
            let at = libc::mmap(
                base as *mut c_void,
                mapped,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_NORESERVE,
                file.as_fd().as_raw_fd(),
                offset as libc::off_t,
            );
            if at == libc::MAP_FAILED {
                let error = failed();
                libc::munmap(reserved, total);
                return Err(error);
            }
            // A core dump of the switch is not the place for guests' memory. Where that is refused, it is not needed to go on.
            libc::madvise(at, mapped, libc::MADV_DONTDUMP);
            let mapping = Self {
                start: NonNull::new_unchecked((base + skip) as *mut u8),
                len,
                reserved: (reserved as usize, total),
                registration: Registration::new(base, mapped),
            };
            // Dropped, and so unmapped, when it could not be registered.
            if mapping.registration.is_some() { Ok(mapping) } else { Err(MemoryError::TooManyMappings) }
        }
    }

    /// Bytes that can be reached.
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether the file shrank under the mapping. What is read is zeros, and what is written is lost.
    #[inline]
    pub fn is_broken(&self) -> bool {
        self.registration.as_ref().is_none_or(Registration::is_broken)
    }

    /// The byte at `offset`, shared with the other side.
    #[inline]
    pub fn atomic_u8(&self, offset: usize) -> Option<&AtomicU8> {
        // SAFETY: `address` checked bounds and alignment; the other side's accesses are not this program's.
        self.address::<AtomicU8>(offset).map(|at| unsafe { at.as_ref() })
    }

    /// The word at `offset`, shared with the other side; None where it is not aligned.
    #[inline]
    pub fn atomic_u16(&self, offset: usize) -> Option<&AtomicU16> {
        // SAFETY: as for `atomic_u8`.
        self.address::<AtomicU16>(offset).map(|at| unsafe { at.as_ref() })
    }

    /// The word at `offset`, shared with the other side; None where it is not aligned.
    #[inline]
    pub fn atomic_u64(&self, offset: usize) -> Option<&AtomicU64> {
        // SAFETY: as for `atomic_u8`.
        self.address::<AtomicU64>(offset).map(|at| unsafe { at.as_ref() })
    }

    #[inline]
    fn address<T>(&self, offset: usize) -> Option<NonNull<T>> {
        let fits = offset <= self.len && self.len - offset >= size_of::<T>();
        // SAFETY: `offset` was just seen to be inside the mapping.
        let at = fits.then(|| unsafe { self.start.add(offset) })?.cast::<T>();
        at.is_aligned().then_some(at)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // First: a registered mapping must exist.
        self.registration = None;
        // SAFETY: the reservation is this value's own, and nothing borrowed from it outlives it.
        unsafe { libc::munmap(self.reserved.0 as *mut c_void, self.reserved.1) };
    }
}

/// Where a region is: in the guest, in the front-end's own process, and in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RegionAddress {
    /// The guest physical address of the first byte.
    pub guest: u64,
    /// Its length in bytes.
    pub size: u64,
    /// Where the front-end has it mapped; rings are addressed this way.
    pub user: u64,
    /// Where it starts in the file.
    pub offset: u64,
}

impl RegionAddress {
    fn overlaps(&self, other: &Self) -> bool {
        self.guest < other.guest + other.size && other.guest < self.guest + self.size
    }
}

#[derive(Debug, Clone)]
struct Region {
    at: RegionAddress,
    host: NonNull<u8>,
    mapping: Arc<Mapping>,
}

// SAFETY: `host` points into `mapping`, which is Send and Sync and which this value keeps.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

/// All memory that a guest shares. A change makes a new one, which shares the mappings that stayed.
#[derive(Debug, Clone, Default)]
pub struct GuestMemory {
    regions: Vec<Region>,
}

/// An address range that is not, or not wholly, in guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OutsideMemory;

impl GuestMemory {
    /// The same memory with one more region.
    ///
    /// # Errors
    ///
    /// Its addresses wrap around or overlap another's, there are too many, or its file cannot be mapped.
    pub fn with(&self, at: RegionAddress, file: &OwnedFd) -> Result<Self, MemoryError> {
        let ends = [at.guest, at.user, at.offset].map(|start| start.checked_add(at.size));
        if at.size == 0 || ends.contains(&None) {
            return Err(MemoryError::Wraps(at));
        }
        if self.regions.iter().any(|region| region.at.overlaps(&at)) {
            return Err(MemoryError::Overlap(at));
        }
        let total = self.regions.iter().map(|region| region.at.size).fold(at.size, u64::saturating_add);
        if self.regions.len() >= MAX_REGIONS || total > LARGEST_GUEST {
            return Err(MemoryError::TooMuch);
        }
        let mapping = Arc::new(Mapping::new(file, at.offset, at.size)?);
        let mut regions = self.regions.clone();
        regions.push(Region { at, host: mapping.start, mapping });
        regions.sort_by_key(|region| region.at.guest);
        Ok(Self { regions })
    }

    /// The same memory without one region, named by where it is in the guest and the front-end; None when there is none.
    pub fn without(&self, at: RegionAddress) -> Option<Self> {
        let names = |region: &Region| {
            region.at.guest == at.guest && region.at.size == at.size && region.at.user == at.user
        };
        let regions: Vec<_> = self.regions.iter().filter(|region| !names(region)).cloned().collect();
        (regions.len() < self.regions.len()).then_some(Self { regions })
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.regions.is_empty()
    }

    /// Bytes in all regions.
    pub fn size(&self) -> u64 {
        self.regions.iter().map(|region| region.at.size).sum()
    }

    /// Whether any region's file shrank.
    #[inline]
    pub fn is_broken(&self) -> bool {
        self.regions.iter().any(|region| region.mapping.is_broken())
    }

    /// The guest address of what the front-end has at `user`, if `len` bytes from there are in one region.
    pub fn guest_address(&self, user: u64, len: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = user.checked_sub(region.at.user)?;
            (offset <= region.at.size && region.at.size - offset >= len).then(|| region.at.guest + offset)
        })
    }

    /// Where `len` bytes at a guest address are, if they are in one region.
    #[inline(always)]
    pub(super) fn locate(&self, guest: u64, len: usize) -> Option<NonNull<u8>> {
        for region in &self.regions {
            let offset = guest.wrapping_sub(region.at.guest);
            if offset < region.at.size && region.at.size - offset >= len as u64 {
                // SAFETY: the offset is inside the region, and so inside its mapping.
                return Some(unsafe { region.host.add(offset as usize) });
            }
        }
        None
    }

    /// Copies bytes out of the guest.
    ///
    /// # Errors
    ///
    /// Some of them are in no region; then some of `out` may have been written.
    #[inline(always)]
    pub fn read(&self, guest: u64, out: &mut [u8]) -> Result<(), OutsideMemory> {
        if let Some(from) = self.locate(guest, out.len()) {
            // SAFETY: `locate` checked the source; the destination is this program's own and so elsewhere.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), out.as_mut_ptr(), out.len()) };
            return Ok(());
        }
        self.pieces(guest, out.len(), |from, at, len| {
            // SAFETY: `pieces` checked the source, and `at + len` is at most the length of `out`.
            unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), out.as_mut_ptr().add(at), len) };
        })
    }

    /// Copies bytes into the guest.
    ///
    /// # Errors
    ///
    /// Some of the addresses are in no region; those before may have been written.
    #[inline]
    pub fn write(&self, guest: u64, bytes: &[u8]) -> Result<(), OutsideMemory> {
        if let Some(to) = self.locate(guest, bytes.len()) {
            // SAFETY: `locate` checked the destination; the source is this program's own and so elsewhere.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to.as_ptr(), bytes.len()) };
            return Ok(());
        }
        self.pieces(guest, bytes.len(), |to, at, len| {
            // SAFETY: `pieces` checked the destination, and `at + len` is at most the length of `bytes`.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr().add(at), to.as_ptr(), len) };
        })
    }

    /// Copies a header of virtio-net, of which the first ten bytes say everything, and what follows it out of the guest.
    ///
    /// # Errors
    ///
    /// As for [`read`](Self::read).
    #[inline(always)]
    pub(super) fn read_frame(
        &self,
        guest: u64,
        kind: HeaderKind,
        out: &mut [u8],
    ) -> Result<RawHeader, OutsideMemory> {
        let Some(from) = self.locate(guest, kind.len() + out.len()) else {
            let (mut first, mut rest) = ([0; 8], [0; 2]);
            let at = |offset: usize| guest.checked_add(offset as u64).ok_or(OutsideMemory);
            self.read(guest, &mut first)?;
            self.read(at(8)?, &mut rest)?;
            self.read(at(kind.len())?, out)?;
            return Ok(RawHeader::new(first, rest));
        };
        // SAFETY: `locate` checked both pieces of the source, the first of which has ten bytes at least; the destination is this
        // program's own.
        unsafe {
            // As words, not as ten or twelve bytes: that would be a call.
            let header = RawHeader::new(from.cast().read(), from.add(8).cast().read());
            copy(from.add(kind.len()).as_ptr(), out.as_mut_ptr(), out.len());
            Ok(header)
        }
    }

    /// Copies a header of virtio-net, as much of it as this kind has, and what follows it into the guest.
    ///
    /// A header in a cache line of its own is written only if it is not there already: it is the same for nearly all frames, and a
    /// line that nobody writes stays near both. DPDK's guests have their headers so, in front of an aligned buffer.
    ///
    /// # Errors
    ///
    /// As for [`write`](Self::write).
    #[inline(always)]
    pub(super) fn write_frame(
        &self,
        guest: u64,
        kind: HeaderKind,
        header: RawHeader,
        bytes: &[u8],
    ) -> Result<(), OutsideMemory> {
        let Some(to) = self.locate(guest, kind.len() + bytes.len()) else {
            self.write(guest, &header.to_bytes()[..kind.len()])?;
            return self.write(guest.checked_add(kind.len() as u64).ok_or(OutsideMemory)?, bytes);
        };
        let (first, rest) = header.parts();
        let is_apart = is_header_apart(to);
        // SAFETY: `locate` checked both pieces of the destination; the source is this program's own.
        unsafe {
            put::<8>(to.cast(), first, is_apart);
            match kind {
                HeaderKind::Short => put::<2>(to.add(8).cast(), [rest[0], rest[1]], is_apart),
                HeaderKind::Long => put::<4>(to.add(8).cast(), rest, is_apart),
            }
            copy(bytes.as_ptr(), to.add(kind.len()).as_ptr(), bytes.len());
        }
        Ok(())
    }

    /// Copies what is behind a header of so many bytes at an address out of the guest.
    ///
    /// # Errors
    ///
    /// As for [`read`](Self::read), of the bytes before it, too.
    #[inline(always)]
    pub(super) fn read_behind(
        &self,
        guest: u64,
        skipped: usize,
        out: &mut [u8],
    ) -> Result<(), OutsideMemory> {
        let Some(from) = self.locate(guest, skipped + out.len()) else {
            self.read(guest, &mut [0; MAX_HEADER][..skipped])?;
            return self.read(guest.checked_add(skipped as u64).ok_or(OutsideMemory)?, out);
        };
        // SAFETY: `locate` checked the source; the destination is this program's own and so elsewhere.
        unsafe { copy(from.add(skipped).as_ptr(), out.as_mut_ptr(), out.len()) };
        Ok(())
    }

    /// Asks for the first of so many bytes at a guest address to be brought near: as much as a short frame has, with or without a
    /// header before it, in as few cache lines as hold it. What is in no region is ignored.
    #[inline(always)]
    pub(super) fn prefetch(&self, guest: u64, len: usize, access: Access) {
        if let Some(at) = self.locate(guest, 1) {
            prefetch(at.as_ptr(), if is_header_apart(at) { Access::Read } else { access });
            let in_first = CACHE_LINE - at.as_ptr() as usize % CACHE_LINE;
            if len > in_first {
                prefetch(at.as_ptr().wrapping_add(CACHE_LINE), access);
            }
        }
    }

    /// A range that touches several regions, which must follow each other without a gap.
    #[cold]
    fn pieces(
        &self,
        guest: u64,
        len: usize,
        mut copy: impl FnMut(NonNull<u8>, usize, usize),
    ) -> Result<(), OutsideMemory> {
        let mut done = 0;
        while done < len {
            let address = guest.checked_add(done as u64).ok_or(OutsideMemory)?;
            let region = self.regions.iter().find(|region| {
                address.checked_sub(region.at.guest).is_some_and(|offset| offset < region.at.size)
            });
            let region = region.ok_or(OutsideMemory)?;
            let offset = address - region.at.guest;
            let piece = ((region.at.size - offset) as usize).min(len - done);
            // SAFETY: the offset is inside the region, and so inside its mapping.
            copy(unsafe { region.host.add(offset as usize) }, done, piece);
            done += piece;
        }
        Ok(())
    }
}

/// Whether a header at an address has no more than itself in its cache line, of all that is written with it.
#[inline(always)]
fn is_header_apart(at: NonNull<u8>) -> bool {
    at.as_ptr() as usize % CACHE_LINE >= CACHE_LINE - MAX_HEADER
}

/// Writes a few bytes, if they are not there already or `is_compared` is not set.
///
/// # Safety
///
/// The bytes at `to` can be read and written.
#[inline(always)]
unsafe fn put<const N: usize>(to: NonNull<[u8; N]>, bytes: [u8; N], is_compared: bool) {
    // SAFETY: the caller's.
    unsafe {
        if !is_compared || to.read() != bytes {
            to.write(bytes);
        }
    }
}

/// Copies bytes. Short frames are copied in place: for them, a call costs as much as the copy.
///
/// # Safety
///
/// As for `copy_nonoverlapping`.
#[inline(always)]
unsafe fn copy(from: *const u8, to: *mut u8, len: usize) {
    use std::ptr::copy_nonoverlapping;
    const HALF: usize = 32;
    // SAFETY: the caller's; each piece lies in the first `len` bytes.
    unsafe {
        match len {
            // The halves overlap where it is shorter than both.
            HALF..=64 => {
                copy_nonoverlapping(from, to, HALF);
                copy_nonoverlapping(from.add(len - HALF), to.add(len - HALF), HALF);
            }
            _ => copy_nonoverlapping(from, to, len),
        }
    }
}
