//! The command line `sluice`: one request per call, printed as a table, JSON or YAML.
//!
//! Exit codes: 0 done, 1 refused or failed (also: a trace whose two sides differ, a doctor who found a problem), 2 wrong
//! usage.

pub(crate) mod client;
mod commands;
mod input;
mod output;
pub mod packet;
mod render;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

use output::Output;

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
    /// Delete a resource. Refused while others refer to it.
    Delete {
        /// switch, aclGroup or vnic.
        kind: String,
        /// Its name.
        name: String,
        /// Do it only if the resource is at this revision.
        #[arg(long, value_name = "N")]
        revision: Option<u64>,
    },
    /// Show resources with their status.
    Get {
        /// switch, aclGroup, vnic, or all.
        kind: String,
        /// Only this one.
        name: Option<String>,
        /// Print what is desired only, ready to be applied again (YAML unless -o json).
        #[arg(long)]
        spec: bool,
    },
    /// Show resources and each change of them, until interrupted.
    Watch {
        /// switch, aclGroup, vnic, or all.
        #[arg(default_value = "all")]
        kind: String,
    },
    /// Show counters of ports and rules.
    Stats {
        /// `vnic` for one vNIC.
        #[arg(value_parser = ["vnic"], requires = "name")]
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
    match runtime.block_on(commands::run(cli, &output)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            output.failure(&error);
            ExitCode::from(error.exit_code())
        }
    }
}
