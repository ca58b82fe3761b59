//! The commands about VFs: revoke, release, acknowledge, probe.

use sluice_proto::v1;
use sluice_proto::v1::acknowledge_vf_request::Outcome;
use sluice_proto::v1::resource::Spec;

use super::client::CliError;
use super::commands::Client;
use super::output::Output;
use super::{AcknowledgeArgs, RevokeArgs, render, target};
use crate::resource::Kind;

pub(super) fn revoke_request(args: &RevokeArgs) -> Result<v1::RevokeVfRequest, CliError> {
    Ok(v1::RevokeVfRequest { vnic: args.vnic.name()?, reason: args.reason.clone(), hold_seconds: args.hold })
}

/// `false`: it still has its VF.
pub(super) async fn revoke(
    client: &mut Client,
    output: &Output,
    request: v1::RevokeVfRequest,
) -> Result<bool, CliError> {
    let vnic = request.vnic.clone();
    let answer = client.revoke_vf(request).await?.into_inner();
    let path = answer.path.clone().unwrap_or_default();
    if output.is_table() {
        render::vf::headline(output, &vnic, &path);
    } else {
        output.message(&answer, "RevokeVfResponse")?;
    }
    Ok(path.path() == v1::path_status::Path::Software)
}

pub(super) async fn release(client: &mut Client, output: &Output, vnic: String) -> Result<bool, CliError> {
    let answer = client.release_vf(v1::ReleaseVfRequest { vnic: vnic.clone() }).await?.into_inner();
    if output.is_table() {
        render::vf::headline(output, &vnic, &answer.path.unwrap_or_default());
    } else {
        output.message(&answer, "ReleaseVfResponse")?;
    }
    Ok(true)
}

pub(super) fn acknowledge_request(args: &AcknowledgeArgs) -> Result<v1::AcknowledgeVfRequest, CliError> {
    let outcome = if args.outcome.done { Outcome::Done } else { Outcome::Refused };
    Ok(v1::AcknowledgeVfRequest {
        vnic: args.vnic.name()?,
        ticket: args.ticket,
        outcome: outcome.into(),
        reason: args.outcome.refused.clone().unwrap_or_default(),
        lost: args.lost,
        duplicated: args.duplicated,
        reordered: args.reordered,
    })
}

/// `false`: nobody awaits that ticket.
pub(super) async fn acknowledge(
    client: &mut Client,
    output: &Output,
    request: v1::AcknowledgeVfRequest,
) -> Result<bool, CliError> {
    let answer = client.acknowledge_vf(request.clone()).await?.into_inner();
    if !output.is_table() {
        output.message(&answer, "AcknowledgeVfResponse")?;
        return Ok(answer.accepted);
    }
    let (vnic, ticket) = (&request.vnic, request.ticket);
    output.line(&match (answer.accepted, request.outcome()) {
        (true, Outcome::Done) => format!("ticket {ticket} of {vnic}: done"),
        (true, Outcome::Refused | Outcome::Unspecified) => {
            format!("ticket {ticket} of {vnic}: refused ({})", request.reason)
        }
        (false, _) => format!(
            "ticket {ticket} of {vnic} is not awaited: its time was over, or something else was decided; undo what you \
             did for it, and see `sluice get vnic {vnic}` for what is asked now"
        ),
    });
    Ok(answer.accepted)
}

/// Name of an uplink: its switch's, or its interface's.
pub(super) fn uplink(kind: &str, name: Option<&str>) -> Result<String, CliError> {
    match target::one(kind, name, "uplink")? {
        ("uplink", name) => Ok(name.to_owned()),
        (kind, _) => {
            Err(CliError::Usage(format!("`{kind}` cannot be probed: give uplink SWITCH, or uplink/SWITCH")))
        }
    }
}

pub(super) async fn probe(client: &mut Client, output: &Output, name: String) -> Result<bool, CliError> {
    let kind = Kind::Switch.singular().to_owned();
    let switches = client.list(v1::ListRequest { kind }).await?.into_inner().resources;
    let switch = switch_of(&switches, name)?;
    let request = v1::ProbeUplinkRequest { switch: switch.clone() };
    render::vf::probed(output, &switch, &client.probe_uplink(request).await?.into_inner())
}

/// The switch that is meant; a name that means nothing is left for the daemon to refuse.
fn switch_of(switches: &[v1::Resource], name: String) -> Result<String, CliError> {
    let switches: Vec<&v1::Switch> = switches
        .iter()
        .filter_map(|resource| match &resource.spec {
            Some(Spec::Switch(switch)) => Some(switch),
            _ => None,
        })
        .collect();
    if switches.iter().any(|switch| switch.name == name) {
        return Ok(name);
    }
    let has_it = |switch: &&&v1::Switch| switch.uplink.as_ref().is_some_and(|uplink| uplink.netdev == name);
    let owners: Vec<&str> = switches.iter().filter(has_it).map(|switch| switch.name.as_str()).collect();
    match owners.as_slice() {
        [] => Ok(name),
        [switch] => Ok((*switch).to_owned()),
        several => Err(CliError::Usage(format!(
            "{name} is the uplink of several switches; name one of them: {}",
            several.join(", ")
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_uplink_is_named_by_its_switch_or_by_an_interface_of_one_switch() {
        let switch = |name: &str, netdev: &str| {
            let uplink = Some(v1::Uplink { netdev: netdev.to_owned(), ..v1::Uplink::default() });
            let spec = v1::Switch { name: name.to_owned(), uplink, ..v1::Switch::default() };
            v1::Resource { spec: Some(Spec::Switch(spec)), ..v1::Resource::default() }
        };
        let all = [switch("blue", "pf0"), switch("pf1", "pf2"), switch("red", "pf1"), switch("grey", "pf9")];
        let of = |name: &str| switch_of(&all, name.to_owned()).ok();
        assert_eq!(of("blue").as_deref(), Some("blue"));
        assert_eq!(of("pf0").as_deref(), Some("blue"));
        assert_eq!(of("pf1").as_deref(), Some("pf1"), "a switch of that name comes first");
        assert_eq!(of("pf7").as_deref(), Some("pf7"), "for the daemon to refuse");
        let twice = [switch("blue", "pf0"), switch("red", "pf0")];
        let error = switch_of(&twice, "pf0".to_owned()).expect_err("two have it");
        assert!(error.to_string().ends_with("blue, red"), "{error}");

        assert_eq!(uplink("uplink/blue", None).ok().as_deref(), Some("blue"));
        assert_eq!(uplink("uplink", Some("blue")).ok().as_deref(), Some("blue"));
        for (kind, name) in [("uplink", None), ("vnic", Some("vm1")), ("uplink/", None)] {
            assert_eq!(uplink(kind, name).expect_err("no uplink").exit_code(), 2);
        }
    }
}
