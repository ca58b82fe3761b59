//! A VF of an igb port goes into a QEMU in the lab by VFIO, and out of it again. The machine has no system and stands still,
//! so it is a guest that clings.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use sluice_control::vf::plug::qmp::Qmp;
use sluice_control::vf::plug::{Plug, Progress};
use sluice_eswitch::contract::{ErrorClass, Eswitch};
use sluice_tests::lab_guest::PATIENCE;
use sluice_tests::tools::Running;
use sluice_tests::wait_until;

use super::{VF, done, driver, is_active, open_vf, refused, run};

struct Machine {
    process: Running,
    folder: tempfile::TempDir,
}

impl Machine {
    fn start() -> Result<Machine> {
        let folder = tempfile::tempdir()?;
        let socket = folder.path().join("qmp");
        let process = Command::new("qemu-system-x86_64")
            .args(["-machine", "q35", "-accel", "tcg", "-display", "none", "-nodefaults", "-S", "-m", "64"])
            .args(["-device", "pcie-root-port,id=rp0,chassis=1"])
            .args(["-qmp", &format!("unix:{},server=on,wait=off", socket.display())])
            .stdin(Stdio::null())
            .spawn()
            .context("starting QEMU")?;
        let machine = Machine { process: Running(process), folder };
        wait_until("QEMU listens", PATIENCE, || {
            UnixStream::connect(machine.socket())?;
            Ok(Some(()))
        })?;
        Ok(machine)
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("qmp")
    }

    fn plug(&self) -> Result<Qmp> {
        let socket = self.socket();
        Ok(Qmp::new(socket.to_str().context("a path")?, "web-vf", Some("rp0"), None))
    }
}

#[test]
#[ignore = "runs in the SR-IOV lab"]
fn a_vf_goes_into_a_vm_and_out_of_it() -> Result<()> {
    run("modprobe", "vfio-pci")?;
    let (mut eswitch, vf) = open_vf()?;
    let machine = Machine::start()?;
    let mut plug = machine.plug()?;
    plug.check()?;
    ensure!(!plug.is_active(&vf)?, "nobody has it");
    // It was opened for the host's own use.
    ensure!(driver(&vf).as_deref() == Some("igbvf"), "{:?}", driver(&vf));
    for _ in 0..2 {
        done("plugging", || plug.plug(&vf))?;
    }
    ensure!(driver(&vf).as_deref() == Some("vfio-pci"), "{:?}", driver(&vf));
    is_active(&mut plug, &vf)?;
    // A restarted daemon sees at the first look that the guest has it.
    let mut plug = machine.plug()?;
    ensure!(plug.is_active(&vf)?, "QEMU has it");
    done("plugging again", || plug.plug(&vf))?;
    drop(plug);

    // Another machine cannot have it too, and letting that one go takes nothing from this.
    let other = Machine::start()?;
    let mut second = other.plug()?;
    refused("QEMU does not plug web-vf", || second.plug(&vf))?;
    drop((second, other));

    let mut plug = machine.plug()?;
    ensure!(plug.unplug(&vf, false)? == Progress::Pending, "the guest is asked");
    refused("does not let go of web-vf", || plug.unplug(&vf, true))?;
    let error = eswitch.disable(VF).expect_err("igb closes a VF by its driver, which QEMU holds");
    ensure!(error.class() == ErrorClass::Passing, "{error}");

    let mut process = machine.process;
    process.0.kill()?;
    process.0.wait()?;
    done("unplugging from a machine that has ended", || plug.unplug(&vf, true))?;
    ensure!(!plug.is_active(&vf)?, "nobody has it");
    eswitch.unprogram(VF)?;
    ensure!(driver(&vf).is_none(), "{:?}", driver(&vf));
    done("unplugging what is closed", || plug.unplug(&vf, false))
}
