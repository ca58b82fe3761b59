//! The embedded eBPF object.

use crate::EngineError;

/// What `build.rs` found; empty if there was nothing.
static OBJECT: &[u8] = aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sluice.o"));

/// The object's bytes.
///
/// # Errors
/// [`EngineError::ObjectMissing`] if the build had none.
pub(crate) fn embedded() -> Result<&'static [u8], EngineError> {
    if OBJECT.is_empty() { Err(EngineError::ObjectMissing) } else { Ok(OBJECT) }
}
