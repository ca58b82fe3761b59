#![no_main]
//! Rings and descriptors: the input is the guest's memory, rings first.

mod guest;

use std::cell::RefCell;

use guest::Guest;
use libfuzzer_sys::fuzz_target;
use sluice_user::vhost::driver::GUEST_BASE;

thread_local!(static GUEST: RefCell<Guest> = RefCell::new(Guest::new()));

fuzz_target!(|memory: &[u8]| {
    GUEST.with_borrow_mut(|guest| {
        guest.ram.write(GUEST_BASE, &memory[..memory.len().min(1 << 16)]);
        guest.serve();
    });
});
