//! A TCP connection to a server that echoes, with data under way in both directions all the time: each byte that comes back must be
//! the one that is next.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::netns::Netns;
use crate::wait::wait_until;

/// TCP repeats itself ever more seldom; a connection that stands still for longer has not survived.
const PATIENCE: Duration = Duration::from_secs(40);
/// Bytes that are written at once.
const CHUNK: usize = 1 << 10;
/// Between two chunks: an emulated guest has better things to do.
const PAUSE: Duration = Duration::from_millis(2);

/// A running connection.
#[derive(Debug)]
pub struct Echo {
    stop: Arc<AtomicBool>,
    sent: Arc<AtomicU64>,
    echoed: Arc<AtomicU64>,
    stream: TcpStream,
    writer: JoinHandle<Result<()>>,
    reader: JoinHandle<Result<()>>,
}

impl Echo {
    /// Connects to an echo server, and begins.
    ///
    /// # Errors
    /// When there is none within a deadline.
    pub fn start(from: &Netns, address: SocketAddr) -> Result<Echo> {
        let stream = wait_until(&format!("{address} takes a connection"), PATIENCE, || {
            from.enter(|| Ok(Some(TcpStream::connect_timeout(&address, Duration::from_secs(3))?)))
        })?;
        stream.set_read_timeout(Some(PATIENCE))?;
        stream.set_write_timeout(Some(PATIENCE))?;
        let stop = Arc::new(AtomicBool::new(false));
        let (sent, echoed) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
        let writer = {
            let (stream, stop, sent) = (stream.try_clone()?, Arc::clone(&stop), Arc::clone(&sent));
            std::thread::spawn(move || write(stream, &stop, &sent))
        };
        let reader = {
            let (stream, echoed) = (stream.try_clone()?, Arc::clone(&echoed));
            std::thread::spawn(move || read(stream, &echoed))
        };
        Ok(Echo { stop, sent, echoed, stream, writer, reader })
    }

    /// Bytes that have come back so far.
    pub fn echoed(&self) -> u64 {
        self.echoed.load(Ordering::Relaxed)
    }

    /// Waits until so many more bytes have come back.
    ///
    /// # Errors
    /// When they do not in time, or the connection has ended.
    pub fn wait_more(&self, bytes: u64) -> Result<()> {
        let wanted = self.echoed() + bytes;
        wait_until(&format!("{bytes} more bytes are echoed"), PATIENCE, || {
            let echoed = self.echoed();
            if echoed >= wanted { Ok(Some(())) } else { bail!("{echoed} of {wanted}") }
        })
    }

    /// Ends it, and wants all that was sent to have come back; says how much that was.
    ///
    /// # Errors
    /// When it broke, or a byte is missing or another.
    pub fn finish(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.writer.join().map_err(|_| anyhow!("the writer panicked"))??;
        self.reader.join().map_err(|_| anyhow!("the reader panicked"))??;
        let (sent, echoed) = (self.sent.load(Ordering::Relaxed), self.echoed.load(Ordering::Relaxed));
        ensure!(sent == echoed, "{sent} bytes were sent, {echoed} came back");
        Ok(echoed)
    }

    /// Gives it up, whatever has become of it; says how many bytes had come back.
    ///
    /// # Errors
    /// When a byte that had come back is another.
    pub fn give_up(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        // It may have ended by itself.
        let _ = self.stream.shutdown(Shutdown::Both);
        // A connection that was cut fails to write; what it read must be right nevertheless.
        let _ = self.writer.join().map_err(|_| anyhow!("the writer panicked"))?;
        match self.reader.join().map_err(|_| anyhow!("the reader panicked"))? {
            Err(error) if error.downcast_ref::<std::io::Error>().is_none() => Err(error),
            _ => Ok(self.echoed.load(Ordering::Relaxed)),
        }
    }
}

/// The bytes from a position on: no two stretches of them are alike.
fn fill(position: u64, bytes: &mut [u8]) {
    for (byte, at) in bytes.iter_mut().zip(position..) {
        *byte = ((at / 8 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes())[(at % 8) as usize];
    }
}

fn write(mut stream: TcpStream, stop: &AtomicBool, sent: &AtomicU64) -> Result<()> {
    let mut position = 0;
    let mut chunk = [0; CHUNK];
    while !stop.load(Ordering::Relaxed) {
        fill(position, &mut chunk);
        stream.write_all(&chunk).context("sending")?;
        position += CHUNK as u64;
        sent.store(position, Ordering::Relaxed);
        std::thread::sleep(PAUSE);
    }
    stream.shutdown(Shutdown::Write).context("saying that this is all")
}

fn read(mut stream: TcpStream, echoed: &AtomicU64) -> Result<()> {
    let mut position = 0;
    let (mut bytes, mut expected) = ([0; 16 * CHUNK], [0; 16 * CHUNK]);
    loop {
        let length = match stream.read(&mut bytes) {
            Ok(0) => return Ok(()),
            Ok(length) => length,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(error).context("waiting for what was sent"),
        };
        fill(position, &mut expected[..length]);
        ensure!(bytes[..length] == expected[..length], "what comes back after byte {position} is another");
        position += length as u64;
        echoed.store(position, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_tell_where_they_are() {
        let (mut one, mut other) = ([0; 64], [0; 32]);
        fill(1_000, &mut one);
        fill(1_016, &mut other);
        assert_eq!(one[16..48], other, "the same wherever it is cut");
        for shift in 1..32 {
            assert_ne!(one[..32], one[shift..shift + 32], "shifted by {shift}");
        }
    }
}
