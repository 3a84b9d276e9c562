//! The daemon's end against a made-up init: handshakes replayed or forged, frames out of order, garbage, and
//! the bookkeeping of stdin. The real hotcell-init is tested in `tests/it/init.rs`.

use std::time::Duration;

use bytes::{BufMut, Bytes};
use hmac::{Hmac, Mac};
use proptest::prelude::*;
use sha2::{Digest, Sha256};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::message::BootMessage;
use super::state::Shared;
use super::stream::Frames;
use super::wire::*;
use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

struct Fixture {
    directory: tempfile::TempDir,
    cell: CellId,
    key: CtlKey,
    link: Link,
}

async fn fixture(resume: Resume) -> Fixture {
    let directory = tempfile::tempdir().expect("a directory");
    let (cell, key) = (CellId::new(1), CtlKey::generate().expect("randomness"));
    let own = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let link = Link::bind(directory.path(), &cell, key.clone(), resume, own).await.expect("a link");
    Fixture { directory, cell, key, link }
}

impl Fixture {
    async fn dial(&self) -> UnixStream {
        UnixStream::connect(self.directory.path().join(SOCKET_NAME)).await.expect("a connection")
    }

    /// Greets and proves, as init does; returns the socket and what was sent, for replays.
    async fn greet(&self, key: &CtlKey, held: Held) -> (UnixStream, Vec<u8>) {
        let mut socket = self.dial().await;
        let init_nonce = [7; 32];
        let cell = self.cell.as_str().as_bytes();
        let mut sent = FromInit::Hello { version: VERSION, nonce: init_nonce, cell: cell.to_vec() }.encode();
        socket.write_all(&sent).await.expect("a greeting");
        let (header, body) = frame(&mut socket).await.expect("a challenge");
        let Ok(ToInit::Challenge { nonce, mac }) = ToInit::decode(&header, &body) else { panic!() };
        let ours = Handshake { key: &self.key.0, cell, init_nonce: &init_nonce, daemon_nonce: &nonce };
        assert!(ours.daemon_is(&mac));
        let theirs = Handshake { key: &key.0, cell, init_nonce: &init_nonce, daemon_nonce: &nonce };
        let proof = FromInit::Proof { held, mac: theirs.init_mac(&held) }.encode();
        sent.extend_from_slice(&proof);
        // It may be hung up before it is done: then the answer says so.
        let _ = socket.write_all(&proof).await;
        (socket, sent)
    }

    async fn connect(&mut self, held: Held) -> UnixStream {
        let (mut socket, _) = self.greet(&self.key.clone(), held).await;
        let (header, body) = frame(&mut socket).await.expect("a welcome");
        assert!(matches!(ToInit::decode(&header, &body), Ok(ToInit::Welcome { .. })));
        while !matches!(self.next().await, LinkEvent::Connected { .. }) {}
        socket
    }

    async fn next(&mut self) -> LinkEvent {
        tokio::time::timeout(PATIENCE, self.link.next()).await.expect("an event in time")
    }
}

async fn frame(socket: &mut UnixStream) -> Option<(Header, Vec<u8>)> {
    let mut head = [0; HEADER_BYTES];
    socket.read_exact(&mut head).await.ok()?;
    let header = Header::parse(&head, BODY_BYTES_MAX).expect("the daemon sends frames");
    let mut body = vec![0; header.body_bytes];
    socket.read_exact(&mut body).await.ok()?;
    Some((header, body))
}

fn output(stream: OutputStream, offset: u64, bytes: &[u8]) -> Vec<u8> {
    [output_header(stream, offset, bytes.len()).as_slice(), bytes].concat()
}

async fn closed(socket: &mut UnixStream) -> bool {
    let mut rest = Vec::new();
    tokio::time::timeout(PATIENCE, socket.read_to_end(&mut rest)).await.is_ok() && rest.is_empty()
}

