//! From what a VF has to what it shall have: which settings are written, in which order.

use sluice_policy::placement::VfSettings;

use super::codec::Setting;

/// The settings to write; none where nothing differs. What shuts comes before what opens, should writing stop half-way.
pub(super) fn steps(found: &VfSettings, wanted: &VfSettings) -> Vec<Setting> {
    let VfSettings { mac, vlan, spoofchk, trust, min_rate_mbps, max_rate_mbps, query_rss } = *wanted;
    let rates = (min_rate_mbps, max_rate_mbps);
    let all = [
        (found.trust != trust && !trust, Setting::Trust(false)),
        (found.spoofchk != spoofchk && spoofchk, Setting::Spoofchk(true)),
        (found.vlan != vlan, Setting::Vlan(vlan)),
        (found.mac != mac, Setting::Mac(mac)),
        (
            (found.min_rate_mbps, found.max_rate_mbps) != rates,
            Setting::Rates { min_mbps: min_rate_mbps, max_mbps: max_rate_mbps },
        ),
        (found.query_rss != query_rss, Setting::QueryRss(query_rss)),
        (found.spoofchk != spoofchk && !spoofchk, Setting::Spoofchk(false)),
        (found.trust != trust && trust, Setting::Trust(true)),
    ];
    all.into_iter().filter(|(is_due, _)| *is_due).map(|(_, setting)| setting).collect()
}

/// What a VF has when it is given back: nothing of ours, and spoof checking where there is such a thing, as new VFs
/// have it.
pub(super) fn pristine(found: &VfSettings, reports_spoofchk: bool) -> VfSettings {
    VfSettings { spoofchk: found.spoofchk || reports_spoofchk, ..VfSettings::default() }
}

#[cfg(test)]
mod tests {
    use sluice_policy::net::{MacAddr, VlanId};
    use sluice_policy::placement::{PortVlan, VlanProtocol};

    use super::*;

    fn full() -> VfSettings {
        let vid = VlanId::new(100).expect("in range");
        VfSettings {
            mac: MacAddr([2; 6]),
            vlan: Some(PortVlan { vid, qos: 1, protocol: VlanProtocol::Dot1q }),
            spoofchk: true,
            trust: true,
            min_rate_mbps: 1,
            max_rate_mbps: 2,
            query_rss: true,
        }
    }

    #[test]
    fn nothing_is_written_where_nothing_differs() {
        for settings in [full(), VfSettings::default()] {
            assert_eq!(steps(&settings, &settings), []);
        }
    }

    #[test]
    fn each_knob_is_written_once_and_alone() {
        assert_eq!(steps(&VfSettings::default(), &full()).len(), 6);
        type Change = fn(&mut VfSettings);
        let changes: [(&str, Change); 7] = [
            ("mac", |settings| settings.mac = MacAddr([4; 6])),
            ("vlan", |settings| settings.vlan = None),
            ("spoofchk", |settings| settings.spoofchk = false),
            ("trust", |settings| settings.trust = false),
            ("min_tx_rate and max_tx_rate", |settings| settings.min_rate_mbps = 7),
            ("min_tx_rate and max_tx_rate", |settings| settings.max_rate_mbps = 7),
            ("query_rss", |settings| settings.query_rss = false),
        ];
        for (name, change) in changes {
            let mut wanted = full();
            change(&mut wanted);
            let names: Vec<&str> = steps(&full(), &wanted).iter().map(Setting::name).collect();
            assert_eq!(names, [name]);
        }
    }

    #[test]
    fn what_shuts_comes_first() {
        let trusted = VfSettings { trust: true, ..VfSettings::default() };
        let guarded = VfSettings { spoofchk: true, mac: MacAddr([2; 6]), ..VfSettings::default() };
        let mac = Setting::Mac(guarded.mac);
        assert_eq!(steps(&trusted, &guarded), [Setting::Trust(false), Setting::Spoofchk(true), mac]);
        let none = Setting::Mac(MacAddr::default());
        assert_eq!(steps(&guarded, &trusted), [none, Setting::Spoofchk(false), Setting::Trust(true)]);
    }

    #[test]
    fn a_vf_is_given_back_with_its_spoof_check() {
        assert_eq!(pristine(&full(), true), VfSettings { spoofchk: true, ..VfSettings::default() });
        assert_eq!(pristine(&VfSettings::default(), false), VfSettings::default());
    }
}
