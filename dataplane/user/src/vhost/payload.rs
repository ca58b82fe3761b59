//! Payloads of requests, taken apart. All numbers are in the machine's byte order.

use super::error::RequestError;
use super::memory::RegionAddress;

/// The bytes after a message's header.
#[derive(Debug, Clone, Copy)]
pub(super) struct Payload<'a>(pub(super) &'a [u8]);

/// Where a ring is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct RingPayload {
    pub(super) index: u32,
    pub(super) flags: u32,
    pub(super) descriptors: u64,
    pub(super) used: u64,
    pub(super) available: u64,
    pub(super) log: u64,
}

/// Where an area for descriptors in flight is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct InflightPayload {
    pub(super) len: u64,
    pub(super) offset: u64,
    pub(super) queues: u16,
    pub(super) entries: u16,
}

impl InflightPayload {
    pub(super) fn to_bytes(self) -> Vec<u8> {
        let mut bytes = [self.len.to_ne_bytes(), self.offset.to_ne_bytes()].concat();
        bytes.extend_from_slice(&self.queues.to_ne_bytes());
        bytes.extend_from_slice(&self.entries.to_ne_bytes());
        // The structure ends on a word.
        bytes.extend_from_slice(&[0; 4]);
        bytes
    }
}

impl Payload<'_> {
    /// So many words of eight bytes, and nothing else.
    fn words<const N: usize>(self) -> Result<[u64; N], RequestError> {
        let (words, rest) = self.0.as_chunks::<8>();
        let words: [[u8; 8]; N] = words.try_into().map_err(|_| self.wrong())?;
        if rest.is_empty() { Ok(words.map(u64::from_ne_bytes)) } else { Err(self.wrong()) }
    }

    fn wrong(self) -> RequestError {
        RequestError::PayloadSize { size: self.0.len() }
    }

    pub(super) fn number(self) -> Result<u64, RequestError> {
        self.words::<1>().map(|[word]| word)
    }

    /// A queue's index, and a value.
    pub(super) fn state(self) -> Result<(u32, u32), RequestError> {
        let (words, rest) = self.0.as_chunks::<4>();
        match (words, rest) {
            ([index, value], []) => Ok((u32::from_ne_bytes(*index), u32::from_ne_bytes(*value))),
            _ => Err(self.wrong()),
        }
    }

    pub(super) fn addresses(self) -> Result<RingPayload, RequestError> {
        let [_, descriptors, used, available, log] = self.words::<5>()?;
        let (index, flags) = Payload(self.0.get(..8).unwrap_or_default()).state()?;
        Ok(RingPayload { index, flags, descriptors, used, available, log })
    }

    /// One region, behind a word of padding.
    pub(super) fn region(self) -> Result<RegionAddress, RequestError> {
        let [_, guest, size, user, offset] = self.words::<5>()?;
        Ok([guest, size, user, offset].into())
    }

    /// All regions, behind their number.
    pub(super) fn regions(self) -> Result<Vec<RegionAddress>, RequestError> {
        let (head, rest) = self.0.split_at_checked(8).ok_or_else(|| self.wrong())?;
        let (count, _) = Payload(head).state()?;
        let (regions, []) = rest.as_chunks::<32>() else { return Err(self.wrong()) };
        if regions.len() != count as usize {
            return Err(self.wrong());
        }
        regions.iter().map(|region| Payload(region).words::<4>().map(RegionAddress::from)).collect()
    }

    /// The log's length and its offset in the file.
    pub(super) fn log(self) -> Result<(u64, u64), RequestError> {
        self.words::<2>().map(|[len, offset]| (len, offset))
    }

    /// Front-ends differ in whether they send the structure's padding.
    pub(super) fn inflight(self) -> Result<InflightPayload, RequestError> {
        let (head, rest) = self.0.split_at_checked(16).ok_or_else(|| self.wrong())?;
        let [len, offset] = Payload(head).words::<2>()?;
        let [a, b, c, d] = *rest.first_chunk::<4>().ok_or_else(|| self.wrong())?;
        if rest.len() != 4 && rest.len() != 8 {
            return Err(self.wrong());
        }
        Ok(InflightPayload {
            len,
            offset,
            queues: u16::from_ne_bytes([a, b]),
            entries: u16::from_ne_bytes([c, d]),
        })
    }
}