#[tokio::test]
async fn the_socket_appears_with_owner_and_mode_over_a_stale_one_and_goes() {
    use std::os::unix::fs::MetadataExt;
    let fixture = fixture(Resume::default()).await;
    let path = fixture.directory.path().join(SOCKET_NAME);
    let first = std::fs::metadata(&path).expect("a socket");
    assert_eq!(first.mode() & 0o777, 0o600);
    let own = (first.uid(), first.gid());
    let again =
        Link::bind(fixture.directory.path(), &fixture.cell, fixture.key.clone(), Resume::default(), own)
            .await
            .expect("a second link");
    assert_ne!(std::fs::metadata(&path).expect("a socket").ino(), first.ino());
    again.destroy().await.expect("it ends");
    assert_eq!(std::fs::read_dir(fixture.directory.path()).expect("the directory").count(), 0);
    fixture.link.destroy().await.expect("the socket is gone already");
}

#[tokio::test]
async fn a_deep_state_directory_is_no_obstacle() {
    let directory = tempfile::tempdir().expect("a directory");
    let deep = directory.path().join("d".repeat(120));
    std::fs::create_dir(&deep).expect("a deep directory");
    let own = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    let key = CtlKey::generate().expect("randomness");
    let link = Link::bind(&deep, &CellId::new(1), key, Resume::default(), own).await.expect("a link");
    assert!(deep.join(SOCKET_NAME).exists());
    link.destroy().await.expect("it ends");
}

#[tokio::test]
async fn a_replayed_handshake_is_refused() {
    let mut fixture = fixture(Resume::default()).await;
    let (first, sent) = fixture.greet(&fixture.key.clone(), Held::default()).await;
    drop(first);
    let mut replay = fixture.dial().await;
    replay.write_all(&sent).await.expect("the same bytes");
    frame(&mut replay).await.expect("a fresh challenge");
    assert!(closed(&mut replay).await);
    while fixture.next().await != (LinkEvent::Hostile { what: "a proof without the key" }) {}
    fixture.link.destroy().await.expect("it ends");
}

#[tokio::test]
async fn a_proof_under_another_key_or_about_other_offsets_is_refused() {
    let mut fixture = fixture(Resume { stdout: 10, stderr: 0 }).await;
    let other = CtlKey::generate().expect("randomness");
    let (mut socket, _) = fixture.greet(&other, Held::default()).await;
    assert!(closed(&mut socket).await);
    assert_eq!(fixture.next().await, LinkEvent::Hostile { what: "a proof without the key" });
    // init has forgotten bytes that the journal lacks, or never had what the journal has.
    for (base, end) in [(11, 20), (0, 9)] {
        let held = Held { output_base: [base, 0], output_end: [end, 0], ..Held::default() };
        let (mut socket, _) = fixture.greet(&fixture.key.clone(), held).await;
        assert!(closed(&mut socket).await);
    }
    fixture.link.destroy().await.expect("it ends");
}

#[tokio::test]
async fn a_second_authenticated_connection_waits_for_the_end_of_the_first() {
    let mut fixture = fixture(Resume::default()).await;
    let mut first = fixture.connect(Held::default()).await;
    let (mut second, _) = fixture.greet(&fixture.key.clone(), Held::default()).await;
    assert!(closed(&mut second).await);
    first.write_all(&output(OutputStream::Stdout, 0, b"still here")).await.expect("output");
    let mut event = fixture.next().await;
    if matches!(event, LinkEvent::Hostile { .. }) {
        event = fixture.next().await;
    }
    assert_eq!(event, LinkEvent::Stdout { end: 10, bytes: Bytes::from_static(b"still here") });
    drop(first);
    let held = Held { output_end: [10, 0], ..Held::default() };
    let mut third = fixture.connect(held).await;
    third.write_all(&output(OutputStream::Stdout, 10, b"!")).await.expect("output");
    assert_eq!(fixture.next().await, LinkEvent::Stdout { end: 11, bytes: Bytes::from_static(b"!") });
    fixture.link.destroy().await.expect("it ends");
}

