//! What happens when shared memory goes away under a mapping: its owner may truncate the file at any time, and the next
//! access raises SIGBUS, which would kill the process.
//!
//! Every [`Mapping`](super::memory::Mapping) is registered here. The handler puts private zero pages in place of the mapping that
//! was hit and marks it broken; the access continues, reads zeros or writes where nobody looks, and whoever uses the
//! mapping asks [`Registration::is_broken`] before it trusts what it did. A fault anywhere else goes to the handler that was there before.
//!
//! The handler runs on whichever thread faulted. It takes no lock and allocates nothing.
#![allow(unsafe_code)]

use std::ffi::{c_int, c_void};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering, fence};

/// How many mappings the process may have at once.
const SLOTS: usize = 32768;

/// One registered mapping. `version` is odd while the slot is being written, so that a handler on another thread never
/// combines the start of one mapping with the length of the next.
struct Slot {
    taken: AtomicBool,
    version: AtomicUsize,
    base: AtomicUsize,
    len: AtomicUsize,
    broken: AtomicBool,
}

impl Slot {
    const fn new() -> Self {
        Self {
            taken: AtomicBool::new(false),
            version: AtomicUsize::new(0),
            base: AtomicUsize::new(0),
            len: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
        }
    }

    /// Only the owner of `taken` writes.
    fn set(&self, base: usize, len: usize) {
        self.version.fetch_add(1, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        self.base.store(base, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::AcqRel);
    }

    fn get(&self) -> Option<(usize, usize)> {
        let before = self.version.load(Ordering::Acquire);
        let found = (self.base.load(Ordering::Relaxed), self.len.load(Ordering::Relaxed));
        fence(Ordering::SeqCst);
        (before.is_multiple_of(2) && self.version.load(Ordering::Relaxed) == before && found.1 != 0)
            .then_some(found)
    }
}

static TABLE: [Slot; SLOTS] = [const { Slot::new() }; SLOTS];

/// The handler that was there before ours; null until ours is installed. A pointer, since a handler may not take the lock
/// that a `OnceLock` may hold.
static PREVIOUS: AtomicPtr<libc::sigaction> = AtomicPtr::new(std::ptr::null_mut());

static INSTALLED: OnceLock<bool> = OnceLock::new();

/// How many mappings broke so far.
static BREAKS: AtomicUsize = AtomicUsize::new(0);

/// How many mappings of the whole process broke so far: one look says that none broke between two moments.
#[inline]
pub(super) fn breaks() -> usize {
    BREAKS.load(Ordering::Acquire)
}

/// A mapping that survives the loss of its file, for as long as this value lives.
#[derive(Debug)]
pub(super) struct Registration {
    slot: usize,
}

impl Registration {
    /// Registers the pages from `base`. None when the table is full or the handler cannot be installed.
    ///
    /// # Safety
    ///
    /// `base` and `len` are exactly one shared mapping of a file, page-aligned, owned by the caller, who drops this
    /// value before unmapping it.
    pub(super) unsafe fn new(base: usize, len: usize) -> Option<Self> {
        if !*INSTALLED.get_or_init(install) {
            return None;
        }
        let slot = TABLE.iter().position(|slot| {
            slot.taken.compare_exchange(false, true, Ordering::AcqRel, Ordering::Relaxed).is_ok()
        })?;
        TABLE[slot].broken.store(false, Ordering::Release);
        TABLE[slot].set(base, len);
        Some(Self { slot })
    }

    /// Whether the file went away under the mapping. What was read since is zeros.
    #[inline]
    pub(super) fn is_broken(&self) -> bool {
        TABLE[self.slot].broken.load(Ordering::Acquire)
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        TABLE[self.slot].set(0, 0);
        TABLE[self.slot].taken.store(false, Ordering::Release);
    }
}

fn install() -> bool {
    // SAFETY: a zeroed sigaction is valid; both pointers are to live values. The kept box is never freed.
    unsafe {
        let mut previous: libc::sigaction = std::mem::zeroed();
        if libc::sigaction(libc::SIGBUS, std::ptr::null(), &mut previous) != 0 {
            return false;
        }
        PREVIOUS.store(Box::into_raw(Box::new(previous)), Ordering::Release);
        let mut ours: libc::sigaction = std::mem::zeroed();
        ours.sa_sigaction = on_sigbus as *const () as usize;
        // On the alternate stack, where the previous handler (std's, for stack overflows) expects to run.
        ours.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigemptyset(&mut ours.sa_mask);
        libc::sigaction(libc::SIGBUS, &ours, std::ptr::null_mut()) == 0
    }
}

extern "C" fn on_sigbus(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel passes a valid siginfo to a handler with SA_SIGINFO.
    let address = unsafe { (*info).si_addr() } as usize;
    if !replace(address) {
        forward(signal, info, context);
    }
}

/// Puts zero pages in place of the mapping that holds `address`.
fn replace(address: usize) -> bool {
    for slot in &TABLE {
        let Some((base, len)) = slot.get() else { continue };
        if address.wrapping_sub(base) >= len {
            continue;
        }
        // The whole mapping at once: parts of a huge page cannot be replaced.
        // SAFETY: the slot's owner promised that this is one mapping that lives while it is registered, and the faulting
        // thread holds on to the owner. Errno is this thread's and is put back.
        unsafe {
            let errno = *libc::__errno_location();
            let at = libc::mmap(
                base as *mut c_void,
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_FIXED | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE,
                -1,
                0,
            );
            if at != libc::MAP_FAILED {
                // A stray write costs a page, not a huge one. Where that is refused, it is only dearer.
                libc::madvise(at, len, libc::MADV_NOHUGEPAGE);
            }
            *libc::__errno_location() = errno;
            if at == libc::MAP_FAILED {
                return false;
            }
        }
        slot.broken.store(true, Ordering::Release);
        BREAKS.fetch_add(1, Ordering::AcqRel);
        return true;
    }
    false
}

/// Hands a fault that is not ours to the previous handler.
fn forward(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    let previous = PREVIOUS.load(Ordering::Acquire);
    // SAFETY: `previous` was leaked by `install`; its handler has the signature that its flags say; resetting to the default
    // makes the faulting access end the process when it is tried again.
    unsafe {
        let handler = (*previous).sa_sigaction;
        if handler == libc::SIG_DFL || handler == libc::SIG_IGN {
            libc::signal(signal, libc::SIG_DFL);
        } else if (*previous).sa_flags & libc::SA_SIGINFO != 0 {
            let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                std::mem::transmute(handler);
            handler(signal, info, context);
        } else {
            let handler: extern "C" fn(c_int) = std::mem::transmute(handler);
            handler(signal);
        }
    }
}
