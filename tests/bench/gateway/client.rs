//! A blocking client that does next to nothing besides what is measured: writes a request in one piece, notes
//! when the first byte of the answer's body is there, and reads the rest. It must never take an answer that
//! broke off, or is not the upstream's, for a whole one.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use hotcell::model::Received;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::upstream::Wanted;

/// Longest silence of whoever answers.
const SILENCE_MAX: Duration = Duration::from_secs(60);
/// Bytes read at a time.
const READ_BYTES: usize = 128 << 10;
/// Kept of an answer's end.
const TAIL_BYTES: usize = 256;
/// Headers that are written anew.
const HEADERS_OWN: [&str; 5] = ["host", "content-length", "connection", "x-api-key", "authorization"];

/// Where a proxy is reached.
#[derive(Debug, Clone)]
pub(crate) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
    /// A port on 127.0.0.1 of the network that this process is in.
    Inside {
        pid: u32,
        port: u16,
    },
}

/// An address and the key that it wants.
#[derive(Debug, Clone)]
pub(crate) struct Door {
    pub(crate) address: Address,
    pub(crate) key: String,
}

impl Door {
    pub(crate) fn tcp(address: SocketAddr, key: &str) -> Self {
        Self { address: Address::Tcp(address), key: key.to_owned() }
    }

    /// The recorded request as it is sent here: everything the CLI sent, with this door's key.
    pub(crate) fn request(&self, recorded: &Received, wanted: Wanted) -> Vec<u8> {
        let body = wanted.put_into(&recorded.body);
        let mut request = format!("POST {} HTTP/1.1\r\nhost: 127.0.0.1\r\n", recorded.target);
        for (name, value) in recorded.headers.iter().filter(|(name, _)| !HEADERS_OWN.contains(&name.as_str()))
        {
            request += &format!("{name}: {value}\r\n");
        }
        request += &format!("x-api-key: {}\r\ncontent-length: {}\r\n\r\n", self.key, body.len());
        let mut request = request.into_bytes();
        request.extend_from_slice(&body);
        request
    }
}

trait Stream: Read + Write + Send {}
impl<T: Read + Write + Send> Stream for T {}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Framing {
    Length(u64),
    Chunked,
    Close,
}

/// One connection, kept between requests.
pub(crate) struct Client {
    stream: BufReader<Box<dyn Stream>>,
    framing: Framing,
    /// Bytes left of the chunk, or of the body.
    left: u64,
    line: Vec<u8>,
    tail: Vec<u8>,
}

impl Client {
    pub(crate) fn connect(address: &Address) -> Result<Self> {
        let stream: Box<dyn Stream> = match address {
            Address::Tcp(address) => Box::new(tcp(*address)?),
            Address::Unix(path) => {
                let stream = UnixStream::connect(path).with_context(|| format!("connect to {path:?}"))?;
                stream.set_read_timeout(Some(SILENCE_MAX))?;
                stream.set_write_timeout(Some(SILENCE_MAX))?;
                Box::new(stream)
            }
            Address::Inside { pid, port } => Box::new(tcp_inside(*pid, *port)?),
        };
        let stream = BufReader::with_capacity(READ_BYTES, stream);
        Ok(Self { stream, framing: Framing::Close, left: 0, line: Vec::new(), tail: Vec::new() })
    }

    /// Sends a request; the time until the first byte of the answer's body was there.
    pub(crate) fn begin(&mut self, request: &[u8]) -> Result<Duration> {
        let begun = Instant::now();
        self.stream.get_mut().write_all(request).context("send a request")?;
        self.tail.clear();
        let status = self.head()?;
        if status != 200 {
            let seen = self.stream.fill_buf().unwrap_or_default();
            bail!("answered {status}: {}", String::from_utf8_lossy(&seen[..seen.len().min(500)]));
        }
        match self.framing {
            Framing::Length(bytes) => self.left = bytes,
            Framing::Chunked => self.left = self.chunk()?,
            Framing::Close => self.left = u64::MAX,
        }
        ensure!(self.left > 0 && !self.stream.fill_buf()?.is_empty(), "an answer without a body");
        Ok(begun.elapsed())
    }

    /// Reads the rest of the answer; the bytes of its body.
    pub(crate) fn finish(&mut self) -> Result<u64> {
        let mut bytes = 0;
        loop {
            while self.left > 0 {
                let seen = self.stream.fill_buf().context("read an answer")?;
                if seen.is_empty() {
                    ensure!(self.framing == Framing::Close, "an answer broke off");
                    self.left = 0;
                    break;
                }
                let count = seen.len().min(usize::try_from(self.left).unwrap_or(usize::MAX));
                self.tail.extend_from_slice(&seen[count.saturating_sub(TAIL_BYTES)..count]);
                if self.tail.len() > TAIL_BYTES {
                    self.tail.drain(..self.tail.len() - TAIL_BYTES);
                }
                self.stream.consume(count);
                self.left -= count as u64;
                bytes += count as u64;
            }
            if self.framing != Framing::Chunked {
                break;
            }
            self.read_line()?;
            self.left = self.chunk()?;
            if self.left == 0 {
                self.read_line()?;
                break;
            }
        }
        let whole = memchr::memmem::find(&self.tail, b"message_stop").is_some();
        ensure!(whole, "no end of a message: {}", String::from_utf8_lossy(&self.tail));
        Ok(bytes)
    }

    fn head(&mut self) -> Result<u16> {
        self.framing = Framing::Close;
        self.read_line()?;
        let status = String::from_utf8_lossy(&self.line);
        let status = status.split(' ').nth(1).and_then(|code| code.parse().ok());
        let status =
            status.with_context(|| format!("no status: {:?}", String::from_utf8_lossy(&self.line)))?;
        loop {
            self.read_line()?;
            if self.line.is_empty() {
                return Ok(status);
            }
            self.line.make_ascii_lowercase();
            if let Some(length) = self.line.strip_prefix(b"content-length:") {
                self.framing = Framing::Length(std::str::from_utf8(length)?.trim().parse()?);
            } else if self.line == b"transfer-encoding: chunked" {
                self.framing = Framing::Chunked;
            }
        }
    }

    fn chunk(&mut self) -> Result<u64> {
        self.read_line()?;
        u64::from_str_radix(std::str::from_utf8(&self.line)?.trim(), 16).context("the length of a chunk")
    }

    fn read_line(&mut self) -> Result<()> {
        self.line.clear();
        self.stream.read_until(b'\n', &mut self.line).context("read an answer")?;
        ensure!(self.line.ends_with(b"\n"), "the connection was closed");
        self.line.truncate(self.line.trim_ascii_end().len());
        Ok(())
    }
}

fn tcp(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(address).with_context(|| format!("connect to {address}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    stream.set_write_timeout(Some(SILENCE_MAX))?;
    Ok(stream)
}

/// A socket belongs to the network it was made in, whoever uses it.
fn tcp_inside(pid: u32, port: u16) -> Result<TcpStream> {
    let inside = move || {
        let network = File::open(format!("/proc/{pid}/ns/net"))?;
        move_into_link_name_space(network.as_fd(), Some(LinkNameSpaceType::Network))?;
        tcp(SocketAddr::from(([127, 0, 0, 1], port)))
    };
    // On a thread that ends with it: this one stays where it is.
    std::thread::spawn(inside).join().map_err(|_| anyhow!("the connecting thread died"))?
}
