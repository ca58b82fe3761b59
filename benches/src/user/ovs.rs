//! Open vSwitch with DPDK, as Debian builds it, in a folder and a namespace of its own: no service of the system is touched.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use sluice_tests::Netns;
use sluice_tests::netns::check;

use super::policy::Rules;
use super::process::{Program, command};
use super::testpmd::DPDK;
use super::{GENERATOR_CPU, sockets, switch_cpu};

const BRIDGE: &str = "br0";
/// How long it may take to begin.
const PATIENCE: Duration = Duration::from_secs(30);

/// A switch with two ports and one polling thread.
#[derive(Debug)]
pub(crate) struct Ovs {
    // Dropped in this order: first the switch, then its database.
    _switch: Program,
    _database: Program,
    root: PathBuf,
    folder: PathBuf,
}

impl Ovs {
    /// Between guests' rings, with these flows, or as a learning switch.
    pub(crate) fn between_rings(netns: &Netns, folder: &Path, rules: Option<&Rules>) -> Result<Ovs> {
        let ovs = Ovs::start(netns, folder, true)?;
        for (number, socket) in (1..).zip(sockets(folder)) {
            let server = format!("options:vhost-server-path={}", socket.display());
            ovs.add_port(&format!("v{number}"), number, &["type=dpdkvhostuserclient", &server])?;
        }
        ovs.program(rules)?;
        Ok(ovs)
    }

    /// Between AF_XDP sockets.
    pub(crate) fn between_sockets(
        netns: &Netns,
        folder: &Path,
        interfaces: [&str; 2],
        rules: Option<&Rules>,
    ) -> Result<Ovs> {
        let ovs = Ovs::start(netns, folder, false)?;
        for (number, interface) in (1..).zip(interfaces) {
            ovs.add_port(interface, number, &["type=afxdp"])?;
        }
        ovs.program(rules)?;
        Ok(ovs)
    }

    fn start(netns: &Netns, folder: &Path, has_dpdk: bool) -> Result<Ovs> {
        let root = unpacked()?;
        let database = folder.join("conf.db");
        // A round begins with an empty one.
        let _ = std::fs::remove_file(&database);
        let tool = |name: &str| root.join(name);
        let schema = tool("usr/share/openvswitch/vswitch.ovsschema");
        check(Command::new(tool("usr/bin/ovsdb-tool")).arg("create").arg(&database).arg(schema))?;
        let remote = format!("unix:{}", folder.join("db.sock").display());
        let mut server = own(netns, folder, &tool("usr/sbin/ovsdb-server"));
        server.arg(&database).arg(format!("--remote=p{remote}")).arg("--unixctl=db.ctl");
        let database = Program::start("ovsdb-server", folder, server)?;
        wait_for(&folder.join("db.sock"))?;
        let mut switch = own(netns, folder, &tool("usr/lib/openvswitch-switch-dpdk/ovs-vswitchd-dpdk"));
        switch.arg(&remote).arg("--unixctl=switch.ctl").arg("--pidfile=switch.pid");
        let settings = [
            format!("other_config:pmd-cpu-mask={:#x}", 1_u64 << switch_cpu()?),
            format!("other_config:dpdk-lcore-mask={:#x}", 1_u64 << GENERATOR_CPU),
            format!("other_config:dpdk-extra={}", DPDK.join(" ")),
            format!("other_config:dpdk-init={has_dpdk}"),
        ];
        let settings: Vec<&str> = settings.iter().map(String::as_str).collect();
        let ovs = Ovs {
            _switch: Program::start("ovs-vswitchd", folder, switch)?,
            _database: database,
            root,
            folder: folder.to_owned(),
        };
        ovs.configure(&["--no-wait", "init"])?;
        ovs.configure(&[&["--no-wait", "set", "Open_vSwitch", "."], &settings[..]].concat())?;
        ovs.configure(&["add-br", BRIDGE, "--", "set", "bridge", BRIDGE, "datapath_type=netdev"])?;
        Ok(ovs)
    }

    fn add_port(&self, name: &str, number: u16, settings: &[&str]) -> Result<()> {
        let request = format!("ofport_request={number}");
        let words = ["add-port", BRIDGE, name, "--", "set", "Interface", name, &request];
        self.configure(&[&words, settings].concat())?;
        let error = self.configure(&["get", "Interface", name, "error"])?;
        ensure!(error.trim() == "[]", "Open vSwitch cannot serve {name}: {error}");
        Ok(())
    }

    fn program(&self, rules: Option<&Rules>) -> Result<()> {
        let Some(rules) = rules else { return Ok(()) };
        let file = self.folder.join("flows");
        // Its flow that has everything switched is replaced by one that drops.
        std::fs::write(&file, rules.openflow()?).context("writing flows")?;
        let bridge = format!("unix:{}", self.folder.join(format!("{BRIDGE}.mgmt")).display());
        check(
            Command::new(self.root.join("usr/bin/ovs-ofctl"))
                .args(["-O", "OpenFlow13", "add-flows"])
                .arg(bridge)
                .arg(file),
        )?;
        Ok(())
    }

    fn configure(&self, words: &[&str]) -> Result<String> {
        let database = format!("--db=unix:{}", self.folder.join("db.sock").display());
        let mut command = Command::new(self.root.join("usr/bin/ovs-vsctl"));
        check(command.args([&database, "--timeout=30"]).args(words))
    }
}

/// Where `cargo xtask bench` has put Debian's packages.
fn unpacked() -> Result<PathBuf> {
    let root = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../target/tools/openvswitch"));
    ensure!(
        root.exists(),
        "Open vSwitch is not in {}: run `cargo xtask bench`, which gets it",
        root.display()
    );
    Ok(root.canonicalize()?)
}

/// A program of Open vSwitch that keeps everything in `folder`.
fn own(netns: &Netns, folder: &Path, program: &Path) -> Command {
    let mut command = command(netns, &program.display().to_string());
    for name in ["OVS_RUNDIR", "OVS_LOGDIR", "OVS_DBDIR", "OVS_SYSCONFDIR"] {
        command.env(name, folder);
    }
    command.current_dir(folder);
    command
}

fn wait_for(file: &Path) -> Result<()> {
    let end = Instant::now() + PATIENCE;
    while !file.exists() {
        if Instant::now() > end {
            bail!("{} does not appear", file.display());
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
