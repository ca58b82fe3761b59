//! The live maps as [`Tables`](sluice_pipeline::Tables), read-only, over system calls.

use crate::Engine;

/// A read-only view of the live maps.
#[derive(Debug)]
pub struct LiveTables<'a> {
    _engine: &'a Engine,
}

impl<'a> LiveTables<'a> {
    pub(crate) fn new(engine: &'a Engine) -> Self {
        LiveTables { _engine: engine }
    }
}