#[tokio::test]
async fn a_new_connection_takes_over_from_one_whose_bytes_nobody_fetches() {
    let mut fixture = fixture(Resume::default()).await;
    let mut first = fixture.connect(Held::default()).await;
    let chunk = vec![b'a'; 1000];
    for n in 0..40 {
        let frame = output(OutputStream::Stdout, n * 1000, &chunk);
        first.write_all(&frame).await.expect("output");
    }
    drop(first);
    // The queue is full: the reader cannot see the end, yet the newcomer is let in once there is room.
    let held = Held { output_end: [40_000, 0], ..Held::default() };
    let (mut second, _) = fixture.greet(&fixture.key.clone(), held).await;
    let mut received = 0;
    loop {
        match fixture.next().await {
            LinkEvent::Stdout { end, bytes } => {
                assert_eq!(end, received + bytes.len() as u64);
                received = end;
            }
            LinkEvent::Connected { .. } => break,
            _ => {}
        }
    }
    let (header, body) = frame(&mut second).await.expect("a welcome");
    assert_eq!(ToInit::decode(&header, &body), Ok(ToInit::Welcome { received: [received, 0] }));
    fixture.link.destroy().await.expect("it ends");
}

#[tokio::test]
async fn frames_that_init_would_not_send_end_the_connection_and_are_reported() {
    let exited = FromInit::Exited(ExitReport {
        status: ExitStatus::Code(0),
        reason: ExitReason::Agent,
        oom_kills: 0,
        peak_memory_bytes: 0,
        cpu_us: 0,
    })
    .encode();
    let bad: Vec<(Vec<u8>, &str)> = vec![
        (output(OutputStream::Stdout, 1, b"gap"), "output out of order"),
        (output(OutputStream::Stderr, 0, b""), "output out of order"),
        (FromInit::StdinAck { offset: 1 }.encode(), "acknowledged input that was not sent"),
        ([exited.clone(), output(OutputStream::Stdout, 0, b"late")].concat(), "output after the end"),
        (
            [exited, FromInit::StepEnded { index: 0, status: ExitStatus::Code(0) }.encode()].concat(),
            "the end of a step after the end",
        ),
        (vec![0xff; 64], "reserved header bytes are not zero"),
        (Header::encode(3, BODY_BYTES_MAX + 1, 0).to_vec(), "frame over the size limit"),
        (Header::encode(99, 0, 0).to_vec(), "unknown frame kind"),
        ([Header::encode(8, 5, STEPS_MAX as u64).as_slice(), &[0; 5]].concat(), "a step over the limit"),
        ([Header::encode(8, 5, 0).as_slice(), &[2, 0, 0, 0, 0]].concat(), "unknown exit status"),
        ([Header::encode(8, 6, 0).as_slice(), &[0; 6]].concat(), "bytes after the end"),
        (ToInit::Step { index: 0 }.encode(), "unknown frame kind"),
        (ToInit::Kill.encode(), "unknown frame kind"),
        (
            FromInit::Proof { held: Held::default(), mac: [0; 32] }.encode(),
            "a handshake frame after the handshake",
        ),
    ];
    for (bytes, expected) in bad {
        let mut fixture = fixture(Resume::default()).await;
        let mut socket = fixture.connect(Held::default()).await;
        let _ = socket.write_all(&bytes).await;
        let mut event = fixture.next().await;
        if matches!(event, LinkEvent::Exited(_)) {
            event = fixture.next().await;
        }
        assert_eq!(event, LinkEvent::Hostile { what: expected });
        assert_eq!(fixture.next().await, LinkEvent::Disconnected);
        fixture.link.destroy().await.expect("it ends");
    }
}

#[tokio::test]
async fn the_report_is_handed_out_once_and_orders_are_repeated_after_a_reconnect() {
    let mut fixture = fixture(Resume::default()).await;
    let failed = FromInit::SpawnFailed { errno: 2, message: "start x".into() };
    fixture.link.handle().kill();
    for round in 0..2 {
        let mut socket = fixture.connect(Held { started: true, ..Held::default() }).await;
        let (header, body) = frame(&mut socket).await.expect("an order");
        assert_eq!(ToInit::decode(&header, &body), Ok(ToInit::Kill));
        socket.write_all(&failed.encode()).await.expect("a report");
        if round == 0 {
            let expected = LinkEvent::SpawnFailed { errno: 2, message: "start x".into() };
            assert_eq!(fixture.next().await, expected);
        }
        drop(socket);
        assert_eq!(fixture.next().await, LinkEvent::Disconnected);
    }
    fixture.link.destroy().await.expect("it ends");
}

