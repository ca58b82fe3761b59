//! A worker's own store of idle chunks.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::buffer::{Chunk, Class, Region};
use super::{Frame, HEADROOM, LARGE_CHUNK, SMALL_CHUNK};

/// Chunks that are fetched from, and brought to, the region at once, by class.
const BULK: [usize; 2] = [64, 4];

/// A store of idle chunks, for one thread. It takes chunks from its region and brings them back by the dozen; frames of
/// the region may be given to any of its pools.
#[derive(Debug)]
pub struct Pool {
    region: Arc<Region>,
    idle: [Vec<Chunk>; 2],
    /// How many are idle, for the region's books.
    count: Arc<AtomicUsize>,
}

impl Pool {
    /// An empty store; it fills itself.
    pub fn new(region: &Arc<Region>) -> Pool {
        let idle = BULK.map(|bulk| Vec::with_capacity(3 * bulk));
        Pool { region: Arc::clone(region), idle, count: region.add_pool() }
    }

    /// The region that its frames are of.
    pub fn region(&self) -> &Arc<Region> {
        &self.region
    }

    /// A new frame without bytes and with room for `bytes`, tags apart; `None` if there is no chunk left, or none so long.
    #[inline]
    pub fn take(&mut self, bytes: usize) -> Option<Frame> {
        let class = if bytes <= SMALL_CHUNK - HEADROOM {
            Class::Small
        } else if bytes <= LARGE_CHUNK - HEADROOM {
            Class::Large
        } else {
            return None;
        };
        Some(Frame::over(self.chunk(class)?, HEADROOM, 0))
    }

    /// A new frame with these bytes.
    pub fn copy(&mut self, bytes: &[u8]) -> Option<Frame> {
        let mut frame = self.take(bytes.len())?;
        // There is room: it was asked for.
        frame.append(bytes).then_some(frame)
    }

    /// A second frame like this one.
    pub fn duplicate(&mut self, frame: &Frame) -> Option<Frame> {
        let mut copy = self.copy(frame.bytes())?;
        copy.offload = frame.offload;
        Some(copy)
    }

    /// Takes a frame back.
    #[inline]
    pub fn give(&mut self, frame: Frame) {
        self.put(frame);
        self.keep_books();
    }

    /// Takes frames back.
    #[inline]
    pub fn give_all(&mut self, frames: impl Iterator<Item = Frame>) {
        frames.for_each(|frame| self.put(frame));
        self.keep_books();
    }

    #[inline(always)]
    fn put(&mut self, frame: Frame) {
        let chunk = frame.chunk;
        if !Arc::ptr_eq(chunk.region(), &self.region) {
            return; // dropped, it finds home
        }
        let class = chunk.class();
        if self.idle[class as usize].len() >= 2 * BULK[class as usize] {
            self.bring_back(class, BULK[class as usize]);
        }
        self.idle[class as usize].push(chunk);
    }

    #[inline]
    fn chunk(&mut self, class: Class) -> Option<Chunk> {
        let idle = &mut self.idle[class as usize];
        if idle.is_empty() {
            self.region.take(class, BULK[class as usize], idle);
        }
        let chunk = idle.pop()?;
        self.keep_books();
        Some(chunk)
    }

    #[inline]
    fn keep_books(&self) {
        self.count.store(self.idle[0].len() + self.idle[1].len(), Ordering::Relaxed);
    }

    /// The oldest go, being the coldest.
    #[cold]
    fn bring_back(&mut self, class: Class, count: usize) {
        let idle = &mut self.idle[class as usize];
        let count = count.min(idle.len());
        self.region.put_back(class, idle.drain(..count));
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.bring_back(Class::Small, usize::MAX);
        self.bring_back(Class::Large, usize::MAX);
    }
}
