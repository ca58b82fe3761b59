//! Each command: make the request, print the answer, say whether all is well.

use std::path::Path;

use clap::CommandFactory;
use sluice_proto::v1;
use sluice_proto::v1::sluice_client::SluiceClient;
use tonic::transport::Channel;

use super::client::{CliError, connect};
use super::output::Output;
use super::packet::{self, Builder};
use super::target::{self, Targets};
use super::{Cli, Command, Format, TraceArgs, input, render, vf, workers};
use crate::doctor;
use crate::json;
use crate::resource::{Key, Kind};

pub(super) type Client = SluiceClient<Channel>;

/// Runs a command. `false`: it worked, but what it found is bad.
///
/// Whatever can be refused without the daemon is refused before connecting to it.
pub(super) async fn run(cli: Cli, output: &Output) -> Result<bool, CliError> {
    let Cli { socket, command, .. } = cli;
    let client = || connect(&socket);
    match command {
        Command::Apply(args) => {
            let request = v1::ApplyRequest {
                config: Some(input::read_files(&args.file)?),
                expected_revisions: input::read_revisions(&args.revision)?,
            };
            render::applied(output, &client().await?.apply(request).await?.into_inner())
        }
        Command::Plan(args) => {
            let request = v1::PlanRequest {
                config: Some(input::read_files(&args.file)?),
                delete: input::read_references(&args.delete)?,
            };
            render::plan(output, &client().await?.plan(request).await?.into_inner())
        }
        Command::Delete { kind, names, revision } => {
            let keys = match target::targets(&kind, &names)? {
                Targets::Some(keys) => keys,
                Targets::All(_) => return Err(usage("say which: KIND NAME…, or KIND/NAME…")),
            };
            if revision.is_some() && keys.len() > 1 {
                return Err(usage("--revision goes with one resource only"));
            }
            delete(&mut client().await?, output, keys, revision).await
        }
        Command::Get { kind, names, spec } => {
            let targets = target::targets(&kind, &names)?;
            get(&mut client().await?, output, targets, spec).await
        }
        Command::Watch { kind } => {
            let kind = wanted(&kind)?;
            watch(&mut client().await?, output, kind).await
        }
        Command::Stats { kind, name } => {
            let vnic = kind.map(|kind| target::vnic(&kind, name.as_deref())).transpose()?;
            let request = v1::GetStatsRequest { vnic: vnic.unwrap_or_default() };
            render::stats(output, &client().await?.get_stats(request).await?.into_inner())
        }
        Command::Fdb { switch } => {
            let request = v1::GetFdbRequest { switch: switch.unwrap_or_default() };
            render::fdb(output, &client().await?.get_fdb(request).await?.into_inner())
        }
        Command::Drops => {
            render::drops(output, &client().await?.get_drops(v1::GetDropsRequest {}).await?.into_inner())
        }
        Command::Trace(args) => trace(&socket, output, args).await,
        Command::Doctor => examine(&socket, output).await,
        Command::Explain(vnic) => {
            let request = v1::ExplainRequest { vnic: vnic.name()? };
            render::vf::explained(output, &client().await?.explain(request).await?.into_inner())
        }
        Command::Revoke(args) => {
            let request = vf::revoke_request(&args)?;
            vf::revoke(&mut client().await?, output, request).await
        }
        Command::Release(vnic) => {
            let name = vnic.name()?;
            vf::release(&mut client().await?, output, name).await
        }
        Command::Acknowledge(args) => {
            let request = vf::acknowledge_request(&args)?;
            vf::acknowledge(&mut client().await?, output, request).await
        }
        Command::Probe { kind, name } => {
            let name = vf::uplink(&kind, name.as_deref())?;
            vf::probe(&mut client().await?, output, name).await
        }
        Command::Workers(args) => {
            let request = workers::request(args)?;
            workers::workers(&mut client().await?, output, request).await
        }
        Command::Version => {
            let request = v1::GetVersionRequest {};
            render::version(output, &client().await?.get_version(request).await?.into_inner())
        }
        Command::Completions { shell } => {
            output.completions(shell, &mut Cli::command());
            Ok(true)
        }
    }
}

async fn delete(
    client: &mut Client,
    output: &Output,
    keys: Vec<Key>,
    revision: Option<u64>,
) -> Result<bool, CliError> {
    let expected = keys.first().zip(revision).map(|(key, revision)| (key.to_string(), revision));
    let request = v1::DeleteRequest {
        resources: keys.iter().map(reference).collect(),
        expected_revisions: expected.into_iter().collect(),
    };
    let answer = client.delete(request).await?.into_inner();
    if !output.is_table() {
        output.message(&answer, "DeleteResponse")?;
        return Ok(true);
    }
    for key in keys {
        output.line(&format!("{key} deleted (revision {})", answer.revision));
    }
    Ok(true)
}

fn reference(key: &Key) -> v1::ResourceRef {
    v1::ResourceRef { kind: key.kind.singular().to_owned(), name: key.name.clone() }
}

fn usage(error: impl std::fmt::Display) -> CliError {
    CliError::Usage(error.to_string())
}

/// The kind as the API wants it: `all` is the empty text.
fn wanted(kind: &str) -> Result<String, CliError> {
    if kind == "all" {
        return Ok(String::new());
    }
    let parsed: Kind = kind.parse().map_err(usage)?;
    Ok(parsed.singular().to_owned())
}

