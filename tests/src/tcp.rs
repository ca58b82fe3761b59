//! A TCP connection that says whether it lives: small requests, each answered before the next.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::netns::Netns;
use crate::wait::wait_until;

/// Bytes of a request, and of its answer.
const LENGTH: usize = 512;
/// An answer that takes longer has not survived: TCP repeats itself for minutes.
const PATIENCE: Duration = Duration::from_secs(30);

/// A running connection.
#[derive(Debug)]
pub struct Connection {
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
    client: JoinHandle<Result<Duration>>,
    server: JoinHandle<Result<()>>,
}

impl Connection {
    /// Connects from one namespace to an address in another, and asks every few milliseconds.
    ///
    /// # Errors
    /// When it cannot be made.
    pub fn start(from: &Netns, to: &Netns, address: SocketAddr, pause: Duration) -> Result<Connection> {
        let listener = to.enter(|| TcpListener::bind(address).context("listening"))?;
        let server = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept()?;
            stream.set_nodelay(true)?;
            let mut buffer = [0; LENGTH];
            loop {
                match stream.read_exact(&mut buffer) {
                    Ok(()) => stream.write_all(&buffer)?,
                    // The client has finished.
                    Err(_) => return Ok(()),
                }
            }
        });
        let mut stream =
            from.enter(|| TcpStream::connect_timeout(&address, PATIENCE).context("connecting"))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let (stop, answered) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let client = {
            let (stop, answered) = (Arc::clone(&stop), Arc::clone(&answered));
            std::thread::spawn(move || ask(&mut stream, &stop, &answered, pause))
        };
        Ok(Connection { stop, answered, client, server })
    }

    /// Requests answered so far.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Waits until so many more requests are answered.
    ///
    /// # Errors
    /// When they are not in time.
    pub fn wait_more(&self, requests: u64, patience: Duration) -> Result<()> {
        let wanted = self.answered() + requests;
        wait_until(&format!("{requests} more requests are answered"), patience, || {
            ensure!(!self.client.is_finished(), "the connection has ended");
            let answered = self.answered();
            if answered >= wanted { Ok(Some(())) } else { bail!("{answered} of {wanted}") }
        })
    }

    /// Ends it; says how many requests were answered, and what the slowest took.
    ///
    /// # Errors
    /// When it has not survived.
    pub fn finish(self) -> Result<(u64, Duration)> {
        self.stop.store(true, Ordering::Relaxed);
        let slowest = self.client.join().map_err(|_| anyhow!("the client panicked"))??;
        self.server.join().map_err(|_| anyhow!("the server panicked"))??;
        Ok((self.answered.load(Ordering::Relaxed), slowest))
    }
}

fn ask(stream: &mut TcpStream, stop: &AtomicBool, answered: &AtomicU64, pause: Duration) -> Result<Duration> {
    let mut slowest = Duration::ZERO;
    let mut number = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let mut request = [0; LENGTH];
        request[..8].copy_from_slice(&number.to_be_bytes());
        let asked = Instant::now();
        stream.write_all(&request).context("asking")?;
        let mut answer = [0; LENGTH];
        stream.read_exact(&mut answer).with_context(|| format!("waiting for answer {number}"))?;
        ensure!(answer == request, "answer {number} is another");
        slowest = slowest.max(asked.elapsed());
        number += 1;
        answered.store(number, Ordering::Relaxed);
        std::thread::sleep(pause);
    }
    Ok(slowest)
}
