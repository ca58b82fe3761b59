//! A disk that can be full, for tests: a small tmpfs in a mount namespace of its own.

use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};

/// Enough for two files of redb, and soon filled.
const SIZE: &str = "size=16m";

/// The disk; lives as long as the thread that made it.
pub(crate) struct SmallDisk {
    dir: PathBuf,
}

impl SmallDisk {
    /// Calls `test` with a disk, in a thread of its own. Needs root.
    #[expect(clippy::print_stderr, reason = "a skipped test says so")]
    pub(crate) fn with(test: impl FnOnce(&SmallDisk) + Send) {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("skipped: mounting a small disk needs root");
            return;
        }
        let mountpoint = tempfile::tempdir().expect("a directory");
        let dir = mountpoint.path().to_owned();
        thread::scope(|scope| {
            scope.spawn(move || {
                unshare(CloneFlags::CLONE_NEWNS).expect("a mount namespace");
                let none = None::<&str>;
                mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private");
                mount(Some("tmpfs"), &dir, Some("tmpfs"), MsFlags::empty(), Some(SIZE)).expect("mounted");
                test(&SmallDisk { dir });
            });
        });
    }

    /// Where it is, in this thread's eyes.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes until nothing more fits.
    pub(crate) fn fill(&self) {
        let mut file = File::create(self.filler()).expect("a file");
        for size in [1 << 16, 1] {
            let bytes = vec![1; size];
            let error = loop {
                if let Err(error) = file.write_all(&bytes) {
                    break error;
                }
            };
            assert_eq!(error.kind(), ErrorKind::StorageFull, "{error}");
        }
    }

    /// Makes room again.
    pub(crate) fn free(&self) {
        fs::remove_file(self.filler()).expect("it was filled");
    }

    fn filler(&self) -> PathBuf {
        self.dir.join("filler")
    }
}
