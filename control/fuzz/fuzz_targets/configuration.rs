#![no_main]
//! Configurations: the input is YAML as the command line reads it, or a message as the daemon receives it. What is accepted can be
//! lowered, and written and read again as the same.

use libfuzzer_sys::fuzz_target;
use prost::Message;
use sluice_control::{convert, json};
use sluice_policy::ids::Ids;
use sluice_policy::image::Bindings;
use sluice_policy::lower::{assign_ids, lower};
use sluice_policy::validate::validate;
use sluice_proto::v1;

fuzz_target!(|bytes: &[u8]| {
    let message = match bytes {
        [0, encoded @ ..] => v1::Config::decode(encoded).ok(),
        text => std::str::from_utf8(text).ok().and_then(|text| json::read_config(text).ok()),
    };
    let Some(message) = message else { return };
    let Ok(specs) = convert::config(&message) else { return };
    let config = convert::collect(&specs);
    if validate(&config).is_err() {
        return;
    }
    let mut ids = Ids::default();
    assign_ids(&config, &mut ids).expect("a valid configuration of this size fits");
    lower(&config, &ids, &Bindings::new()).expect("what is valid can be lowered");
    for spec in &specs {
        assert_eq!(convert::spec(&convert::resource(spec, 0)).as_ref(), Ok(spec));
    }
});
