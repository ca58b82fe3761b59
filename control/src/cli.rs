//! The command line `sluice`: one request per call, printed as a table, JSON or YAML.
//!
//! Exit codes: 0 done, 1 refused or failed (also: a trace whose two sides differ, a doctor who found a problem, a VF that
//! is still held after a revoke, a ticket that nobody awaits), 2 wrong usage.

pub(crate) mod client;
mod commands;
mod input;
mod output;
pub mod packet;
mod render;
mod target;
#[cfg(test)]
mod tests;
mod vf;
mod workers;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

use output::{Intent, Output};
use target::{KindWord, VnicArgs};
use workers::WorkersArgs;

/// Controls the software switch `sluiced` of this host.
#[derive(Debug, Parser)]
#[command(name = "sluice", version)]
pub struct Cli {
    /// Unix socket of the daemon.
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = "SLUICE_SOCKET",
        default_value = "/run/sluice/sluiced.sock"
    )]
    socket: PathBuf,
    /// How to print.
    #[arg(short, long, global = true, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

/// How answers are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// The JSON mapping of the API's answer.
    Json,
    /// The same as YAML.
    Yaml,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Create or replace resources: all of them, or none.
    Apply(FileArgs),
    /// Show what an apply would change.
    Plan(PlanArgs),
    /// Delete resources: all of them, or none. Refused while others refer to one.
    Delete {
        /// Kind of the resources, or the first of them as KIND/NAME.
        #[arg(value_parser = KindWord(&["switch", "aclGroup", "vnic"]))]
        kind: String,
        /// Their names, or further KIND/NAME.
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        /// Do it only if the resource, just one, is at this revision.
        #[arg(long, value_name = "N")]
        revision: Option<u64>,
    },
    /// Show resources with their status; of a single one, also its path or its NIC.
    Get {
        /// Kind of the resources, all of them, or the first as KIND/NAME.
        #[arg(value_parser = KindWord(&["switch", "aclGroup", "vnic", "all"]))]
        kind: String,
        /// Only these; or further KIND/NAME.
        #[arg(value_name = "NAME")]
        names: Vec<String>,
        /// Print what is desired only, ready to be applied again (YAML unless -o json).
        #[arg(long)]
        spec: bool,
    },
    /// Show resources and each change of them, until interrupted.
    Watch {
        /// Only this kind.
        #[arg(default_value = "all", value_parser = KindWord(&["switch", "aclGroup", "vnic", "all"]))]
        kind: String,
    },
    /// Show counters of ports, rules and VFs.
    Stats {
        /// `vnic` for one vNIC, or the whole as vnic/NAME.
        #[arg(value_parser = KindWord(&["vnic"]))]
        kind: Option<String>,
        /// Its name.
        name: Option<String>,
    },
    /// Show the addresses that switches know.
    Fdb {
        /// Only this switch.
        #[arg(long, value_name = "NAME")]
        switch: Option<String>,
    },
    /// Show why packets were dropped.
    Drops,
    /// Take a packet through the stages, in the oracle and in the live tables, without sending it.
    Trace(TraceArgs),
    /// Examine the host, the daemon and every port.
    Doctor,
    /// Say which path a vNIC's traffic takes, since when, and why not the other.
    Explain(VnicArgs),
    /// Take a vNIC's VF away, and keep it on its software path for a while. Returns when it is there.
    Revoke(RevokeArgs),
    /// End what `revoke` began, and any waiting after grants that came to nothing.
    Release(VnicArgs),
    /// Answer what is asked of an orchestrator (`attach: {external: {}}`; `sluice get vnic NAME` shows what, and the
    /// ticket).
    Acknowledge(AcknowledgeArgs),
    /// Find out what the NIC of an uplink enforces, by sending frames from a spare VF in a namespace of its own.
    Probe {
        /// `uplink`, or the whole as uplink/SWITCH.
        #[arg(value_parser = KindWord(&["uplink"]))]
        kind: String,
        /// Its switch; or its interface, if just one switch has it.
        #[arg(value_name = "SWITCH")]
        name: Option<String>,
    },
    /// Show the userspace engine's workers and the queues that each serves, or change where they are.
    Workers(WorkersArgs),
    /// Show versions.
    Version,
    /// Print a completion script.
    Completions {
        /// For this shell.
        shell: clap_complete::Shell,
    },
}

