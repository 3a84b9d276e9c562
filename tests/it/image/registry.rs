//! A small npm registry on loopback, and archives for it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use base64::Engine as _;
use sha2::{Digest, Sha512};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::task::{JoinHandle, JoinSet};

#[derive(Default)]
struct State {
    /// Path to status, extra header, body.
    pages: BTreeMap<String, (u16, String, Vec<u8>)>,
    requests: u64,
    lists_only: bool,
}

pub(super) struct FakeRegistry {
    port: u16,
    state: Arc<Mutex<State>>,
    server: Option<JoinHandle<()>>,
}

impl FakeRegistry {
    pub(super) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        let server = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                let shared = Arc::clone(&shared);
                connections.spawn(async move {
                    let mut request = Vec::new();
                    while !request.ends_with(b"\r\n\r\n") {
                        match stream.read_u8().await {
                            Ok(byte) if request.len() < 16_384 => request.push(byte),
                            _ => return,
                        }
                    }
                    let request = String::from_utf8_lossy(&request).into_owned();
                    let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
                    let answer = answer(&mut shared.lock().unwrap(), &path);
                    let _gone = stream.write_all(&answer).await;
                });
            }
        });
        Self { port, state, server: Some(server) }
    }

    pub(super) async fn stop(&mut self) {
        if let Some(server) = self.server.take() {
            server.abort();
            assert!(server.await.unwrap_err().is_cancelled());
        }
    }

    pub(super) fn address(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub(super) fn requests(&self) -> u64 {
        self.state.lock().unwrap().requests
    }

    /// Answers only with the list of all versions of a package, as some registries do.
    pub(super) fn lists_only(&self) {
        self.state.lock().unwrap().lists_only = true;
    }

    pub(super) fn publish(&self, package: &str, version: &str, archive: Vec<u8>) {
        let name = package.replace('/', "%2f");
        let file = format!("/files/{}-{version}.tgz", package.replace(['/', '@'], "_"));
        let digest = base64::engine::general_purpose::STANDARD.encode(Sha512::digest(&archive));
        let manifest = serde_json::json!({
            "name": package, "version": version, "scripts": { "install": "never run" },
            "dist": { "tarball": format!("{}{file}", self.address()), "integrity": format!("sha512-{digest}") },
        });
        let list =
            serde_json::json!({ "dist-tags": { "latest": version }, "versions": { version: manifest } });
        let mut state = self.state.lock().unwrap();
        let mut put = |path: String, body: Vec<u8>| state.pages.insert(path, (200, String::new(), body));
        put(format!("/{name}/{version}"), manifest.to_string().into_bytes());
        put(format!("/{name}/latest"), manifest.to_string().into_bytes());
        put(format!("/{name}"), list.to_string().into_bytes());
        put(file, archive);
    }

    /// Changes one byte of a published archive.
    pub(super) fn corrupt(&self, package: &str, version: &str) {
        let file = format!("/files/{}-{version}.tgz", package.replace(['/', '@'], "_"));
        let mut state = self.state.lock().unwrap();
        let last = state.pages.get_mut(&file).unwrap().2.last_mut().unwrap();
        *last ^= 1;
    }

    pub(super) fn redirect(&self, path: &str, to: &str) {
        let page = (302, format!("location: {to}\r\n"), Vec::new());
        self.state.lock().unwrap().pages.insert(path.to_owned(), page);
    }
}

fn answer(state: &mut State, path: &str) -> Vec<u8> {
    state.requests += 1;
    let hidden = state.lists_only && path.matches('/').count() == 2 && !path.starts_with("/files");
    let missing = (404, String::new(), b"{}".to_vec());
    let (status, header, body) = state.pages.get(path).filter(|_| !hidden).unwrap_or(&missing);
    let length = body.len();
    let mut answer =
        format!("HTTP/1.1 {status} X\r\n{header}content-length: {length}\r\nconnection: close\r\n\r\n")
            .into_bytes();
    answer.extend_from_slice(body);
    answer
}

/// An npm archive of these files.
pub(super) fn tarball(files: &[(&str, &[u8], u32)]) -> Vec<u8> {
    let gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    let mut builder = tar::Builder::new(gzip);
    for (name, content, mode) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(*mode);
        builder.append_data(&mut header, format!("package/{name}"), *content).unwrap();
    }
    builder.into_inner().unwrap().finish().unwrap()
}

/// The head of a Linux program for an ELF machine number (62: x86-64, 183: ARM64).
pub(super) fn elf(machine: u16) -> Vec<u8> {
    let mut head = vec![0_u8; 64];
    head[..6].copy_from_slice(b"\x7fELF\x02\x01");
    head[18..20].copy_from_slice(&machine.to_le_bytes());
    head
}
