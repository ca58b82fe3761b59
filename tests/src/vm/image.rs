//! What guests boot: made by `cargo xtask guest-image`, which says where it is.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use anyhow::{Context, Result, anyhow, ensure};

/// A kernel, and the RAM disk with everything else.
#[derive(Clone, Debug)]
pub(super) struct Image {
    pub(super) kernel: PathBuf,
    pub(super) ram_disk: PathBuf,
}

impl Image {
    /// The image, made once per process.
    ///
    /// # Errors
    /// When it cannot be made.
    pub(super) fn find() -> Result<Image> {
        static IMAGE: OnceLock<Result<Image, String>> = OnceLock::new();
        IMAGE
            .get_or_init(|| Image::make().map_err(|error| format!("{error:#}")))
            .clone()
            .map_err(|error| anyhow!(error))
    }

    fn make() -> Result<Image> {
        // `cargo xtask test` says where its own program is, which spares us waiting for cargo's locks.
        let mut command = match std::env::var_os("SLUICE_XTASK") {
            Some(program) => Command::new(program),
            None => {
                let mut command = Command::new("cargo");
                command.args(["--quiet", "xtask"]);
                command
            }
        };
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("the tests lie in no workspace")?;
        let output = command
            .arg("guest-image")
            .current_dir(root)
            .output()
            .context("running `cargo xtask guest-image`")?;
        ensure!(
            output.status.success(),
            "`cargo xtask guest-image` failed: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let mut lines = said.lines().map(PathBuf::from);
        match (lines.next(), lines.next()) {
            (Some(kernel), Some(ram_disk)) => Ok(Image { kernel, ram_disk }),
            _ => Err(anyhow!("`cargo xtask guest-image` named no image: {said:?}")),
        }
    }
}