#[derive(Debug, ClapArgs)]
struct FileArgs {
    /// YAML or JSON file; `-` is standard input. May be given more than once.
    #[arg(short, long = "file", value_name = "FILE", required = true)]
    file: Vec<PathBuf>,
    /// A resource must be at this revision, as in `vnics/vm1=7`; 0: it must not exist.
    #[arg(long, value_name = "RESOURCE=N")]
    revision: Vec<String>,
}

#[derive(Debug, ClapArgs)]
struct PlanArgs {
    /// YAML or JSON file; `-` is standard input. May be given more than once.
    #[arg(short, long = "file", value_name = "FILE", required_unless_present = "delete")]
    file: Vec<PathBuf>,
    /// Show what deleting this would change, as in `vnics/vm1`. May be given more than once.
    #[arg(long, value_name = "RESOURCE")]
    delete: Vec<String>,
}

#[derive(Debug, ClapArgs)]
struct RevokeArgs {
    #[command(flatten)]
    vnic: VnicArgs,
    /// Why, for the events and `sluice explain`.
    #[arg(long, value_name = "TEXT", default_value = "")]
    reason: String,
    /// How long it stays without a VF; 0: until `sluice release`. A restart of the daemon ends it too. A minute is time to
    /// begin what needs the VF gone, and nobody has to remember to release it.
    #[arg(long, value_name = "SECONDS", default_value_t = 60)]
    hold: u32,
}

#[derive(Debug, ClapArgs)]
struct AcknowledgeArgs {
    #[command(flatten)]
    vnic: VnicArgs,
    /// Ticket of the request.
    #[arg(long, value_name = "N")]
    ticket: u64,
    #[command(flatten)]
    outcome: OutcomeArgs,
    /// Packets lost in this transition, if you have seen it.
    #[arg(long, value_name = "N", default_value_t = 0)]
    lost: u64,
    /// Packets seen twice.
    #[arg(long, value_name = "N", default_value_t = 0)]
    duplicated: u64,
    /// Packets out of order.
    #[arg(long, value_name = "N", default_value_t = 0)]
    reordered: u64,
}

#[derive(Debug, ClapArgs)]
#[group(required = true, multiple = false)]
struct OutcomeArgs {
    /// It is done.
    #[arg(long)]
    done: bool,
    /// It cannot be done, and why.
    #[arg(long, value_name = "TEXT")]
    refused: Option<String>,
}

#[derive(Debug, ClapArgs)]
struct TraceArgs {
    /// The vNIC whose VM sends the packet.
    #[arg(long, value_name = "NAME", required_unless_present = "port", conflicts_with = "port")]
    vnic: Option<String>,
    /// Any port: uplink/SWITCH, internal/SWITCH or vnic/NAME.
    #[arg(long, value_name = "PORT")]
    port: Option<String>,
    /// The frame, in hexadecimal, from the destination MAC on.
    #[arg(long, value_name = "BYTES", conflicts_with_all = ["pcap", "words"])]
    hex: Option<String>,
    /// A capture file; every frame in it is traced.
    #[arg(long, value_name = "FILE", conflicts_with = "words")]
    pcap: Option<PathBuf>,
    /// Build a frame: dstMac=… dstIp=… ipProto=tcp dstPort=80 vlan=10 ethertype=arp and so on. The vNIC's own addresses
    /// are the source unless given.
    #[arg(value_name = "KEY=VALUE")]
    words: Vec<String>,
}

impl Command {
    /// What a refusal of it means.
    fn intent(&self) -> Intent {
        match self {
            Command::Apply(_) | Command::Delete { .. } => Intent::Change,
            Command::Plan(_) => Intent::Plan,
            _ => Intent::Ask,
        }
    }
}

/// Runs a command.
pub fn run(cli: Cli) -> ExitCode {
    let output = Output::new(cli.output);
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            output.error(&format!("starting: {error}"));
            return ExitCode::from(1);
        }
    };
    let intent = cli.command.intent();
    match runtime.block_on(commands::run(cli, &output)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            output.failure(&error, intent);
            ExitCode::from(error.exit_code())
        }
    }
}
