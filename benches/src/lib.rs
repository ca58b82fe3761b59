//! sluice-benches
