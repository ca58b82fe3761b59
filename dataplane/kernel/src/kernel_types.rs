//! The running kernel's own numbers, read from its BTF, put where the programs have [placeholders](placeholder).
//!
//! Source: `Documentation/bpf/btf.rst`.

use std::collections::HashMap;
use std::fs;

use sluice_pipeline::placeholder;

use crate::EngineError;

const PATH: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;

/// Kinds of types.
mod kind {
    pub(super) const INT: u32 = 1;
    pub(super) const PTR: u32 = 2;
    pub(super) const STRUCT: u32 = 4;
    pub(super) const UNION: u32 = 5;
    pub(super) const TYPEDEF: u32 = 8;
    pub(super) const VOLATILE: u32 = 9;
    pub(super) const CONST: u32 = 10;
    pub(super) const FUNC: u32 = 12;
}

/// Most steps from a name to a type, and from a structure to a member.
const DEPTH_MAX: u32 = 16;
/// `BPF_JMP | BPF_CALL`, and the register nibbles of `BPF_PSEUDO_KFUNC_CALL`.
const CALL: [u8; 2] = [0x85, 0x20];
/// `BPF_ALU64 | BPF_MOV | BPF_K`
const MOVE: u8 = 0xb7;

/// The object with the running kernel's numbers, aligned as the loader wants it.
///
/// # Errors
/// [`EngineError::KernelTypes`] if the kernel does not tell them, [`EngineError::ObjectMismatch`] if the object has no
/// place for one.
pub(crate) fn fill_in(object: &[u8]) -> Result<Vec<u64>, EngineError> {
    let bytes =
        fs::read(PATH).map_err(|error| EngineError::KernelTypes(format!("reading {PATH}: {error}")))?;
    let types = Types::parse(&bytes).ok_or_else(|| EngineError::KernelTypes(format!("{PATH} is garbled")))?;
    let numbers = numbers(&types).map_err(EngineError::KernelTypes)?;
    let mut filled = vec![0u64; object.len().div_ceil(8)];
    bytemuck::cast_slice_mut(&mut filled)[..object.len()].copy_from_slice(object);
    replace(&mut filled, &numbers)?;
    Ok(filled)
}

/// What stands for which placeholder.
fn numbers(types: &Types<'_>) -> Result<HashMap<u32, u32>, String> {
    let skb = types.find(kind::STRUCT, "sk_buff")?;
    let info = types.find(kind::STRUCT, "skb_shared_info")?;
    let summed = types.member(skb, "ip_summed")?;
    if summed.bits != 2 || summed.offset % 8 > 6 {
        return Err(format!("ip_summed has {} bits at {}", summed.bits, summed.offset));
    }
    let whole = |structure, name, bits| match types.member(structure, name)? {
        member if member.bits == bits && member.offset % bits == 0 => Ok(member.offset / 8),
        member => Err(format!("{name} has {} bits at {}, not {bits}", member.bits, member.offset)),
    };
    let numbers = [
        (placeholder::CAST_TO_KERN_CTX, types.find(kind::FUNC, "bpf_cast_to_kern_ctx")?),
        (placeholder::RDONLY_CAST, types.find(kind::FUNC, "bpf_rdonly_cast")?),
        (placeholder::SHARED_INFO, info),
        (placeholder::IP_SUMMED_BYTE, summed.offset / 8),
        (placeholder::IP_SUMMED_BIT, summed.offset % 8),
        (placeholder::CSUM_START, whole(skb, "csum_start", 16)?),
        (placeholder::CSUM_OFFSET, whole(skb, "csum_offset", 16)?),
        (placeholder::MAC_HEADER, whole(skb, "mac_header", 16)?),
        (placeholder::HEAD, whole(skb, "head", 64)?),
        (placeholder::END, whole(skb, "end", 32)?),
        (placeholder::GSO_TYPE, whole(info, "gso_type", 32)?),
    ];
    Ok(numbers.map(|(place, number)| (place as u32, number)).into())
}

/// Puts numbers into the instructions that have their placeholders as immediates.
fn replace(object: &mut [u64], numbers: &HashMap<u32, u32>) -> Result<(), EngineError> {
    let mut missing = numbers.clone();
    for word in object {
        let [code, registers, low, high, immediate @ ..] = word.to_le_bytes();
        // Offset and source are zero, which leaves calls of kernel functions and moves of constants.
        let is_ours =
            [low, high] == [0, 0] && ([code, registers] == CALL || (code == MOVE && registers & 0xf0 == 0));
        let Some(number) = numbers.get(&u32::from_le_bytes(immediate)).filter(|_| is_ours) else { continue };
        missing.remove(&u32::from_le_bytes(immediate));
        let [a, b, c, d] = number.to_le_bytes();
        *word = u64::from_le_bytes([code, registers, 0, 0, a, b, c, d]);
    }
    if missing.is_empty() {
        return Ok(());
    }
    Err(EngineError::ObjectMismatch(format!("it lacks the placeholders {:x?}", missing.keys())))
}

/// A member of a structure: where, and how long, in bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Member {
    offset: u32,
    bits: u32,
}

/// The kernel's types, by number.
struct Types<'a> {
    strings: &'a [u8],
    /// Each type's description; number 0 is `void`.
    all: Vec<&'a [u8]>,
}

