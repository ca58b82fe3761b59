//! The API of Sluice as generated from `sluice/v1/*.proto`, and its descriptors. Nothing is written by hand here;
//! the meaning of every field is documented in those files.

#![forbid(unsafe_code)]

use std::sync::LazyLock;

use prost_reflect::DescriptorPool;

/// Version 1.
#[allow(missing_docs, clippy::all)] // generated
pub mod v1 {
    tonic::include_proto!("sluice.v1");
}

/// The encoded `google.protobuf.FileDescriptorSet` of all files, for server reflection.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/sluice.bin"));

/// The descriptors of all messages, for the JSON mapping.
pub static POOL: LazyLock<DescriptorPool> = LazyLock::new(|| {
    DescriptorPool::decode(FILE_DESCRIPTOR_SET).expect("the build wrote a valid descriptor set")
});
