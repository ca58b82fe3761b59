//! Golden bytes, as `ip link` writes them and drivers answer.

use super::*;

fn vid(number: u32) -> VlanId {
    VlanId::new(number).expect("in range")
}

/// ifinfomsg of interface 5, then IFLA_VFINFO_LIST with one IFLA_VF_INFO that holds this.
#[cfg(target_endian = "little")]
fn golden(attribute: &[u8]) -> Vec<u8> {
    let length = attribute.len() as u8;
    let mut bytes = vec![0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    bytes.extend([length + 8, 0, 22, 0, length + 4, 0, 1, 0]);
    bytes.extend(attribute);
    bytes
}

#[test]
#[cfg(target_endian = "little")]
fn settings_are_what_ip_link_writes() {
    let mut mac = vec![40, 0, 1, 0, 3, 0, 0, 0, 2, 0, 0, 0, 0, 0xaa];
    mac.resize(40, 0);
    let tunnel = PortVlan { vid: vid(300), qos: 5, protocol: VlanProtocol::Dot1ad };
    let customer = PortVlan { vid: vid(4094), qos: 0, protocol: VlanProtocol::Dot1q };
    let cases: [(Setting, &[u8]); 10] = [
        (Setting::Mac(MacAddr([2, 0, 0, 0, 0, 0xaa])), &mac),
        (
            Setting::Vlan(Some(tunnel)),
            &[24, 0, 12, 0, 20, 0, 1, 0, 3, 0, 0, 0, 0x2c, 1, 0, 0, 5, 0, 0, 0, 0x88, 0xa8, 0, 0],
        ),
        (
            Setting::Vlan(Some(customer)),
            &[24, 0, 12, 0, 20, 0, 1, 0, 3, 0, 0, 0, 0xfe, 0x0f, 0, 0, 0, 0, 0, 0, 0x81, 0, 0, 0],
        ),
        (
            Setting::Vlan(None),
            &[24, 0, 12, 0, 20, 0, 1, 0, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x81, 0, 0, 0],
        ),
        (Setting::Spoofchk(true), &[12, 0, 4, 0, 3, 0, 0, 0, 1, 0, 0, 0]),
        (Setting::Trust(false), &[12, 0, 9, 0, 3, 0, 0, 0, 0, 0, 0, 0]),
        (
            Setting::Rates { min_mbps: 10, max_mbps: 1000 },
            &[16, 0, 6, 0, 3, 0, 0, 0, 10, 0, 0, 0, 0xe8, 3, 0, 0],
        ),
        (Setting::QueryRss(true), &[12, 0, 7, 0, 3, 0, 0, 0, 1, 0, 0, 0]),
        (Setting::Link(LinkState::Disable), &[12, 0, 5, 0, 3, 0, 0, 0, 2, 0, 0, 0]),
        (Setting::Link(LinkState::Auto), &[12, 0, 5, 0, 3, 0, 0, 0, 0, 0, 0, 0]),
    ];
    for (setting, attribute) in cases {
        assert_eq!(set(5, VfIndex(3), &setting), golden(attribute), "{setting:?}");
    }
}

#[test]
#[cfg(target_endian = "little")]
fn the_question_asks_for_vfs() {
    let mut wanted = vec![0, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 29, 0, 9, 0, 0, 0];
    assert_eq!(get(5, false), wanted);
    wanted[20] = 1;
    assert_eq!(get(5, true), wanted);
}

/// What a driver answers for a VF that was given these settings, with one word of them changed.
fn answer(index: u32, settings: &[Setting]) -> Attributes {
    let mut bytes = Vec::new();
    for setting in settings {
        bytes.extend(setting.attribute(index).into_bytes());
    }
    Attributes::after(&bytes)
}

fn message(vf_count: u32, vfs: &[Attributes]) -> Vec<u8> {
    let list = vfs.iter().fold(Attributes::default(), |list, vf| list.nest(VF_INFO, vf));
    let mut header = link_header(5);
    header[LINK_FLAGS..12].copy_from_slice(&(UP | RUNNING).to_ne_bytes());
    Attributes::after(&header)
        .put(IFLA_NUM_VF, &vf_count.to_ne_bytes())
        .nest(IFLA_VFINFO_LIST, &list)
        .into_bytes()
}

#[test]
fn what_is_set_reads_back() {
    let wanted = VfSettings {
        mac: MacAddr([2, 0, 0, 0, 0, 7]),
        vlan: Some(PortVlan { vid: vid(300), qos: 5, protocol: VlanProtocol::Dot1ad }),
        spoofchk: true,
        trust: false,
        min_rate_mbps: 10,
        max_rate_mbps: 1000,
        query_rss: true,
    };
    let settings = [
        Setting::Mac(wanted.mac),
        Setting::Vlan(wanted.vlan),
        Setting::Spoofchk(true),
        Setting::Trust(false),
        Setting::Rates { min_mbps: 10, max_mbps: 1000 },
        Setting::QueryRss(true),
        Setting::Link(LinkState::Disable),
    ];
    let bytes = message(2, &[answer(0, &settings[..1]), answer(1, &settings)]);
    let report = pf_report(&bytes).expect("whole");
    assert_eq!((report.up, report.running, report.vf_count, report.vfs.len()), (true, true, 2, 2));
    assert_eq!(report.vfs[1].settings(), Ok(wanted));
    assert_eq!((report.vfs[1].index, report.vfs[1].link), (1, LinkState::Disable));
    assert_eq!(report.vfs[0].settings(), Ok(VfSettings { mac: wanted.mac, ..VfSettings::default() }));
    assert_eq!(report.vfs[0].stats, VfStats::default());
}

#[test]
fn a_switch_that_the_driver_lacks_is_not_off() {
    let unreported = |kind| Attributes::default().put(kind, &[[0; 4], [0xff; 4]].concat());
    let info = [
        Setting::Mac(MacAddr([2; 6])).attribute(0).into_bytes(),
        unreported(VF_SPOOFCHK).into_bytes(),
        unreported(VF_TRUST).into_bytes(),
    ];
    let report = pf_report(&message(1, &[Attributes::after(&info.concat())])).expect("whole");
    assert_eq!((report.vfs[0].spoofchk, report.vfs[0].trust, report.vfs[0].query_rss), (None, None, None));
}

#[test]
fn what_no_program_says_is_an_error_and_never_a_match() {
    let odd = |words: [u32; 3], tpid: [u8; 2]| {
        let mut vlan: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
        vlan.extend(tpid);
        vlan.extend([0, 0]);
        let list = Attributes::default().put(VF_VLAN_INFO, &vlan);
        let mac = Setting::Mac(MacAddr([2; 6])).attribute(0).into_bytes();
        let info = Attributes::after(&mac).nest(VF_VLAN_LIST, &list);
        pf_report(&message(1, &[info])).expect("whole").vfs.remove(0).settings()
    };
    assert!(odd([0, 100, 0], [0x81, 0]).is_ok());
    assert!(odd([0, 4095, 0], [0x81, 0]).is_err());
    assert!(odd([0, 100, 256], [0x81, 0]).is_err());
    assert!(odd([0, 100, 0], [0x91, 0]).is_err());
}

#[test]
fn counters_are_the_vms_and_all_zeros_are_none() {
    let counters = |values: [(u16, u64); 4]| {
        let inner = values
            .iter()
            .fold(Attributes::default(), |inner, (kind, value)| inner.put(*kind, &value.to_ne_bytes()));
        let mac = Setting::Mac(MacAddr([2; 6])).attribute(0).into_bytes();
        let info = Attributes::after(&mac).nest(VF_STATS, &inner);
        pf_report(&message(1, &[info])).expect("whole").vfs[0].stats
    };
    let counted = counters([(0, 3), (1, 4), (2, 300), (8, 1)]);
    assert_eq!((counted.to_vm_frames, counted.from_vm_frames), (Some(3), Some(4)));
    assert_eq!(
        (counted.to_vm_bytes, counted.from_vm_bytes, counted.from_vm_dropped),
        (Some(300), None, Some(1))
    );
    assert_eq!(counters([(0, 0), (1, 0), (2, 0), (3, 0)]), VfStats::default());
}

#[test]
fn cut_off_messages_yield_what_is_whole() {
    let bytes = message(3, &[answer(0, &[Setting::Mac(MacAddr([2; 6]))])]);
    assert_eq!(pf_report(&bytes).map(|report| (report.vf_count, report.vfs.len())), Some((3, 1)));
    for length in 0..bytes.len() {
        let report = pf_report(&bytes[..length]);
        assert!(report.is_none_or(|report| report.vfs.is_empty()), "{length}");
    }
}
