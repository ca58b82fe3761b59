//! For every generated policy and frame: the model eSwitch, running the placed programs beside the software switch,
//! does what the oracle says, or placement refused.
//!
//! `SLUICE_SEED` replays a run, `SLUICE_CASES` makes it longer. A case is a frame that the NIC was asked about.

mod world;

use std::collections::BTreeMap;

use sluice_eswitch::soft::{Flaws, GuestTags};
use sluice_pipeline::DropReason;
use sluice_policy::config::{Acl, Config, Hook, Uplink, VlanMode, Vnic};
use sluice_policy::generate::{Rng, Scenario, frame, scenario};
use sluice_policy::lower::{uplink_port, vnic_port};
use sluice_policy::oracle::{Outcome, evaluate};
use sluice_policy::placement::{
    Capabilities, Evidence, Feature, FlowerActions, FlowerKeys, FlowerSupport, Mode,
};

use world::{Deliveries, Way, World};

const FRAMES_PER_SCENARIO: usize = 50;

fn from_env(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(default)
}

fn seed() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    from_env("SLUICE_SEED", now.as_nanos() as u64)
}

/// What happened in a run.
#[derive(Debug, Default)]
struct Tally {
    cases: usize,
    /// Of these, compared byte by byte.
    exact: usize,
    /// Compared, and the NIC did it without software.
    in_hardware: usize,
    /// Of these, delivered and not dropped.
    sent_in_hardware: usize,
    /// A VF received it.
    vf_reached: usize,
    vnics: usize,
    placed: usize,
    refused: BTreeMap<Feature, usize>,
    failures: Vec<String>,
}

/// What a run covers at least, in per cent: of vNICs, and of cases.
struct Shares {
    placed: usize,
    exact: usize,
    vf_reached: usize,
    sent_in_hardware: usize,
}

impl Tally {
    fn assert_covers(&self, least: Shares) {
        for (what, count, all, least) in [
            ("vNICs placed", self.placed, self.vnics, least.placed),
            ("compared exactly", self.exact, self.cases, least.exact),
            ("reached a VF", self.vf_reached, self.cases, least.vf_reached),
            ("sent in hardware", self.sent_in_hardware, self.cases, least.sent_in_hardware),
        ] {
            assert!(count * 100 >= all * least, "only {count} of {all} {what}");
        }
    }

    fn assert_refused(&self, features: &[Feature]) {
        for feature in features {
            assert!(self.refused.contains_key(feature), "{feature:?} was never the reason to refuse");
        }
    }
}

#[allow(clippy::print_stderr)] // the seed and the figures are for whoever reads the run
fn run(mode: Mode, ease: fn(&mut Rng, &mut Scenario), nic: fn(&mut Rng) -> (Capabilities, Flaws)) -> Tally {
    let (seed, cases) = (seed(), from_env("SLUICE_CASES", 30_000) as usize);
    eprintln!("{mode:?}: SLUICE_SEED={seed} SLUICE_CASES={cases}");
    let mut rng = Rng::new(seed);
    let mut tally = Tally::default();
    while tally.cases < cases && tally.failures.len() < 5 {
        let mut scenario = scenario(&mut rng);
        ease(&mut rng, &mut scenario);
        let (capabilities, flaws) = nic(&mut rng);
        let switch = &scenario.config.switches[0];
        let world = World::new(&scenario, switch, &capabilities, flaws);
        tally.vnics += scenario.config.vnics.iter().filter(|vnic| vnic.switch == switch.name).count();
        tally.placed += world.placed.len();
        for uncovered in &world.refused {
            *tally.refused.entry(uncovered.feature).or_default() += 1;
        }
        if world.placed.is_empty() {
            continue;
        }
        for _ in 0..FRAMES_PER_SCENARIO {
            let (ingress, bytes) = frame(&mut rng, &scenario);
            if is_here(&scenario.config, &ingress) {
                check(&scenario, &world, mode, &ingress, &bytes, &mut tally);
            }
        }
    }
    eprintln!("{tally:?}");
    assert_eq!(tally.failures, Vec::<String>::new(), "replay with SLUICE_SEED={seed} SLUICE_CASES={cases}");
    tally
}

/// Whether the port exists and is on the first switch.
fn is_here(config: &Config, ingress: &str) -> bool {
    let switch = &config.switches[0];
    let vnic = config.vnics.iter().find(|vnic| vnic_port(&vnic.name) == ingress);
    vnic.map_or(ingress.ends_with(&format!("/{}", switch.name)), |vnic| vnic.switch == switch.name)
}

