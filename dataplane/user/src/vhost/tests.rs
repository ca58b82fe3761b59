mod data;
mod garbage;
mod hostile;
mod inflight;
mod protocol;
mod setup;
