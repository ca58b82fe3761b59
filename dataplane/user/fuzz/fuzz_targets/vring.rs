#![no_main]
//! Rings and descriptors, split and packed: the input is the guest's memory, rings first.

mod guest;

use std::cell::RefCell;

use guest::Guest;
use libfuzzer_sys::fuzz_target;
use sluice_user::vhost::driver::GUEST_BASE;

thread_local!(static GUESTS: RefCell<[Guest; 2]> = RefCell::new([false, true].map(Guest::new)));

fuzz_target!(|memory: &[u8]| {
    GUESTS.with_borrow_mut(|guests| {
        for guest in guests {
            guest.ram.write(GUEST_BASE, &memory[..memory.len().min(1 << 16)]);
            guest.serve();
        }
    });
});