/// The orders that wait on a connection, until a last one of ours.
async fn orders(fixture: &Fixture, socket: &mut UnixStream) -> Vec<String> {
    fixture.link.handle().signal(libc::SIGUSR1);
    let mut orders = Vec::new();
    loop {
        let (header, body) = frame(socket).await.expect("an order");
        match ToInit::decode(&header, &body).expect("an order that init accepts") {
            ToInit::Signal { number: libc::SIGUSR1 } => return orders,
            order => orders.push(format!("{order:?}")),
        }
    }
}

#[tokio::test]
async fn a_step_is_asked_for_on_each_connection_until_another_one_or_the_agent_is_and_its_end_told_once() {
    let mut fixture = fixture(Resume::default()).await;
    let handle = fixture.link.handle();
    let ended = |index, code| FromInit::StepEnded { index, status: ExitStatus::Code(code) };
    handle.step(0);
    for round in 0..3 {
        let mut socket = fixture.connect(Held::default()).await;
        assert_eq!(orders(&fixture, &mut socket).await, ["Step { index: 0 }"]);
        // Once by itself and once because it was asked, as init does.
        socket.write_all(&[ended(0, 3).encode(), ended(0, 3).encode()].concat()).await.expect("its end");
        if round == 0 {
            let news = LinkEvent::StepEnded { index: 0, status: ExitStatus::Code(3) };
            assert_eq!(fixture.next().await, news);
        }
        drop(socket);
        assert_eq!(fixture.next().await, LinkEvent::Disconnected);
    }
    handle.resize(24, 80);
    handle.resize(50, 132);
    handle.step(63);
    let mut socket = fixture.connect(Held::default()).await;
    assert_eq!(orders(&fixture, &mut socket).await, ["Step { index: 63 }", "Resize { rows: 50, cols: 132 }"]);
    socket.write_all(&ended(63, -1).encode()).await.expect("its end");
    let news = LinkEvent::StepEnded { index: 63, status: ExitStatus::Code(-1) };
    assert_eq!(fixture.next().await, news);
    handle.start();
    handle.resize(1, 0);
    assert_eq!(orders(&fixture, &mut socket).await, ["Resize { rows: 1, cols: 0 }", "Start"]);
    drop(socket);
    assert_eq!(fixture.next().await, LinkEvent::Disconnected);
    let mut socket = fixture.connect(Held { started: true, ..Held::default() }).await;
    assert_eq!(orders(&fixture, &mut socket).await, ["Resize { rows: 1, cols: 0 }"]);
    drop(socket);
    fixture.link.destroy().await.expect("it ends");
}

fn held_stdin(received: u64, taken: u64) -> Held {
    Held { stdin_received: received, stdin_taken: taken, ..Held::default() }
}

/// The stdin bytes in frames, from the offset of the first.
fn stdin_of(frames: Vec<Bytes>) -> Vec<u8> {
    let all = frames.concat();
    let mut rest = all.as_slice();
    let mut stdin = Vec::new();
    while let Some((head, after)) = rest.split_first_chunk::<HEADER_BYTES>() {
        let header = Header::parse(head, STDIN_CHUNK_BYTES_MAX).expect("a frame that init accepts");
        let (body, after) = after.split_at(header.body_bytes);
        if let Ok(ToInit::Stdin { bytes, .. }) = ToInit::decode(&header, body) {
            stdin.extend_from_slice(bytes);
        }
        rest = after;
    }
    stdin
}

#[test]
fn stdin_is_bounded_and_sent_within_the_window() {
    let shared = Shared::new(Resume::default());
    shared.with(|state| {
        for _ in 0..64 {
            state.stdin(vec![1; 1 << 20].into()).expect("room");
        }
        assert!(matches!(state.stdin(vec![1].into()), Err(LinkError::StdinFull)));
        let mut told = state.connected(&held_stdin(0, 0));
        let mut sent = 0;
        loop {
            let frames = state.frames(&mut told);
            if frames.is_empty() {
                break;
            }
            sent += stdin_of(frames).len();
        }
        assert_eq!(sent, STDIN_WINDOW_BYTES);
        assert!(state.stdin_taken(STDIN_WINDOW_BYTES as u64));
        assert!(!state.frames(&mut told).is_empty());
        assert!(!state.stdin_taken(1));
        state.stdin(vec![1].into()).expect("room again");
    });
}