fn check(scenario: &Scenario, world: &World<'_>, mode: Mode, ingress: &str, bytes: &[u8], tally: &mut Tally) {
    let outcome = evaluate(&scenario.config, &scenario.state, ingress, bytes);
    let (found, way) = world.carry(ingress, bytes);
    if !way.nic_asked {
        return;
    }
    tally.cases += 1;
    tally.vf_reached += usize::from(way.vf_reached);
    let wanted = delivered(&outcome);
    let mut judge = || {
        world.contained(ingress, bytes, &found)?;
        if found == wanted {
            tally.exact += 1;
            tally.in_hardware += usize::from(!way.software_asked);
            tally.sent_in_hardware += usize::from(!way.software_asked && !found.is_empty());
            return Ok(());
        }
        if is_beyond_nics(scenario, world, mode, ingress, bytes, &outcome, &found, way) {
            return Ok(());
        }
        Err("it is not what the oracle says".to_owned())
    };
    if let Err(text) = judge() {
        let hex = |bytes: &[u8]| bytes.iter().take(120).map(|b| format!("{b:02x}")).collect::<String>();
        let ports = |deliveries: &Deliveries| {
            deliveries.iter().map(|(port, bytes)| format!("\n    {port} {}", hex(bytes))).collect::<String>()
        };
        let steps: String =
            outcome.steps.iter().map(|s| format!("\n    {} {} {}", s.stage.name(), s.port, s.text)).collect();
        let policies: String = scenario.config.vnics.iter().map(|vnic| format!("\n    {vnic:?}")).collect();
        tally.failures.push(format!(
            "{text}: from {ingress} {}\n  placed {:?}\n  wanted {}\n  found {}\n  {way:?}\n  oracle{steps}\n  {:?}{policies}",
            hex(bytes),
            world.placed.keys(),
            ports(&wanted),
            ports(&found),
            scenario.config.switches[0],
        ));
    }
}

fn delivered(outcome: &Outcome) -> Deliveries {
    let deliveries = outcome.deliveries.iter();
    deliveries.filter_map(|(port, result)| Some((port.clone(), result.clone().ok()?))).collect()
}

/// The differences that `docs/eswitch.md` lists: what no NIC does in legacy mode, and no policy asks for. In
/// switchdev mode, only what is malformed.
#[allow(clippy::too_many_arguments)] // one predicate over the whole case
fn is_beyond_nics(
    scenario: &Scenario,
    world: &World<'_>,
    mode: Mode,
    ingress: &str,
    bytes: &[u8],
    outcome: &Outcome,
    found: &Deliveries,
    way: Way,
) -> bool {
    let is_unjudged = outcome.dropped.is_some_and(|reason| {
        use DropReason::{
            MalformedArp, MalformedEthernet, MalformedIcmp, MalformedIpv4, MalformedIpv6,
            MalformedIpv6Extension, MalformedLength, MalformedSctp, MalformedTcp, MalformedUdp,
            MalformedVlan, MulticastSource, ReservedMulticast, TinyFragment, VlanDepth,
        };
        let malformed = matches!(
            reason,
            MalformedArp
                | MalformedEthernet
                | MalformedIcmp
                | MalformedIpv4
                | MalformedIpv6
                | MalformedIpv6Extension
                | MalformedLength
                | MalformedSctp
                | MalformedTcp
                | MalformedUdp
                | MalformedVlan
                | TinyFragment
                | VlanDepth
        );
        malformed || (mode == Mode::Legacy && matches!(reason, MulticastSource | ReservedMulticast))
    });
    if is_unjudged || mode == Mode::Switchdev {
        return is_unjudged;
    }
    let is_tagged = matches!(bytes.get(12..14), Some([0x81, 0x00] | [0x88, 0xa8]));
    let has_priority_tag = is_tagged && matches!(bytes.get(14..16), Some([a, 0]) if a & 0x0f == 0);
    let sender: Option<&Vnic> = world.placed.get(ingress.trim_start_matches("vnic/")).map(|(_, vnic)| *vnic);
    let is_guests_tag =
        is_tagged && sender.is_some_and(|vnic| !matches!(vnic.policy.vlan, VlanMode::Tunnel(_)));
    // A NIC finds addresses within a VLAN: in another VLAN it takes those of its VFs for somebody's on the wire.
    let uplink = uplink_port(&scenario.config.switches[0].name);
    let is_strangers = outcome.deliveries.iter().all(|(port, result)| {
        *result == Err(DropReason::VlanEgress)
            && port.strip_prefix("vnic/").is_some_and(|name| world.placed.contains_key(name))
    }) && !outcome.deliveries.is_empty()
        && found.keys().all(|port| *port == uplink);
    is_guests_tag || (has_priority_tag && ingress == uplink && way.vf_reached) || is_strangers
}

/// Takes away most of what no legacy eSwitch can do, so that a good share is placed, and what a VEB cannot know:
/// stations learnt behind software ports.
fn ease_for_legacy(rng: &mut Rng, scenario: &mut Scenario) {
    for vnic in &mut scenario.config.vnics {
        let policy = &mut vnic.policy;
        if rng.chance(85) {
            policy.ip_guard.clear();
        }
        policy.dhcp_guard &= rng.chance(10);
        policy.ra_guard &= rng.chance(10);
        policy.unknown_unicast &= rng.chance(20);
        if rng.chance(90) {
            policy.learn_limit = None;
        }
        if rng.chance(85) {
            policy.acl = Acl::default();
        }
        if rng.chance(80) {
            policy.rate_to_vm = None;
        }
        if rng.chance(80) {
            vnic.extra_macs.clear();
        }
        if rng.chance(60) && matches!(policy.vlan, VlanMode::Trunk { .. }) {
            policy.vlan = VlanMode::Untagged;
        }
    }
    ease_surroundings(rng, scenario);
    scenario.state.fdb.retain(|station, sighting| sighting.port == uplink_port(&station.switch));
}

