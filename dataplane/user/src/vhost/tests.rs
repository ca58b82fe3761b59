mod data;
mod garbage;
mod hostile;
mod inflight;
mod packed;
mod packed_recovery;
mod protocol;
mod setup;
