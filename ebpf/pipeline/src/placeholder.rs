//! Numbers that only the running kernel knows: where fields are in its structures, and how its functions are called. The
//! programs are compiled with these placeholders, as immediates of instructions, and whoever loads them puts the kernel's own
//! numbers in their place. (aya 0.14 can do neither CO-RE relocations of Rust programs nor kernel functions.)

/// Number of `bpf_cast_to_kern_ctx` (Linux 6.2) in the kernel's BTF.
pub const CAST_TO_KERN_CTX: i32 = 0x51ce_0001;
/// Number of `bpf_rdonly_cast` (Linux 6.2).
pub const RDONLY_CAST: i32 = 0x51ce_0002;
/// Number of `struct skb_shared_info`.
pub const SHARED_INFO: i32 = 0x51ce_0003;
/// Byte of `struct sk_buff` that holds `ip_summed`.
pub const IP_SUMMED_BYTE: i32 = 0x51ce_0004;
/// Its lowest bit in that byte.
pub const IP_SUMMED_BIT: i32 = 0x51ce_0005;
/// Offset of `csum_start`, 16 bits.
pub const CSUM_START: i32 = 0x51ce_0006;
/// Offset of `csum_offset`, 16 bits.
pub const CSUM_OFFSET: i32 = 0x51ce_0007;
/// Offset of `mac_header`, 16 bits.
pub const MAC_HEADER: i32 = 0x51ce_0008;
/// Offset of `head`, a pointer.
pub const HEAD: i32 = 0x51ce_0009;
/// Offset of `end`, 32 bits.
pub const END: i32 = 0x51ce_000a;
/// Offset of `gso_type` in `struct skb_shared_info`, 32 bits.
pub const GSO_TYPE: i32 = 0x51ce_000b;