/// The resources asked for, all of one moment.
async fn find(client: &mut Client, targets: &Targets) -> Result<v1::ListResponse, CliError> {
    let keys = match targets {
        Targets::All(kind) => {
            let kind = kind.map(Kind::singular).unwrap_or_default().to_owned();
            return Ok(client.list(v1::ListRequest { kind }).await?.into_inner());
        }
        Targets::Some(keys) => keys,
    };
    let mut answer = v1::ListResponse::default();
    if let [key] = keys.as_slice() {
        let request = v1::GetRequest { resource: Some(reference(key)) };
        answer.resources.extend(client.get(request).await?.into_inner().resource);
        return Ok(answer);
    }
    let all = client.list(v1::ListRequest::default()).await?.into_inner();
    answer.revision = all.revision;
    for key in keys {
        let found = all.resources.iter().find(|resource| render::key(resource).as_ref() == Some(key));
        match found {
            Some(found) => answer.resources.push(found.clone()),
            None => {
                // The daemon has the words for what is missing.
                let request = v1::GetRequest { resource: Some(reference(key)) };
                answer.resources.extend(client.get(request).await?.into_inner().resource);
            }
        }
    }
    Ok(answer)
}

async fn get(client: &mut Client, output: &Output, targets: Targets, spec: bool) -> Result<bool, CliError> {
    let answer = find(client, &targets).await?;
    let single = matches!(&targets, Targets::Some(keys) if keys.len() == 1);
    if spec {
        let mut config = v1::Config::default();
        for resource in answer.resources {
            match resource.spec {
                Some(v1::resource::Spec::Switch(spec)) => config.switches.push(spec),
                Some(v1::resource::Spec::AclGroup(spec)) => config.acl_groups.push(spec),
                Some(v1::resource::Spec::Vnic(spec)) => config.vnics.push(spec),
                None => {}
            }
        }
        output.value(&json::to_json(&config, "sluice.v1.Config"))?;
    } else if output.is_table() {
        render::resources(output, &answer.resources);
        if single {
            answer.resources.iter().for_each(|resource| render::vf::details(output, resource));
        }
    } else if single {
        let resource = answer.resources.into_iter().next().unwrap_or_default();
        output.value(&json::to_json(&resource, "sluice.v1.Resource"))?;
    } else {
        output.value(&json::to_json(&answer, "sluice.v1.ListResponse"))?;
    }
    Ok(true)
}

async fn watch(client: &mut Client, output: &Output, kind: String) -> Result<bool, CliError> {
    let request = v1::WatchRequest { kind };
    let mut stream = client.watch(request).await?.into_inner();
    while let Some(change) = stream.message().await? {
        if output.is_table() {
            render::change(output, &change);
        } else {
            if output.format == Format::Yaml {
                output.line("---");
            }
            output.value(&json::to_json(&change, "sluice.v1.WatchResponse"))?;
        }
    }
    Ok(true)
}

async fn trace(socket: &Path, output: &Output, args: TraceArgs) -> Result<bool, CliError> {
    let port = match (&args.vnic, &args.port) {
        (Some(vnic), _) => format!("vnic/{vnic}"),
        (None, Some(port)) => port.clone(),
        (None, None) => return Err(usage("give --vnic NAME or --port PORT")),
    };
    let given = match (&args.hex, &args.pcap) {
        (Some(hex), _) => Some(vec![packet::from_hex(hex)?]),
        (None, Some(path)) => Some(packet::from_pcap(path)?),
        (None, None) if args.words.is_empty() => {
            return Err(usage(
                "give a packet: --hex BYTES, --pcap FILE, or words such as dstIp=10.0.0.2 dstPort=80",
            ));
        }
        (None, None) => None,
    };
    let client = &mut connect(socket).await?;
    let frames = match given {
        Some(frames) => frames,
        None => vec![build(client, args.vnic.as_deref(), &args.words).await?],
    };
    let mut well = true;
    for frame in frames {
        let answer = client.trace(v1::TraceRequest { port: port.clone(), frame }).await?.into_inner();
        well &= answer.agree;
        render::trace(output, &port, &answer)?;
    }
    Ok(well)
}

/// Builds a frame whose source is the vNIC unless the words say otherwise.
async fn build(client: &mut Client, vnic: Option<&str>, words: &[String]) -> Result<Vec<u8>, CliError> {
    let mut builder = Builder::default();
    if let Some(vnic) = vnic {
        let resource = Some(v1::ResourceRef { kind: "vnic".to_owned(), name: vnic.to_owned() });
        let found = client.get(v1::GetRequest { resource }).await?.into_inner().resource;
        if let Some(v1::resource::Spec::Vnic(spec)) = found.and_then(|resource| resource.spec) {
            builder.src_mac = spec.mac.parse().unwrap_or_default();
            let ips = spec.policy.map(|policy| policy.ip_guard).unwrap_or_default();
            builder.own_ips = ips.iter().filter_map(|ip| ip.parse().ok()).collect();
        }
    }
    for word in words {
        builder.set(word)?;
    }
    Ok(builder.build()?)
}

async fn examine(socket: &Path, output: &Output) -> Result<bool, CliError> {
    let answer = match connect(socket).await {
        Ok(mut client) => client.doctor(v1::DoctorRequest {}).await?.into_inner(),
        Err(error) => {
            let mut findings = doctor::host(None);
            findings.push(doctor::finding(
                v1::finding::Level::Problem,
                "daemon",
                error.to_string(),
                "start it, and look at its log: sluiced --state-dir DIR --socket PATH",
            ));
            v1::DoctorResponse { findings }
        }
    };
    render::doctor(output, &answer)
}
