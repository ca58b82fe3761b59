//! Two guests and the host between them, in network namespaces of their own.

use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};

use anyhow::{Context, Result};
use sluice_tests::Netns;

use crate::bpf::{self, Kind, Word};
use crate::programs;

/// A guest's interface.
pub(crate) const INTERFACE: &str = "eth0";

/// What a guest is called and has.
#[derive(Debug)]
pub(crate) struct Guest {
    pub(crate) name: &'static str,
    pub(crate) port: &'static str,
    pub(crate) mac: [u8; 6],
    pub(crate) ip: Ipv4Addr,
    pub(crate) netns: Netns,
}

/// Host and guests, wired, without a switch.
#[derive(Debug)]
pub(crate) struct World {
    // Dropped in this order.
    pub(crate) host: Netns,
    pub(crate) guests: [Guest; 2],
    hook: Kind,
}

impl World {
    /// Makes a world whose namespaces have `tag` in their names. For XDP the guests are as that needs them: with full
    /// checksums, and ready for redirected frames.
    pub(crate) fn new(tag: &str, hook: Kind) -> Result<World> {
        let prefix = format!("sl-{}-{tag}", std::process::id());
        let host = netns(&format!("{prefix}-host"))?;
        let guest = |name, port, number| -> Result<Guest> {
            let netns = netns(&format!("{prefix}-{name}"))?;
            let mac = [2, 0, 0, 0, 0, number];
            let text = mac.map(|byte| format!("{byte:02x}")).join(":");
            let own = netns.name();
            host.run(&[
                "ip", "link", "add", port, "type", "veth", "peer", "name", INTERFACE, "address", &text,
                "netns", own,
            ])?;
            host.run(&["ip", "link", "set", port, "up"])?;
            netns.run(&["ip", "link", "set", INTERFACE, "up"])?;
            let ip = Ipv4Addr::new(10, 77, 0, number);
            netns.address(INTERFACE, &format!("{ip}/16"))?;
            if hook == Kind::Xdp {
                netns.run(&["ethtool", "-K", INTERFACE, "tx-checksumming", "off", "gro", "on"])?;
            }
            Ok(Guest { name, port, mac, ip, netns })
        };
        let guests = [guest("a", "p1", 1)?, guest("b", "p2", 2)?];
        Ok(World { host, guests, hook })
    }

    /// Readies the first guest and its port for generated frames, or puts them back to how veth comes.
    ///
    /// A veth accepts such frames if its other end polls (NAPI), which it does with GRO on or XDP attached; and lets a
    /// program pretend to have received one if it polls itself.
    pub(crate) fn accept_generated(&self, on: bool) -> Result<()> {
        let Guest { netns, port, .. } = &self.guests[0];
        let state = if on { "on" } else { "off" };
        self.host.run(&["ethtool", "-K", port, "gro", state])?;
        if self.hook == Kind::Tcx {
            netns.run(&["ethtool", "-K", INTERFACE, "gro", state])?;
        }
        Ok(())
    }

    /// Counts and drops what reaches the second guest, until the result is dropped.
    pub(crate) fn sink(&self, kind: Kind) -> Result<Sink> {
        self.guests[1].netns.enter(|| {
            let counter = Word::new(0)?;
            let program = programs::sink(kind, &counter)?;
            let ifindex = nix::net::if_::if_nametoindex(INTERFACE).context("the guest's interface")?;
            Ok(Sink { counter, _link: bpf::attach(kind, program.as_fd(), ifindex)? })
        })
    }
}

/// An attached sink.
#[derive(Debug)]
pub(crate) struct Sink {
    pub(crate) counter: Word,
    _link: OwnedFd,
}

/// Without IPv6, which would add frames of its own.
fn netns(name: &str) -> Result<Netns> {
    let netns = Netns::create(name)?;
    netns.sysctl("net/ipv6/conf/all/disable_ipv6", "1")?;
    netns.sysctl("net/ipv6/conf/default/disable_ipv6", "1")?;
    Ok(netns)
}