#[test]
fn stdin_given_again_after_a_restart_begins_where_init_stopped() {
    let shared = Shared::new(Resume::default());
    shared.with(|state| {
        let mut told = state.connected(&held_stdin(6, 4));
        // Without a replay, new bytes follow what init has; a replay from the start is trimmed.
        assert_eq!(state.stdin_at(0, Bytes::from_static(b"0123")).ok(), Some(6));
        assert_eq!(state.stdin_at(4, Bytes::from_static(b"4567")).ok(), Some(8));
        assert!(matches!(
            state.stdin_at(9, Bytes::from_static(b"9")),
            Err(LinkError::StdinOrder { offset: 9, end: 8 })
        ));
        assert_eq!(state.stdin(Bytes::from_static(b"89")).ok(), Some(10));
        assert_eq!(stdin_of(state.frames(&mut told)), b"6789");
        state.close_stdin();
        assert_eq!(state.frames(&mut told), [Bytes::from(ToInit::CloseStdin { offset: 10 }.encode())]);
        assert!(state.stdin(Bytes::from_static(b"x")).is_err());
    });
}

#[test]
fn our_digests_are_those_of_the_crates() {
    proptest!(|(key: [u8; 32], a in proptest::collection::vec(any::<u8>(), 0..300), cut in 0usize..300)| {
        let (left, right) = a.split_at(cut.min(a.len()));
        prop_assert_eq!(hash::sha256(&[left, right]).to_vec(), Sha256::digest(&a).to_vec());
        let mut mac = Hmac::<Sha256>::new_from_slice(&key).expect("any key");
        mac.update(&a);
        prop_assert_eq!(hash::hmac_sha256(&key, &[left, right]).to_vec(), mac.finalize().into_bytes().to_vec());
    });
}

proptest! {
    #[test]
    fn no_bytes_make_the_decoders_panic_or_hold_more_than_a_frame(
        bytes in proptest::collection::vec(any::<u8>(), 0..600),
        kind in 0u8..48,
        chunk in 1usize..64,
    ) {
        let mut framed = Header::encode(kind, bytes.len(), 5).to_vec();
        framed.extend_from_slice(&bytes);
        for input in [&bytes, &framed] {
            let mut frames = Frames::new();
            'input: for piece in input.chunks(chunk) {
                frames.room().put_slice(piece);
                loop {
                    match frames.next() {
                        Ok(Some((header, body))) => {
                            let _ = FromInit::decode(&header, &body);
                            let _ = ToInit::decode(&header, &body);
                        }
                        Ok(None) => break,
                        Err(_) => break 'input,
                    }
                }
                prop_assert!(frames.room().capacity() <= 2 * BODY_BYTES_MAX + (512 << 10));
            }
        }
        let _ = BootMessage::decode(&bytes);
    }

    #[test]
    fn a_boot_message_comes_out_as_it_went_in(
        argv in proptest::collection::vec("[a-z]{1,20}", 1..8),
        env in proptest::collection::vec(("[A-Z]{1,9}", "[^\0]{0,40}"), 0..8),
        steps in proptest::collection::vec(proptest::collection::vec("[a-z]{1,9}", 1..4), 0..=STEPS_MAX),
        terminal in proptest::option::of(any::<(u16, u16)>()),
        pipes: bool,
        cut in any::<prop::sample::Index>(),
    ) {
        let mut boot = Boot::new(CellId::new(3), CtlKey([9; 32]), argv.iter().map(Into::into).collect());
        boot.env = env.iter().map(|(name, value)| (name.into(), value.into())).collect();
        boot.forwards = vec![PortForward { port: 3129, socket: "/.hotcell/api.sock".into() }];
        boot.steps = steps.iter().map(|step| step.iter().map(Into::into).collect()).collect();
        boot.start_now = steps.is_empty();
        (boot.terminal, boot.pipes) = (terminal, pipes && terminal.is_none());
        let encoded = boot.encode().expect("a valid message");
        let (start, body) = encoded.split_first_chunk::<8>().expect("a start");
        prop_assert_eq!(BootMessage::body_bytes(start), Ok(body.len()));
        let decoded = BootMessage::decode(body).expect("it decodes");
        prop_assert_eq!(&decoded.argv, &argv.iter().map(|a| a.as_bytes().to_vec()).collect::<Vec<_>>());
        prop_assert_eq!(decoded.env.len(), env.len());
        let words = |step: &Vec<String>| step.iter().map(|word| word.as_bytes().to_vec()).collect::<Vec<_>>();
        prop_assert_eq!(&decoded.steps, &steps.iter().map(words).collect::<Vec<_>>());
        prop_assert_eq!((decoded.terminal, decoded.pipes), (terminal, boot.pipes));
        prop_assert_eq!(decoded.start_now, boot.start_now);
        prop_assert!(BootMessage::decode(&body[..cut.index(body.len())]).is_err());
    }
}

