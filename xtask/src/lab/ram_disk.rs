//! RAM disks that guests boot from: busybox, an init script, modules of the kernel, and what else a guest needs.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use super::kernel::Kernel;
use crate::process::{find, output};
use crate::workspace;

/// A RAM disk's files, in a folder that is packed in the end.
pub(super) struct RamDisk {
    folder: PathBuf,
    busybox: PathBuf,
}

impl RamDisk {
    /// Begins one in a folder, with busybox and the script that is to be the guest's first process.
    pub(super) fn create(kernel: &Kernel, folder: &Path, init: &str) -> Result<RamDisk> {
        let disk = RamDisk { folder: folder.to_owned(), busybox: kernel.folder.join("busybox") };
        disk.add(&disk.busybox, "bin/busybox")?;
        let place = folder.join("init");
        fs::write(&place, init).context("making the RAM disk")?;
        fs::set_permissions(&place, fs::Permissions::from_mode(0o755)).context("making the RAM disk")?;
        Ok(disk)
    }

    /// Adds a file of this machine, under a path in the RAM disk.
    pub(super) fn add(&self, file: &Path, place: &str) -> Result<()> {
        let place = self.place(place)?;
        fs::copy(file, place).with_context(|| format!("copying {} to the RAM disk", file.display()))?;
        Ok(())
    }

    /// Adds modules and what they need, as `modules/NUMBER.ko` in the order in which they are to be loaded.
    pub(super) fn add_modules(&self, kernel: &Kernel, names: &[&str]) -> Result<()> {
        let modprobe = find("modprobe").context("package kmod brings no modprobe")?;
        let mut modules: Vec<String> = Vec::new();
        for module in names {
            let needed = output(Command::new(&modprobe).arg("--dirname").arg(&kernel.folder).args([
                "--set-version",
                &kernel.release,
                "--show-depends",
                module,
            ]))
            .with_context(|| format!("kernel {} has no module {module}", kernel.release))?;
            // Lines are `insmod FILE` and, for what is built in, `builtin NAME`.
            for file in needed.lines().filter_map(|line| line.strip_prefix("insmod ")) {
                let file = file.trim().to_owned();
                if !modules.contains(&file) {
                    modules.push(file);
                }
            }
        }
        for (number, module) in modules.iter().enumerate() {
            let name = format!("modules/{number:03}.ko");
            if module.ends_with(".xz") {
                let plain = Command::new("xz").args(["--decompress", "--stdout", module]).output()?;
                if !plain.status.success() {
                    bail!("xz cannot read {module}: {}", String::from_utf8_lossy(&plain.stderr));
                }
                fs::write(self.place(&name)?, plain.stdout).context("making the RAM disk")?;
            } else {
                self.add(Path::new(module), &name)?;
            }
        }
        Ok(())
    }

    /// Where a file is to lie; its folders are made.
    fn place(&self, name: &str) -> Result<PathBuf> {
        let place = self.folder.join(name);
        let parent = place.parent().context("a file lies in a folder")?;
        fs::create_dir_all(parent).with_context(|| format!("making {}", parent.display()))?;
        Ok(place)
    }

    /// Packs it as the kernel wants it.
    pub(super) fn pack(&self, to: &Path) -> Result<()> {
        let mut folders = BTreeSet::new();
        let mut files = Vec::new();
        for file in workspace::files(&self.folder, &|_| true)? {
            let name = file.strip_prefix(&self.folder).context("a file of the RAM disk lies elsewhere")?;
            let above = name.ancestors().skip(1).filter(|folder| !folder.as_os_str().is_empty());
            folders.extend(above.map(|folder| folder.display().to_string()));
            files.push(name.display().to_string());
        }
        // A file's folders must come before it, and a folder's own before that.
        let names: Vec<String> = folders.into_iter().chain(files).collect();
        let mut packer = Command::new(&self.busybox)
            .args(["cpio", "-o", "-H", "newc"])
            .current_dir(&self.folder)
            .stdin(Stdio::piped())
            .stdout(File::create(to).context("making the RAM disk")?)
            .stderr(Stdio::null())
            .spawn()
            .context("running busybox")?;
        packer.stdin.take().context("cpio has no input")?.write_all((names.join("\n") + "\n").as_bytes())?;
        let status = packer.wait().context("waiting for cpio")?;
        if !status.success() {
            bail!("busybox cannot pack the RAM disk: {status}");
        }
        Ok(())
    }
}
