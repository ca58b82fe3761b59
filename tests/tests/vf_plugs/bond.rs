//! Connections of a guest with a bond survive: the VF of an igb port comes and goes, over a software path that is always
//! there.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use sluice_control::vf::plug::Plug;
use sluice_eswitch::contract::Eswitch;
use sluice_tests::lab_guest::PATIENCE;
use sluice_tests::{Flow, Netns, tools};

use super::{
    FAR_PORT, MAC, PORT, VF, candidate, done, ip, ip_in, is_active, namespace, open_vf, plug_into, run,
    wait_carrier,
};

const GUEST: &str = "10.81.0.1";
const PEER: &str = "10.81.0.2";
const ROUNDS: usize = 10;

/// A guest whose bond has a veth that leads to the port, and a peer behind the wire. What was done to the ports is undone
/// on drop.
struct Network {
    guest: Netns,
    peer: Netns,
}

impl Network {
    fn build() -> Result<Network> {
        let network = Network { guest: namespace("bond")?, peer: namespace("peer")? };
        let Network { guest, peer } = &network;
        ip(&format!("link add slsw type veth peer name eth0 address {MAC} netns {}", guest.name()))?;
        ip("link set slsw up")?;
        // The port is to receive what is for the guest; were it promiscuous, as in a bridge, the model would show that to
        // VFs instead.
        run("bridge", &format!("fdb add {MAC} dev {PORT} self"))?;
        for (from, to) in [("slsw", PORT), (PORT, "slsw")] {
            run("tc", &format!("qdisc add dev {from} clsact"))?;
            let redirect = format!("matchall action mirred egress redirect dev {to}");
            run("tc", &format!("filter add dev {from} ingress {redirect}"))?;
        }
        ip_in(
            guest,
            &format!("link add bond0 address {MAC} type bond mode active-backup miimon 50 num_grat_arp 3"),
        )?;
        ip_in(guest, "link set eth0 down")?;
        ip_in(guest, "link set eth0 master bond0")?;
        ip_in(guest, "link set bond0 up")?;
        ip_in(guest, &format!("address add {GUEST}/24 dev bond0"))?;
        ip(&format!("link set {FAR_PORT} netns {}", peer.name()))?;
        ip_in(peer, &format!("link set {FAR_PORT} up"))?;
        ip_in(peer, &format!("address add {PEER}/24 dev {FAR_PORT}"))?;
        wait_carrier()?;
        tools::ping(guest, PEER)?;
        Ok(network)
    }

    fn active(&self) -> Result<String> {
        let shown = ip_in(&self.guest, "-d link show bond0")?;
        let mut words = shown.split_whitespace();
        words.find(|word| *word == "active_slave");
        Ok(words.next().unwrap_or_default().to_owned())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // It may not have come so far.
        let _ = run("tc", &format!("qdisc del dev {PORT} clsact"));
        let _ = run("bridge", &format!("fdb del {MAC} dev {PORT} self"));
        let _ = ip_in(&self.peer, &format!("link set {FAR_PORT} netns 1"));
    }
}

/// A TCP connection from the guest to its peer.
struct Connection {
    near: TcpStream,
    far: TcpStream,
}

impl Connection {
    fn open(network: &Network) -> Result<Connection> {
        let address: SocketAddr = format!("{PEER}:7000").parse()?;
        let listener = network.peer.enter(|| Ok(TcpListener::bind(address)?))?;
        let near = network.guest.enter(|| Ok(TcpStream::connect_timeout(&address, PATIENCE)?))?;
        let (far, _) = listener.accept()?;
        for stream in [&near, &far] {
            stream.set_read_timeout(Some(PATIENCE))?;
        }
        Ok(Connection { near, far })
    }

    fn exchange(&mut self, number: u8) -> Result<()> {
        let mut heard = [0];
        self.near.write_all(&[number])?;
        self.far.read_exact(&mut heard).context("the peer hears nothing")?;
        self.far.write_all(&heard)?;
        self.near.read_exact(&mut heard).context("the guest hears nothing")?;
        ensure!(heard == [number], "{heard:?} instead of {number}");
        Ok(())
    }
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
#[allow(clippy::print_stdout)] // Figures are what one wants to read.
fn connections_over_a_bond_survive_plugging_and_unplugging() -> Result<()> {
    let (mut eswitch, _) = open_vf()?;
    eswitch.disable(VF)?;
    let network = Network::build()?;
    let mut connection = Connection::open(&network)?;
    let mut plug = plug_into(&network.guest, "vf0", Some("bond0"));
    plug.check()?;
    let flow = Flow::start(&network.guest, &network.peer, format!("{PEER}:7001").parse()?)?;
    // What is in flight counts too, a few hundred at most.
    let missing = |flow: &Flow| flow.sent().cast_signed() - flow.received().cast_signed();
    let mut lost = [0; 4];
    for round in 0..ROUNDS {
        flow.wait_received(flow.received() + 1000, PATIENCE)?;
        let before = missing(&flow);
        eswitch.enable(VF)?;
        let vf = candidate(&mut eswitch)?;
        for _ in 0..2 {
            done("plugging", || plug.plug(&vf))?;
        }
        is_active(&mut plug, &vf)?;
        ensure!(network.active()? == "vf0", "{} is active", network.active()?);
        connection.exchange(round as u8).context("on the VF")?;
        flow.wait_received(flow.received() + 1000, PATIENCE)?;
        let between = missing(&flow);
        lost[0] += between - before;

        // Gracefully, by force, and by the NIC.
        let by_force = round % 3 == 1;
        if round % 3 == 2 {
            eswitch.disable(VF)?;
        }
        done("unplugging", || plug.unplug(&vf, by_force))?;
        ensure!(network.active()? == "eth0", "{} is active", network.active()?);
        connection.exchange(round as u8).context("on the software path")?;
        flow.wait_received(flow.received() + 1000, PATIENCE)?;
        lost[1 + round % 3] += missing(&flow) - between;
        if round % 3 != 2 {
            let netdev = candidate(&mut eswitch)?.netdev;
            ensure!(netdev.is_some() && netdev == vf.netdev, "{netdev:?} came back, not {:?}", vf.netdev);
        }
        eswitch.disable(VF)?;
    }
    let report = flow.finish()?;
    println!("{ROUNDS} times there and back: {report:?}, {} lost", report.lost());
    println!("lost while plugging, unplugging, unplugging by force, closing: {lost:?}");
    ensure!(report.longest_gap < Duration::from_secs(5), "{report:?}");
    eswitch.unprogram(VF)?;
    Ok(())
}