impl<'a> Types<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Types<'a>> {
        if u16::from_le_bytes(bytes.get(..2)?.try_into().ok()?) != MAGIC {
            return None;
        }
        let section = |at| {
            let start = word(bytes, 4)?.checked_add(word(bytes, at)?)? as usize;
            bytes.get(start..start.checked_add(word(bytes, at + 4)? as usize)?)
        };
        let (mut rest, strings) = (section(8)?, section(16)?);
        let mut all = vec![&[][..]];
        while !rest.is_empty() {
            let (kind, count) = (word(rest, 4)? >> 24 & 0x1f, word(rest, 4)? as usize & 0xffff);
            let more = match kind {
                kind::INT | 14 | 17 => 4,
                3 => 12,
                kind::STRUCT | kind::UNION | 15 | 19 => 12 * count,
                6 | 13 => 8 * count,
                2 | 7..=12 | 16 | 18 => 0,
                _ => return None,
            };
            all.push(rest.get(..12 + more)?);
            rest = &rest[12 + more..];
        }
        Some(Types { strings, all })
    }

    fn find(&self, kind: u32, name: &str) -> Result<u32, String> {
        let found = self.all.iter().position(|one| self.kind(one) == kind && self.is_called(one, name));
        found.map(|number| number as u32).ok_or_else(|| format!("there is no {name}"))
    }

    fn kind(&self, one: &[u8]) -> u32 {
        word(one, 4).unwrap_or(0) >> 24 & 0x1f
    }

    /// Whether a type or a member has this name; the name's place comes first in both.
    fn is_called(&self, one: &[u8], name: &str) -> bool {
        let place = word(one, 0).unwrap_or(0) as usize;
        let here = self.strings.get(place..).unwrap_or_default();
        here.strip_prefix(name.as_bytes()).is_some_and(|rest| rest.first() == Some(&0))
    }

    /// A member of a structure, or of nameless ones in it.
    fn member(&self, structure: u32, name: &str) -> Result<Member, String> {
        self.search(structure, name, DEPTH_MAX)
            .ok_or_else(|| format!("no structure has a {name} as expected"))
    }

    fn search(&self, structure: u32, name: &str, depth: u32) -> Option<Member> {
        let one = self.all.get(structure as usize)?;
        if depth == 0 || ![kind::STRUCT, kind::UNION].contains(&self.kind(one)) {
            return None;
        }
        let has_bitfields = word(one, 4)? >> 31 != 0;
        for member in one[12..].chunks_exact(12) {
            let (of, offset) = (word(member, 4)?, word(member, 8)?);
            let (offset, bits) = if has_bitfields { (offset & 0xff_ffff, offset >> 24) } else { (offset, 0) };
            if self.is_called(member, name) {
                let bits = if bits == 0 { self.bits(of)? } else { bits };
                return Some(Member { offset, bits });
            }
            if word(member, 0)? == 0
                && let Some(found) = self.search(of, name, depth - 1)
            {
                return Some(Member { offset: offset.checked_add(found.offset)?, ..found });
            }
        }
        None
    }

    /// How long a number or a pointer is.
    fn bits(&self, mut number: u32) -> Option<u32> {
        for _ in 0..DEPTH_MAX {
            let one = self.all.get(number as usize)?;
            match self.kind(one) {
                kind::INT => return word(one, 8)?.checked_mul(8),
                kind::PTR => return Some(64),
                kind::TYPEDEF | kind::VOLATILE | kind::CONST => number = word(one, 8)?,
                _ => return None,
            }
        }
        None
    }
}

/// The little-endian word at a place; BPF objects are built for such machines only.
fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_running_kernel_tells_its_numbers() {
        let bytes = fs::read(PATH).expect("a kernel with BTF");
        let numbers = numbers(&Types::parse(&bytes).expect("BTF")).expect("every number");
        assert_eq!(numbers.len(), 11);
        let types = Types::parse(&bytes).expect("BTF");
        let skb = types.find(kind::STRUCT, "sk_buff").expect("there is one");
        // Both are behind the same beginning, 16 bits each.
        let of = |name| types.member(skb, name).expect("it has one");
        assert_eq!(of("csum_start").offset + 16, of("csum_offset").offset);
        assert_eq!(of("len"), Member { bits: 32, ..of("len") });
        assert!(types.member(skb, "no_such_member").is_err() && types.find(kind::FUNC, "sk_buff").is_err());
    }

    #[test]
    fn garbled_types_are_refused() {
        let bytes = fs::read(PATH).expect("a kernel with BTF");
        for length in [0, 1, 23, 24, 100, bytes.len() / 2] {
            assert!(Types::parse(&bytes[..length]).is_none(), "{length} bytes");
        }
        // A member that refers to its own structure for ever.
        let mut own = Vec::new();
        for word in [0x0001_eb9f_u32, 24, 0, 24, 24, 1, 0, 4 << 24 | 1, 8, 0, 1, 0] {
            own.extend(word.to_le_bytes());
        }
        own.push(0);
        let types = Types::parse(&own).expect("it is well-formed");
        assert!(types.member(1, "head").is_err());
    }

    #[test]
    fn only_instructions_with_placeholders_change() {
        let numbers = HashMap::from([(7u32, 99), (8, 98)]);
        let call = |immediate: u32| u64::from(immediate) << 32 | 0x2085;
        let set = |immediate: u32| u64::from(immediate) << 32 | 0x03b7;
        let helper = 7 << 32 | 0x85;
        let mut code = [call(7), set(8), set(9), helper, 7];
        replace(&mut code, &numbers).expect("both are there");
        assert_eq!(code, [call(99), set(98), set(9), helper, 7]);
        assert!(replace(&mut code, &numbers).is_err(), "nothing is left to replace");
    }
}
