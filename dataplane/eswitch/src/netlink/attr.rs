//! Netlink attributes (linux/netlink.h `struct nlattr`), written to and read from bytes.

use std::collections::BTreeMap;

/// Length and kind.
const HEADER: usize = 4;
/// `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`, which are no part of the kind.
const FLAGS: u16 = 0xc000;

/// Attributes in the order in which they were put.
#[derive(Clone, Debug, Default)]
pub(crate) struct Attributes(Vec<u8>);

impl Attributes {
    /// Attributes behind a fixed header.
    pub(crate) fn after(header: &[u8]) -> Attributes {
        Attributes(header.to_vec())
    }

    /// Adds an attribute.
    #[must_use]
    pub(crate) fn put(mut self, kind: u16, value: &[u8]) -> Attributes {
        // The longest that we write is a police action's rate table of 1 KiB.
        let length = u16::try_from(HEADER + value.len()).expect("attributes of ours are short");
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(HEADER), 0);
        self
    }

    /// Adds a text, which ends with a zero.
    #[must_use]
    pub(crate) fn text(self, kind: u16, text: &str) -> Attributes {
        let value: Vec<u8> = text.bytes().chain([0]).collect();
        self.put(kind, &value)
    }

    /// Adds attributes inside an attribute.
    #[must_use]
    pub(crate) fn nest(self, kind: u16, inner: &Attributes) -> Attributes {
        self.put(kind, &inner.0)
    }

    /// The bytes.
    pub(crate) fn into_bytes(self) -> Vec<u8> {
        self.0
    }
}

/// Attributes that the kernel sent, by kind. Of two of a kind the last counts.
#[derive(Clone, Debug, Default)]
pub(crate) struct Read<'a>(BTreeMap<u16, &'a [u8]>);

impl<'a> Read<'a> {
    /// Reads as far as attributes are whole.
    pub(crate) fn new(bytes: &'a [u8]) -> Read<'a> {
        Read(each(bytes).collect())
    }

    /// An attribute's value.
    pub(crate) fn get(&self, kind: u16) -> Option<&'a [u8]> {
        self.0.get(&kind).copied()
    }

    /// The attributes inside an attribute; none if it is not there.
    pub(crate) fn nested(&self, kind: u16) -> Read<'a> {
        Read::new(self.get(kind).unwrap_or_default())
    }

    /// A value of just so many bytes.
    pub(crate) fn array<const N: usize>(&self, kind: u16) -> Option<[u8; N]> {
        self.get(kind)?.try_into().ok()
    }

    /// A byte.
    pub(crate) fn u8(&self, kind: u16) -> Option<u8> {
        self.array(kind).map(u8::from_ne_bytes)
    }

    /// 16 bits in the machine's order.
    pub(crate) fn u16(&self, kind: u16) -> Option<u16> {
        self.array(kind).map(u16::from_ne_bytes)
    }

    /// 16 bits in network order.
    pub(crate) fn be16(&self, kind: u16) -> Option<u16> {
        self.array(kind).map(u16::from_be_bytes)
    }

    /// 32 bits in the machine's order.
    pub(crate) fn u32(&self, kind: u16) -> Option<u32> {
        self.array(kind).map(u32::from_ne_bytes)
    }

    /// 64 bits in the machine's order.
    pub(crate) fn u64(&self, kind: u16) -> Option<u64> {
        self.array(kind).map(u64::from_ne_bytes)
    }

    /// A text, without the zero at its end.
    pub(crate) fn text(&self, kind: u16) -> Option<String> {
        self.get(kind).map(text)
    }

    /// All values, in the order of their kinds.
    pub(crate) fn values(&self) -> impl Iterator<Item = &'a [u8]> {
        self.0.values().copied()
    }
}

/// A text, without the zero at its end.
pub(crate) fn text(bytes: &[u8]) -> String {
    let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    String::from_utf8_lossy(&bytes[..end]).into_owned()
}

/// Attributes one by one, kind and value, as far as they are whole: a list may have many of a kind.
pub(crate) fn each(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let (length, kind) = (usize::from(u16_at(bytes, 0)?), u16_at(bytes, 2)?);
        let value = bytes.get(HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(HEADER)..).unwrap_or_default();
        Some((kind & !FLAGS, value))
    })
}

/// 16 bits in the machine's order.
fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

/// 32 bits in the machine's order.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_nested() {
        let inner = Attributes::default().put(7, &[1]).put(8, b"abc\0");
        let bytes = Attributes::after(&[9; 4]).nest(2, &inner).into_bytes();
        assert_eq!(
            bytes,
            [
                &[9, 9, 9, 9][..],
                &20_u16.to_ne_bytes(),
                &2_u16.to_ne_bytes(),
                &5_u16.to_ne_bytes(),
                &7_u16.to_ne_bytes(),
                &[1, 0, 0, 0],
                &8_u16.to_ne_bytes(),
                &8_u16.to_ne_bytes(),
                b"abc\0",
            ]
            .concat()
        );
        let read = Read::new(&bytes[4..]);
        assert_eq!((read.nested(2).array(7), read.nested(2).text(8)), (Some([1]), Some("abc".to_owned())));
        assert_eq!((read.nested(2).u32(7), read.nested(3).get(7)), (None, None));
    }

    #[test]
    fn broken_attributes_end_the_list() {
        let whole = Attributes::default().put(1, &[1, 2]).into_bytes();
        for bad in [&[3, 0, 1, 0][..], &[0, 0, 0, 0], &[200, 0, 1, 0, 0], &[1]] {
            let bytes = [&whole, bad].concat();
            assert_eq!(each(&bytes).count(), 1, "{bad:?}");
        }
    }

    #[test]
    fn a_list_has_many_of_a_kind() {
        let list = Attributes::default().put(1, &[1]).put(1, &[2]).into_bytes();
        let values: Vec<&[u8]> = each(&list).map(|(_, value)| value).collect();
        assert_eq!(values, [[1], [2]]);
    }
}
