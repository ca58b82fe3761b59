//! What a change costs with many rules and many ports: counts are asserted, times are printed.

#![allow(clippy::print_stdout)] // that is what it is for

mod common;

use std::time::Instant;

use common::*;
use sluice_policy::config::AclAction;

#[test]
fn one_rule_among_ten_thousand_writes_a_handful() {
    in_lab(|lab| {
        lab.guest("p1", 1);
        let mut config = config(vec![with_group(vnic(1, "p1"), "web")]);
        config.acl_groups.push(deny_ports("web", 10_000));
        let (mut engine, _) = lab.open();
        let start = Instant::now();
        let first = lab.sync(&mut engine, &config);
        println!("10 000 rules: {:?}, wrote {}", start.elapsed(), first.writes);
        assert_eq!(first.writes.of("ACL_RULES").updates, 10_000);

        config.acl_groups[0].rules[4999].action = AclAction::Allow;
        let start = Instant::now();
        let changed = lab.sync(&mut engine, &config);
        println!("one of them changed: {:?}, wrote {}", start.elapsed(), changed.writes);
        assert!((2..=8).contains(&changed.writes.total()), "{}", changed.writes);

        config.acl_groups[0].rules.remove(1234);
        let start = Instant::now();
        let removed = lab.sync(&mut engine, &config);
        println!("one of them removed: {:?}, wrote {}", start.elapsed(), removed.writes);
        assert!((3..=8).contains(&removed.writes.total()), "{}", removed.writes);

        let start = Instant::now();
        let idle = lab.sync(&mut engine, &config);
        println!("nothing changed: {:?}", start.elapsed());
        assert_eq!(idle.writes.total(), 0, "{}", idle.writes);

        drop(engine);
        let start = Instant::now();
        let (mut engine, _) = lab.open();
        println!("adopted in {:?}", start.elapsed());
        assert_eq!(lab.sync(&mut engine, &config).writes.total(), 0);
    });
}

#[test]
fn a_thousand_ports() {
    in_lab(|lab| {
        const PORTS: u32 = 1000;
        let commands: String = (1..=PORTS)
            .map(|number| {
                format!("link add p{number} type veth peer name q{number}\nlink set p{number} up\n")
            })
            .collect();
        let file = tempfile::NamedTempFile::new().expect("a temporary file can be made");
        std::fs::write(file.path(), commands).expect("it can be written");
        ip(&format!("-batch {}", file.path().display()));
        let mut config = config((1..=PORTS).map(|number| vnic(number, &format!("p{number}"))).collect());
        let (mut engine, _) = lab.open();

        let start = Instant::now();
        let image = lab.image(&engine, &config);
        println!("{PORTS} ports observed and lowered: {:?}", start.elapsed());
        let start = Instant::now();
        let first = engine.sync(&image).expect("the image can be synced");
        println!("synced: {:?}, wrote {}", start.elapsed(), first.writes);
        assert_eq!(first.link_changes.len(), PORTS as usize);

        let start = Instant::now();
        let idle = engine.sync(&image).expect("the image can be synced");
        println!("synced again: {:?}", start.elapsed());
        assert_eq!(idle.writes.total(), 0);

        config.vnics[500].policy.dhcp_guard = true;
        let image = lab.image(&engine, &config);
        let start = Instant::now();
        let changed = engine.sync(&image).expect("the image can be synced");
        println!("one port changed: {:?}, wrote {}", start.elapsed(), changed.writes);
        assert!(changed.writes.total() <= 4, "{}", changed.writes);

        drop(engine);
        let start = Instant::now();
        let (mut engine, report) = lab.open();
        println!("adopted in {:?}", start.elapsed());
        assert_eq!(report.links.len(), PORTS as usize);
        assert_eq!(engine.sync(&image).expect("the image can be synced").writes.total(), 0);

        let start = Instant::now();
        let stats = engine.all_port_stats().expect("counters can be read");
        let drops = engine.all_drops().expect("counters can be read");
        println!("counters of {} ports: {:?}; drops on {}", stats.len(), start.elapsed(), drops.len());
        engine.detach_all().expect("everything can be removed");
    });
}
