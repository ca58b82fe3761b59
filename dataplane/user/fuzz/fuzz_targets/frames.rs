#![no_main]
//! Virtio-net headers: the input is a header and a frame, in a chain that is as it should be.

mod guest;

use std::cell::RefCell;

use guest::{BUFFERS, Guest};
use libfuzzer_sys::fuzz_target;

thread_local!(static GUEST: RefCell<Guest> = RefCell::new(Guest::new(false)));

fuzz_target!(|bytes: &[u8]| {
    GUEST.with_borrow_mut(|guest| {
        let bytes = &bytes[..bytes.len().min(0x8000)];
        guest.ram.write(BUFFERS, bytes);
        let ram = &guest.ram;
        guest.rings[1].post(ram, &[(BUFFERS, bytes.len() as u32, 0)]);
        guest.rings[1].show(ram);
        guest.serve();
    });
});
