//! The model keeps the contract; what it does to frames is tested against the oracle in `tests/placement.rs`.

use sluice_policy::placement::FlowerSupport;

use super::*;
use crate::contract::ErrorClass;

const VF: VfIndex = VfIndex(1);

fn legacy() -> Soft {
    let capabilities = Capabilities { mac_guard: Evidence::ReadBack, max_vfs: 4, ..Capabilities::default() };
    Soft::new(capabilities, 4, Flaws::default())
}

fn guarded() -> Program {
    Program::Legacy(VfSettings { mac: MacAddr([2; 6]), spoofchk: true, ..VfSettings::default() })
}

#[test]
fn a_second_pass_writes_nothing() {
    let mut soft = legacy();
    let macs = BTreeSet::from([MacAddr([2, 0, 0, 0, 0, 9])]);
    let mut pass = || {
        soft.program(VF, &guarded())?;
        soft.enable(VF)?;
        soft.sync_unicast_filter(&macs)?;
        Ok::<u64, EswitchError>(soft.writes())
    };
    assert_eq!(pass(), Ok(3));
    assert_eq!(pass(), Ok(3));
    assert_eq!(soft.unprogram(VF), Ok(()));
    assert_eq!(soft.unprogram(VF), Ok(()));
    assert_eq!(soft.writes(), 4);
    assert!(soft.is_pristine(VF));
}

#[test]
fn programming_never_opens_and_is_read_back() {
    let mut soft = legacy();
    soft.program(VF, &guarded()).expect("it has the knobs");
    let observed = soft.read_back(VF).expect("it exists");
    assert!(!observed.enabled);
    assert_eq!(observed.differences(&guarded()), []);
    soft.tamper(VF, |settings| settings.spoofchk = false);
    let differences = soft.read_back(VF).expect("it exists").differences(&guarded());
    let texts: Vec<String> = differences.iter().map(ToString::to_string).collect();
    assert_eq!(texts, ["spoofchk is off and should be on"]);
}

#[test]
fn what_it_cannot_do_is_an_error_of_the_right_class() {
    let mut soft = legacy();
    let rate = Program::Legacy(VfSettings { max_rate_mbps: 1, ..VfSettings::default() });
    let rules = Program::Switchdev(FlowerProgram::default());
    for (vf, program, class) in [
        (VF, &rate, ErrorClass::Uncovered),
        (VF, &rules, ErrorClass::Uncovered),
        (VfIndex(9), &guarded(), ErrorClass::Gone),
    ] {
        assert_eq!(soft.program(vf, program).map_err(|error| error.class()), Err(class));
    }
    assert_eq!(soft.disable(VfIndex(9)), Ok(()), "a VF that is gone is closed");
    assert_eq!(soft.unprogram(VfIndex(9)), Ok(()));
    assert_eq!(soft.writes(), 0);
    soft.limit_filter(0);
    let full = soft.sync_unicast_filter(&BTreeSet::from([MacAddr([2; 6])]));
    assert!(matches!(full, Err(EswitchError::TableFull { .. })));
}

#[test]
fn rules_need_room() {
    let flower = FlowerSupport { rules_max: 0, ..FlowerSupport::default() };
    let capabilities = Capabilities { mode: Mode::Switchdev, flower, ..Capabilities::default() };
    let mut soft = Soft::new(capabilities, 4, Flaws::default());
    let rule = sluice_policy::placement::FlowerRule {
        port: sluice_policy::placement::RulePort::Own,
        chain: 0,
        priority: 1,
        matches: sluice_policy::placement::FlowerMatch::default(),
        actions: vec![sluice_policy::placement::FlowerAction::Drop],
    };
    let program = Program::Switchdev(FlowerProgram::new(vec![rule]));
    assert!(matches!(soft.program(VF, &program), Err(EswitchError::TableFull { .. })));
    assert!(soft.is_pristine(VF));
}

#[test]
fn a_closed_vf_neither_sends_nor_receives() {
    let mut soft = legacy();
    soft.program(VF, &guarded()).expect("it has the knobs");
    let other = Program::Legacy(VfSettings { mac: MacAddr([4; 6]), ..VfSettings::default() });
    soft.program(VfIndex(2), &other).expect("it has the knobs");
    soft.enable(VfIndex(2)).expect("it exists");
    let frame = [[4; 6].as_slice(), &[2; 6], &[0x88, 0xb5], &[0; 46]].concat();
    let back = [[2; 6].as_slice(), &[4; 6], &[0x88, 0xb5], &[0; 46]].concat();
    assert_eq!(soft.transmit(Port::Vf(VF), &frame, false), []);
    assert_eq!(soft.transmit(Port::Vf(VfIndex(2)), &back, false), [(Port::Wire, back.clone())]);
    soft.enable(VF).expect("it exists");
    assert_eq!(soft.transmit(Port::Vf(VF), &frame, false), [(Port::Vf(VfIndex(2)), frame)]);
    assert_eq!(soft.transmit(Port::Vf(VfIndex(2)), &back, false), [(Port::Vf(VF), back)]);
}