/// A vNIC on a VF does not need its software interface; and mostly there is a NIC, and it carries all VLANs.
fn ease_surroundings(rng: &mut Rng, scenario: &mut Scenario) {
    scenario.state.unattached.clear();
    scenario.state.backings = Default::default();
    let switch = &mut scenario.config.switches[0];
    if switch.uplink.is_none() && rng.chance(80) {
        switch.uplink = Some(Uplink {
            netdev: "pf0".into(),
            hook: Hook::Auto,
            full_checksums: false,
            trunk: Vec::new(),
            native: None,
            learn_limit: 16_384,
            up: true,
            attest: Vec::new(),
        });
    }
    if let Some(uplink) = &mut switch.uplink
        && rng.chance(70)
    {
        uplink.trunk.clear();
        uplink.native = None;
    }
}

/// Representors are always there; otherwise everything as generated.
fn ease_for_switchdev(rng: &mut Rng, scenario: &mut Scenario) {
    ease_surroundings(rng, scenario);
}

fn switchdev_nic(rng: &mut Rng) -> (Capabilities, Flaws) {
    let mut has = || !rng.chance(2);
    let keys = FlowerKeys {
        mac_masks: has(),
        vlan: has(),
        ip: has(),
        ip_proto: has(),
        fragment: has(),
        ports: has(),
        tcp_flags: has(),
        icmp: has(),
    };
    let actions = FlowerActions { chains: has(), trap: has(), vlan: has(), police: has() };
    let offload = if has() { Evidence::ReadBack } else { Evidence::Assumed };
    let rules_max = *rng.pick(&[30, 300, 65_536]);
    let flower = FlowerSupport { offload, rules_max, keys, actions };
    let flaws = Flaws { stops_at_extensions: rng.chance(50), ..Flaws::default() };
    (Capabilities { mode: Mode::Switchdev, max_vfs: 8, flower, ..Capabilities::default() }, flaws)
}

fn legacy_nic(rng: &mut Rng) -> (Capabilities, Flaws) {
    let knob = |rng: &mut Rng| {
        *rng.pick(&[
            Evidence::Missing,
            Evidence::Assumed,
            Evidence::ReadBack,
            Evidence::Probed,
            Evidence::Probed,
            Evidence::Attested,
        ])
    };
    let flaws = Flaws {
        guest_tags: if rng.chance(50) { GuestTags::Dropped } else { GuestTags::Nested },
        ignores_spoofchk: rng.chance(20),
        ignores_rates: rng.chance(20),
        stops_at_extensions: false,
    };
    let honest =
        |is_ignored: bool, evidence: Evidence| if is_ignored { evidence.probed(false) } else { evidence };
    let capabilities = Capabilities {
        mode: Mode::Legacy,
        max_vfs: 8,
        mac_guard: honest(flaws.ignores_spoofchk, knob(rng)),
        access_vlan: knob(rng),
        tunnel_vlan: knob(rng),
        untagged_only: knob(rng),
        rate_max: honest(flaws.ignores_rates, knob(rng)),
        unknown_unicast_to_pf: knob(rng),
        ..Capabilities::default()
    };
    (capabilities, flaws)
}

#[test]
fn legacy_programs_do_what_the_oracle_says() {
    let tally = run(Mode::Legacy, ease_for_legacy, legacy_nic);
    tally.assert_covers(Shares { placed: 10, exact: 70, vf_reached: 10, sent_in_hardware: 5 });
    tally.assert_refused(&[
        Feature::Uplink,
        Feature::MacGuard,
        Feature::ExtraMacs,
        Feature::IpGuard,
        Feature::UntaggedVlan,
        Feature::AccessVlan,
        Feature::TrunkVlan,
        Feature::TunnelVlan,
        Feature::DhcpGuard,
        Feature::RaGuard,
        Feature::AclFromVm,
        Feature::AclToVm,
        Feature::RateFromVm,
        Feature::RateToVm,
        Feature::UnknownUnicast,
        Feature::Learning,
        Feature::PortState,
    ]);
}

#[test]
fn switchdev_programs_do_what_the_oracle_says() {
    let tally = run(Mode::Switchdev, ease_for_switchdev, switchdev_nic);
    tally.assert_covers(Shares { placed: 30, exact: 80, vf_reached: 5, sent_in_hardware: 5 });
    tally.assert_refused(&[
        Feature::Uplink,
        Feature::PortState,
        Feature::Offload,
        Feature::TunnelVlan,
        Feature::TrunkVlan,
        Feature::IpGuard,
        Feature::DhcpGuard,
        Feature::RaGuard,
        Feature::AclFromVm,
        Feature::RateFromVm,
        Feature::TableSpace,
    ]);
}
