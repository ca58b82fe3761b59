//! The daemon `sluiced`: puts store, engine, reconciler and server together, and takes them down again.
//!
//! Ending, by signal or by force, leaves the data plane as it is; the next start adopts it. Only `--purge` removes it.

mod paths;
mod privileges;

use std::io::{self, IsTerminal};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use clap::Parser;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use sluice_kernel::{Engine, EngineError, EngineOptions, LinkMonitor};
use sluice_policy::config::{Attachment, VhostMode, Vnic};
use sluice_user::vhost::port::remove_dead_socket;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use crate::convert::Spec;
use crate::core::{Core, View};
use crate::engine::{JointEngine, KernelEngine, UserEngine};
use crate::reconcile::{self, Handle, StartError};
use crate::server::{self, Api, Identity, ServeError, SocketError};
use crate::store::{State, Store, StoreError};
use crate::vf::fleet::Equipment;

pub use paths::{Paths, PathsError};
pub use privileges::PrivilegeError;
use privileges::Role;

/// How long a wait for interface events lasts; an ending daemon is noticed this late.
const MONITOR_WAIT: Duration = Duration::from_secs(1);
/// How long open requests may take to end.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(2);

/// The software switch of a hypervisor: forwards between VM interfaces under policy, in eBPF.
#[derive(Debug, Parser)]
#[command(name = "sluiced", version)]
pub struct Args {
    /// Directory of the desired state; it names the instance.
    #[arg(long, value_name = "DIR", default_value = "/var/lib/sluice")]
    pub state_dir: PathBuf,
    /// Unix socket to serve the API on.
    #[arg(long, value_name = "PATH", default_value = "/run/sluice/sluiced.sock")]
    pub socket: PathBuf,
    /// YAML file with rarely needed settings: pinDir, runtimeDir, socketMode, log.
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Detach everything, remove pins and the runtime copy of this instance, and exit. The state directory stays.
    #[arg(long)]
    pub purge: bool,
}

