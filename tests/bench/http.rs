//! The smallest client of the daemon's socket: one request at a time, blocking, so that what is measured is
//! the daemon and not a client. It understands what the daemon sends (lengths and chunks) and nothing else.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// Longest silence of the daemon.
const SILENCE_MAX: Duration = Duration::from_secs(120);
/// Bytes read at a time.
const READ_BYTES: usize = 512 * 1024;

/// One connection, kept open between requests.
pub(crate) struct Client {
    stream: BufReader<UnixStream>,
}

/// How the body of an answer ends.
enum Framing {
    Length(usize),
    Chunked,
}

impl Client {
    pub(crate) fn connect(socket: &Path) -> Result<Self> {
        let stream = UnixStream::connect(socket).context("connect to the daemon")?;
        stream.set_read_timeout(Some(SILENCE_MAX))?;
        Ok(Self { stream: BufReader::with_capacity(READ_BYTES, stream) })
    }

    /// One request; status and whole body.
    pub(crate) fn call(&mut self, method: &str, path: &str, body: &str) -> Result<(u16, Vec<u8>)> {
        let (status, framing) = self.send(method, path, body)?;
        let mut bytes = Vec::new();
        match framing {
            Framing::Length(length) => {
                bytes.resize(length, 0);
                self.stream.read_exact(&mut bytes)?;
            }
            Framing::Chunked => {
                let mut chunks = Chunks { stream: &mut self.stream, left: 0, over: false };
                chunks.read_to_end(&mut bytes)?;
            }
        }
        Ok((status, bytes))
    }

    /// A request for a stream of lines; `line` gets each without its line feed.
    pub(crate) fn lines(mut self, path: &str, mut line: impl FnMut(&[u8]) -> Result<()>) -> Result<()> {
        let (status, framing) = self.send("GET", path, "")?;
        if status != 200 || !matches!(framing, Framing::Chunked) {
            bail!("the daemon answered {status} to {path}");
        }
        let mut chunks = Chunks { stream: &mut self.stream, left: 0, over: false };
        let mut block = vec![0; READ_BYTES];
        let mut part = Vec::new();
        loop {
            let count = chunks.read(&mut block)?;
            if count == 0 {
                return if part.is_empty() { Ok(()) } else { bail!("the stream ends within a line") };
            }
            let mut rest = &block[..count];
            while let Some(at) = memchr::memchr(b'\n', rest) {
                if part.is_empty() {
                    line(&rest[..at])?;
                } else {
                    part.extend_from_slice(&rest[..at]);
                    line(&part)?;
                    part.clear();
                }
                rest = &rest[at + 1..];
            }
            part.extend_from_slice(rest);
        }
    }

    fn send(&mut self, method: &str, path: &str, body: &str) -> Result<(u16, Framing)> {
        let length = body.len();
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: hotcell\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n{body}"
        );
        self.stream.get_mut().write_all(request.as_bytes())?;
        let mut status = None;
        let mut framing = Framing::Length(0);
        loop {
            let mut line = String::new();
            if self.stream.read_line(&mut line)? == 0 {
                bail!("the daemon closed the connection");
            }
            let line = line.trim_end().to_ascii_lowercase();
            if let Some(rest) = line.strip_prefix("http/1.1 ") {
                status = rest.split(' ').next().and_then(|code| code.parse::<u16>().ok());
            } else if let Some(rest) = line.strip_prefix("content-length:") {
                framing = Framing::Length(rest.trim().parse()?);
            } else if line == "transfer-encoding: chunked" {
                framing = Framing::Chunked;
            } else if line.is_empty() {
                return Ok((status.context("no status line")?, framing));
            }
        }
    }
}

/// The content of a chunked body.
struct Chunks<'a> {
    stream: &'a mut BufReader<UnixStream>,
    left: usize,
    over: bool,
}

impl Read for Chunks<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while self.left == 0 {
            if self.over {
                return Ok(0);
            }
            let mut line = String::new();
            self.stream.read_line(&mut line)?;
            // The line feed after the chunk before.
            if line == "\r\n" {
                continue;
            }
            let size = usize::from_str_radix(line.trim(), 16);
            self.left =
                size.map_err(|_| io::Error::new(io::ErrorKind::UnexpectedEof, "the stream was cut"))?;
            if self.left == 0 {
                self.over = true;
                self.stream.read_line(&mut String::new())?;
            }
        }
        let want = self.left.min(into.len());
        let count = self.stream.read(&mut into[..want])?;
        if count == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= count;
        Ok(count)
    }
}
