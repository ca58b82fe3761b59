//! What a guest with rings says is left undone, on its way through both engines.

use anyhow::{Result, ensure};
use sluice_tests::lab::INTERFACE;
use sluice_tests::wire::{carries, mac_text, note, udp4};
use sluice_tests::{PATIENCE, PacketSocket, Tap, Vm, scenario};

use crate::Guest;

/// A virtio-net header, as packet sockets have it: a checksum is to be filled in at `start + offset`.
fn header(start: u16, offset: u16) -> Vec<u8> {
    let mut bytes = vec![1, 0, 0, 0, 0, 0];
    bytes.extend(start.to_le_bytes());
    bytes.extend(offset.to_le_bytes());
    bytes
}

/// A guest's lies end where its rings are served, an honest word crosses the trunk, and what the kernel serves on the other side
/// takes nothing from either that would change what was decided on.
#[test]
fn lies_do_not_cross_the_trunk() -> Result<()> {
    scenario(|lab| {
        let vm2 = Guest::new(lab, 2)?;
        let tap = Tap::open(lab.host(), "t1")?;
        lab.host().run(&["ip", "link", "set", "t1", "up"])?;
        let (other, veth) = (
            Vm { netns: lab.netns("vm1")?, name: "vm1".to_owned(), port: "t1".to_owned(), number: 1 },
            lab.vm(3)?,
        );
        let guard = format!("policy: {{ipGuard: [\"{}\"]}}", vm2.vm.ip4());
        lab.sluice().apply(&format!(
            "switches: [{{name: blue}}]\nvnics:\n{}- {{name: vm1, switch: blue, attach: {{tap: t1}}, mac: \"{}\"}}\n{}",
            vm2.vnic(&guard),
            mac_text(other.mac()),
            veth.vnic("")
        ))?;
        let vmm = vm2.boot(lab, true)?;
        lab.sluice().wait_ready("vnic", "vm1", PATIENCE)?;
        let datagram = |to: &Vm, from: &Vm, text: &str| {
            udp4(to.mac(), from.mac(), (from.ip4(), to.ip4()), (1, 2), text.as_bytes())
        };
        // From the rings, over the trunk, to a tap for which the kernel fills checksums in.
        let guest = PacketSocket::open_vnet(&vm2.vm.netns, INTERFACE)?;
        let lie = datagram(&other, &vm2.vm, "a lie");
        for (start, offset) in [(20, 6), (20, 10), (34, 0), (34, 4)] {
            guest.send(&[header(start, offset), lie.clone()].concat())?;
        }
        guest.send(&[header(34, 6), datagram(&other, &vm2.vm, "honest")].concat())?;
        let mut strayed = 0;
        let honest = tap.expect("the honest datagram", PATIENCE, |frame| {
            strayed += u32::from(carries(frame, "a lie"));
            carries(frame, "honest")
        })?;
        ensure!(strayed == 0, "{strayed} lies crossed the trunk");
        ensure!(honest[40..42] != [0, 0], "its checksum was not filled in");
        let counted = |port: &str| lab.sluice().dropped(port, "malformed-length");
        ensure!((counted("vnic/vm2")?, counted("user/blue")?) == (4, 0), "{:?}", lab.sluice().drops()?);

        // And the other way round, from a veth that the kernel serves to the rings.
        let socket = PacketSocket::open_vnet(&veth.netns, INTERFACE)?;
        let card = PacketSocket::open(&vm2.vm.netns, INTERFACE)?;
        socket.send(&[header(20, 6), datagram(&vm2.vm, &veth, "a lie")].concat())?;
        socket.send(&[vec![0; 10], note(vm2.vm.mac(), veth.mac(), &[], "that is all")].concat())?;
        let mut strayed = 0;
        card.expect("the note", PATIENCE, |frame| {
            strayed += u32::from(carries(frame, "a lie"));
            carries(frame, "that is all")
        })?;
        ensure!(strayed == 0 && counted("vnic/vm3")? == 1, "{:?}", lab.sluice().drops()?);
        vmm.end()
    })
}