proptest! {
    #[test]
    fn frames_of_steps_and_sizes_come_out_as_they_went_in(
        index in 0..STEPS_MAX as u32, value: i32, signal: bool, rows: u16, cols: u16, beyond in 64u64..,
    ) {
        let split = |bytes: &[u8]| {
            let header = Header::parse(bytes.first_chunk().expect("a header"), BODY_BYTES_MAX).expect("ours");
            (header, bytes[HEADER_BYTES..].to_vec())
        };
        let status = if signal { ExitStatus::Signal(value) } else { ExitStatus::Code(value) };
        let ended = FromInit::StepEnded { index, status };
        let (header, body) = split(&ended.encode());
        prop_assert_eq!(FromInit::decode(&header, &body), Ok(ended));
        prop_assert!(FromInit::decode(&header, &body[..4]).is_err());
        for order in [ToInit::Step { index }, ToInit::Resize { rows, cols }] {
            let (header, body) = split(&order.encode());
            prop_assert_eq!(ToInit::decode(&header, &body), Ok(order));
            prop_assert!(ToInit::decode(&header, &[0]).is_err());
        }
        let (step, _) = split(&Header::encode(43, 0, beyond));
        prop_assert_eq!(ToInit::decode(&step, &[]), Err(WireError("a step over the limit")));
        let (size, _) = split(&Header::encode(44, 0, beyond | 1 << 32));
        prop_assert_eq!(ToInit::decode(&size, &[]), Err(WireError("terminal size out of range")));
    }
}

#[test]
fn a_key_goes_through_hexadecimal_and_is_not_shown() {
    let key = CtlKey::generate().expect("randomness");
    assert_eq!(CtlKey::from_hex(&key.to_hex()).expect("it parses"), key);
    for bad in ["", "00", &"g".repeat(64), &"é".repeat(32)] {
        assert!(CtlKey::from_hex(bad).is_err());
    }
    let boot = Boot::new(CellId::new(1), key.clone(), vec!["x".into()]);
    assert_eq!(format!("{key:?}"), "CtlKey(…)");
    assert!(!format!("{boot:?}").contains(&key.to_hex()[..8]));
}

#[test]
fn a_boot_message_that_init_would_refuse_is_not_sent() {
    let boot = |change: fn(&mut Boot)| {
        let mut boot = Boot::new(CellId::new(1), CtlKey([1; 32]), vec!["x".into()]);
        change(&mut boot);
        boot.encode()
    };
    assert!(boot(|_| {}).is_ok());
    for change in [
        (|boot| boot.argv.clear()) as fn(&mut Boot),
        |boot| boot.argv.push("a\0b".into()),
        |boot| boot.env.push(("A=B".into(), "c".into())),
        |boot| boot.argv.push("x".repeat(5 << 20).into()),
        |boot| boot.dead_man_ms = 0,
        |boot| boot.buffer_bytes_max = 0,
        |boot| boot.steps = vec![vec!["x".into()]],
        |boot| (boot.start_now, boot.steps) = (false, vec![vec![]]),
        |boot| (boot.start_now, boot.steps) = (false, vec![vec!["".into()]]),
        |boot| (boot.start_now, boot.steps) = (false, vec![vec!["x".into(), "a\0b".into()]]),
        |boot| (boot.start_now, boot.steps) = (false, vec![vec!["x".into()]; STEPS_MAX + 1]),
        |boot| (boot.terminal, boot.pipes) = (Some((24, 80)), true),
    ] {
        assert!(matches!(boot(change), Err(LinkError::Boot { .. })));
    }
}
