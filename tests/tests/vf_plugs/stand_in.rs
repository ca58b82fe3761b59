//! On any host: a veth for the VF, found by name and address as it is no PCI function.

use anyhow::{Context, Result, ensure};
use sluice_control::vf::plug::{Candidate, Plug, PlugError, Progress};
use sluice_tests::Netns;

use super::{MAC, done, ip_in, is_active, namespace, plug_into, refused};

/// A host with `vf7`, whose other end is `far7`.
fn host() -> Result<(Netns, Candidate)> {
    let host = namespace("host")?;
    ip_in(&host, &format!("link add vf7 address {MAC} type veth peer name far7"))?;
    ip_in(&host, "link set far7 up")?;
    let vf = Candidate { pf: "pf0".into(), index: 7, pci: None, netdev: Some("vf7".into()), mac: MAC };
    Ok((host, vf))
}

fn has(netns: &Netns, netdev: &str) -> Result<bool> {
    Ok(netns.ifindex(netdev)?.is_some())
}

#[test]
fn an_interface_goes_into_the_guest_and_comes_back_under_its_name() -> Result<()> {
    let (host, vf) = host()?;
    let guest = namespace("guest")?;
    host.enter(|| {
        let mut plug = plug_into(&guest, "net1", None);
        plug.check()?;
        for _ in 0..2 {
            ensure!(plug.plug(&vf)? == Progress::Done, "nothing keeps it");
        }
        // Nobody has set it up; then its wire is cut.
        ensure!(!plug.is_active(&vf)?, "it is down");
        ip_in(&guest, "link set net1 up")?;
        is_active(&mut plug, &vf)?;
        ip_in(&host, "link set far7 down")?;
        ensure!(!plug.is_active(&vf)?, "it has no carrier");
        for by_force in [false, true] {
            ensure!(plug.unplug(&vf, by_force)? == Progress::Done, "nothing keeps it");
        }
        Ok(())
    })?;
    ensure!(has(&host, "vf7")? && !has(&guest, "net1")?, "it did not come back");
    ensure!(!ip_in(&host, "link show vf7")?.contains("UP"), "it came back up");
    Ok(())
}

#[test]
fn a_daemon_that_was_restarted_brings_it_back_under_the_usual_name() -> Result<()> {
    let (host, vf) = host()?;
    let guest = namespace("guest2")?;
    host.enter(|| {
        done("plugging", || plug_into(&guest, "net1", None).plug(&vf))?;
        // The name that it had is not known, nor is it to be seen from the host.
        let vf = Candidate { netdev: None, ..vf.clone() };
        // Its usual name is taken, and the one that it has in there too.
        ip_in(&host, "link add pf0v7 type veth peer name net1")?;
        let result = plug_into(&guest, "net1", None).unplug(&vf, false);
        // Without a PCI address it is not recognised under a name that the kernel chose.
        ensure!(matches!(result, Err(PlugError::Failed { .. })), "{result:?}");
        Ok(())
    })?;
    let links = ip_in(&host, "-brief link")?;
    ensure!(links.lines().any(|line| line.starts_with("dev")) && !has(&guest, "net1")?, "{links}");
    Ok(())
}

#[test]
fn what_a_guest_has_is_not_touched() -> Result<()> {
    let (host, vf) = host()?;
    let guest = namespace("guest3")?;
    ip_in(&guest, "link add net1 type veth peer name other")?;
    host.enter(|| {
        let mut plug = plug_into(&guest, "net1", None);
        refused("another interface is called net1", || plug.plug(&vf))?;
        ensure!(has(&host, "vf7")?, "it left, and was refused");
        done("unplugging", || plug.unplug(&vf, false))?;
        // Under its own name too it would be in the way.
        ip_in(&guest, "link set other name vf7")?;
        ip_in(&guest, "link set net1 name net2")?;
        done("plugging", || plug.plug(&vf))?;
        done("unplugging", || plug.unplug(&vf, false))?;
        Ok(())
    })?;
    ensure!(has(&host, "vf7")? && has(&guest, "vf7")? && has(&guest, "net2")?, "something is missing");
    Ok(())
}

#[test]
fn bonds_that_are_none_are_refused_before_anything_is_done() -> Result<()> {
    let (host, vf) = host()?;
    let guest = namespace("guest4")?;
    host.enter(|| {
        let mut plug = plug_into(&guest, "net1", Some("bond0"));
        for make in ["", "link add bond0 type veth peer name other"] {
            if !make.is_empty() {
                ip_in(&guest, make)?;
            }
            let words = if make.is_empty() { "there is no bond bond0" } else { "is not a bond" };
            refused(words, || plug.check().map(|()| Progress::Done))?;
            refused(words, || plug.plug(&vf))?;
            done("unplugging", || plug.unplug(&vf, false))?;
            ensure!(has(&host, "vf7")?, "it did not come back");
        }
        Ok(())
    })
}

#[test]
fn what_is_no_guest_is_refused() -> Result<()> {
    let (host, vf) = host()?;
    let file = tempfile::NamedTempFile::new()?;
    let path = file.path().to_str().context("a path")?;
    let own = format!("/run/netns/{}", host.name());
    host.enter(|| {
        let plug = |path: &str| {
            use sluice_control::vf::plug::netns::{Host, Netns};
            Netns::new(path, "net1", None, std::sync::Arc::new(Host::open()))
        };
        refused("is not a network namespace", || plug(path).plug(&vf))?;
        refused("is the host's", || plug(&own).plug(&vf))?;
        for path in ["sl-no-such-guest", "/no/such/guest"] {
            let result = plug(path).plug(&vf);
            ensure!(matches!(&result, Err(PlugError::Absent { .. })), "{result:?}");
            let result = plug(path).check();
            ensure!(matches!(&result, Err(PlugError::Absent { .. })), "{result:?}");
            done("unplugging", || plug(path).unplug(&vf, false))?;
        }
        Ok(())
    })?;
    ensure!(has(&host, "vf7")?, "it left");
    Ok(())
}