/// Why the daemon did not start or ended early.
#[derive(Debug, thiserror::Error)]
pub enum DaemonError {
    /// Settings or directories.
    #[error(transparent)]
    Paths(#[from] PathsError),
    /// The store.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The engine.
    #[error("engine: {0}")]
    Engine(#[from] EngineError),
    /// The socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Capabilities.
    #[error(transparent)]
    Privileges(#[from] PrivilegeError),
    /// Threads, signals, the runtime.
    #[error("{operation}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        source: io::Error,
    },
    /// The thread that owns the engine ended.
    #[error("the reconciler ended unexpectedly; its last words are in the log above")]
    Reconciler,
    /// The server ended.
    #[error(transparent)]
    Server(#[from] ServeError),
}

fn io_error(operation: &'static str) -> impl FnOnce(io::Error) -> DaemonError {
    move |source| DaemonError::Io { operation, source }
}

/// Runs the daemon until a signal ends it.
///
/// # Errors
/// [`DaemonError`].
pub fn run(args: &Args) -> Result<(), DaemonError> {
    let paths = Paths::new(&args.state_dir, args.config.as_deref())?;
    init_log(paths.log.as_deref());
    if let Err(error) = raise_descriptor_limit() {
        tracing::warn!("raising the limit of open files: {error}; many vhost-user ports may not fit");
    }
    if args.purge {
        return purge(&paths);
    }
    // The locks come first: a second daemon must not touch anything.
    let (store, state, origin) = Store::open(&paths.state_dir, &paths.runtime_dir)?;
    let options = EngineOptions { pin_dir: paths.pin_dir.clone() };
    let make = move || -> Result<Core, DaemonError> {
        let engine = KernelEngine::open(&options)?;
        privileges::drop_for_thread(Role::Engine)?;
        let engine = JointEngine::new(engine, UserEngine::default());
        Ok(Core::new(store, state, origin, Box::new(engine)))
    };
    let vfs = Equipment::of_host(paths.state_dir.clone(), paths.runtime_dir.clone());
    let (handle, reconciler) = reconcile::start(make, Some(vfs)).map_err(|error| match error {
        StartError::Make(error) => error,
        StartError::Thread(source) => DaemonError::Io { operation: "starting the reconciler", source },
    })?;
    privileges::drop_for_thread(Role::Other)?;
    watch_links(handle.clone())?;
    let served = serve(args, &paths, handle.clone());
    handle.stop();
    if reconciler.join().is_err() {
        tracing::error!("the reconciler panicked");
    }
    served
}

/// Takes all open files that this process may have: guests' queues need several each, and the usual soft limit is
/// for programs that call `select`.
fn raise_descriptor_limit() -> nix::Result<()> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard { setrlimit(Resource::RLIMIT_NOFILE, hard, hard) } else { Ok(()) }
}

fn init_log(filter: Option<&str>) {
    let filter =
        std::env::var("SLUICE_LOG").ok().or(filter.map(str::to_owned)).unwrap_or_else(|| "info".to_owned());
    let format = tracing_subscriber::fmt().with_env_filter(filter).with_writer(io::stderr);
    let format = format.with_target(false).with_ansi(io::stderr().is_terminal());
    // Fails only if a log is there already, as in tests.
    let _ = format.try_init();
}

/// Tells the reconciler of interface events, from a thread of its own.
fn watch_links(handle: Handle) -> Result<(), DaemonError> {
    let monitor = LinkMonitor::open()?;
    let watch = move || {
        loop {
            match monitor.next_timeout(MONITOR_WAIT) {
                Ok(events) => {
                    if !handle.links(events) {
                        return;
                    }
                }
                Err(error) => {
                    tracing::error!("interface events: {error}");
                    thread::sleep(MONITOR_WAIT);
                }
            }
        }
    };
    thread::Builder::new()
        .name("links".to_owned())
        .spawn(watch)
        .map_err(io_error("starting the link monitor"))?;
    Ok(())
}

fn serve(args: &Args, paths: &Paths, handle: Handle) -> Result<(), DaemonError> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .thread_name("api")
        .enable_all()
        .build()
        .map_err(io_error("starting the runtime"))?;
    let result = runtime.block_on(serve_until_signal(args, paths, handle));
    runtime.shutdown_timeout(SHUTDOWN_GRACE);
    result
}

async fn serve_until_signal(args: &Args, paths: &Paths, handle: Handle) -> Result<(), DaemonError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(io_error("waiting for signals"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(io_error("waiting for signals"))?;
    let listener = server::bind(&args.socket, paths.socket_mode)?;
    let mut view = handle.view();
    let identity = Identity {
        instance: paths.instance.clone(),
        state_dir: paths.state_dir.clone(),
        runtime_dir: paths.runtime_dir.clone(),
        pin_dir: paths.pin_dir.clone(),
        socket: args.socket.clone(),
    };
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let server = server::serve(listener, Api::new(handle, identity), async {
        // Either a signal came or this function ended; both mean stop.
        let _ = stopped.await;
    });
    tokio::pin!(server);
    tracing::info!("serving on {}", args.socket.display());
    // There may be no service manager to hear it.
    let _ = sd_notify::notify(&[sd_notify::NotifyState::Ready]);
    let name = tokio::select! {
        result = &mut server => return Ok(result?),
        // Nothing works without it: whoever started us starts us again.
        () = ended(&mut view) => return Err(DaemonError::Reconciler),
        _ = terminate.recv() => "SIGTERM",
        _ = interrupt.recv() => "SIGINT",
    };
    tracing::info!("{name}: stopping; the data plane stays as it is");
    let _ = stop.send(());
    // Watchers never end of themselves.
    match tokio::time::timeout(SHUTDOWN_GRACE, &mut server).await {
        Ok(result) => result?,
        Err(_) => tracing::info!("open streams were cut"),
    }
    if let Err(error) = std::fs::remove_file(&args.socket) {
        tracing::warn!("removing {}: {error}", args.socket.display());
    }
    Ok(())
}

/// Waits for the end of the reconciler's thread.
async fn ended(view: &mut watch::Receiver<Arc<View>>) {
    while view.changed().await.is_ok() {}
}

/// Removes programs, links, maps, sockets of guests and the runtime directory of the instance.
fn purge(paths: &Paths) -> Result<(), DaemonError> {
    // Holds the locks until everything is removed.
    let (_store, state, _origin) = Store::open(&paths.state_dir, &paths.runtime_dir)?;
    let (engine, _) = Engine::open(&EngineOptions { pin_dir: paths.pin_dir.clone() })?;
    engine.detach_all()?;
    for path in server_sockets(&state) {
        // A daemon that was killed leaves them; of one that is not ours, somebody listens there.
        if let Err(error) = remove_dead_socket(path) {
            tracing::warn!("leaving {} where it is: {error}", path.display());
        }
    }
    std::fs::remove_dir_all(&paths.runtime_dir).map_err(io_error("removing the runtime directory"))?;
    tracing::info!("detached everything and removed {}", paths.pin_dir.display());
    Ok(())
}

/// Where the daemon listens for VMMs.
fn server_sockets(state: &State) -> impl Iterator<Item = &Path> {
    state.resources.values().filter_map(|entry| match entry.spec.as_ref() {
        Spec::Vnic(Vnic { attach: Attachment::VhostUser(rings), .. }) if rings.mode == VhostMode::Server => {
            Some(Path::new(&rings.path))
        }
        Spec::Vnic(_) | Spec::Switch(_) | Spec::AclGroup(_) => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_open_files_that_are_allowed_are_taken() {
        let limits = || getrlimit(Resource::RLIMIT_NOFILE).expect("the process has limits");
        let (_, hard) = limits();
        setrlimit(Resource::RLIMIT_NOFILE, hard - 1, hard).expect("anyone may have less");
        raise_descriptor_limit().expect("anyone may have what is allowed");
        assert_eq!(limits(), (hard, hard));
    }
}
