//! The gateway beside what else stands between a client and a model's API: nothing at all, nginx, mitmproxy,
//! LiteLLM's proxy. The same request, recorded from the real CLI, and the same upstream for all, in turn:
//! added time to the first byte, requests, streamed bytes, memory.
//!
//! hotcell is measured whole: the real daemon with its store and journal and real cells, at a cell's socket
//! and from inside the cells (where hotcell-init carries the bytes). *Per core* is per second of processor time
//! that the proxy's processes used, hotcell-init's included where it carries.
//!
//! `BENCH_GATEWAY_N` (requests one by one), `BENCH_GATEWAY_S` (seconds under load, and three rounds of them),
//! `BENCH_GATEWAY_MB` (size of a long answer), `BENCH_GATEWAY_STREAMS`, `BENCH_GATEWAY_CELLS`.

mod cells;
mod client;
mod peers;
pub(crate) mod process;
mod upstream;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Barrier, Mutex};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use hotcell::model::Received;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::report::{Bar, Row, Samples};
use crate::setup::setting;
use cells::{Cells, KEY, MODEL};
use client::{Client, Door};
use process::{cpu_s, family, forget_peak, peak_mb, resident_mb};
use upstream::{Upstream, Wanted};

/// See [`upstream::run_if_told`].
pub(crate) fn run_if_told() -> bool {
    let told = upstream::told();
    if told {
        many_descriptors().expect("descriptors");
        upstream::run();
    }
    told
}

/// Connections that ask at the same time.
const CONNECTIONS: usize = 16;
/// Rounds of load and of long answers; what is reported is their median.
const ROUNDS: usize = 3;
/// Requests before it counts: pools fill, Python's caches warm.
const WARM_UP: usize = 20;
/// Who opens streams at the same time.
const OPENERS: usize = 8;
/// How long all streams are held open.
const HELD: Duration = Duration::from_secs(5);

/// Bars of the project.
const ADDED_MS_MAX: (f64, f64) = (0.5, 2.0);
const TIMES_THE_PYTHONS_MIN: f64 = 10.0;
const STREAMS_MB_MAX: f64 = 100.0;

/// One way from a client to the upstream.
struct Road {
    name: &'static str,
    doors: Vec<Door>,
    /// Whose processor time and memory it costs.
    pids: Vec<u32>,
    found: Found,
}

/// What was measured of a road.
#[derive(Default)]
struct Found {
    first_byte_ms: Vec<f64>,
    per_s: Samples,
    per_core: Samples,
    streamed: Samples,
    idle_mb: f64,
    streams_mb: f64,
    /// So many were open.
    streams: usize,
}

impl Road {
    fn new(name: &'static str, doors: Vec<Door>, pids: Vec<u32>) -> Self {
        Self { name, doors, pids, found: Found::default() }
    }
}

const DIRECT: usize = 0;
const SOCKET: usize = 1;
const INSIDE: usize = 2;
const MITMPROXY: usize = 4;
const LITELLM: usize = 5;

/// All of it.
pub(crate) fn measure() -> Result<Vec<Row>> {
    let (streams, cells) = (setting("BENCH_GATEWAY_STREAMS", 1000), setting("BENCH_GATEWAY_CELLS", 50));
    let dir = tempfile::tempdir()?;
    let upstream = Upstream::start(KEY)?;
    let to = upstream.address;
    // Before the limit is raised here: the daemon has to do that itself.
    let (mut hotcell, recorded) = Cells::start(dir.path(), cells, &upstream)?;
    let daemon = hotcell.daemon();
    let idle_mb = resident_mb(&[daemon])?;
    many_descriptors()?;
    let nginx = peers::nginx(dir.path(), to, KEY)?;
    let mitmproxy = peers::mitmproxy(dir.path(), to, KEY)?;
    let litellm = peers::litellm(dir.path(), to, KEY, MODEL)?;
    hotcell.open(cells)?;
    let with_inits = [daemon].into_iter().chain(hotcell.inits.iter().copied()).collect();
    let peer = |name, process: &process::Process| {
        Road::new(name, vec![Door::tcp(process.address, "any")], family(process.pid()))
    };
    let mut roads = [
        Road::new("direct", vec![Door::tcp(to, KEY)], Vec::new()),
        Road::new("hotcell", hotcell.sockets.clone(), vec![daemon]),
        Road::new("hotcell, from a cell", hotcell.ports.clone(), with_inits),
        peer("nginx", &nginx),
        peer("mitmproxy", &mitmproxy),
        peer("LiteLLM", &litellm),
    ];
    for road in &mut roads[MITMPROXY - 1..] {
        road.found.idle_mb = resident_mb(&road.pids)?;
    }
    roads[SOCKET].found.idle_mb = idle_mb;
    let said = |error: anyhow::Error| error.context(hotcell.log());
    one_by_one(&mut roads, &recorded).map_err(said)?;
    eprintln!("gateway: under load …");
    under_load(&mut roads, &recorded).map_err(said)?;
    eprintln!("gateway: long answers …");
    long_answers(&mut roads, &recorded).map_err(said)?;
    eprintln!("gateway: {streams} streams …");
    // The daemon's memory is the same whichever way its streams come in.
    roads[INSIDE].pids = vec![daemon];
    for (at, road) in roads.iter_mut().enumerate().skip(INSIDE) {
        let opened = open_streams(road, &recorded, &upstream, streams);
        match opened.with_context(|| format!("{}: {} of {streams} streams", road.name, road.found.streams)) {
            Err(error) if at == INSIDE => return Err(said(error)),
            // Those of others that do not carry so many are shown with as many as they did.
            Err(error) => eprintln!("gateway: {error:#}"),
            Ok(()) => {}
        }
    }
    let init_mb = hotcell.inits.iter().map(|pid| peak_mb(&[*pid])).collect::<Result<Vec<_>>>()?;
    hotcell.end()?;
    let init_mb = init_mb.into_iter().fold(0.0, f64::max);
    Ok(rows(&roads, recorded.body.len(), streams, cells, init_mb))
}

/// Every stream is a descriptor here, and two in a proxy.
fn many_descriptors() -> Result<()> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    Ok(setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?)
}

/// One request at a time, a round of all roads after another, each time in another order.
fn one_by_one(roads: &mut [Road], recorded: &Received) -> Result<()> {
    let n = setting("BENCH_GATEWAY_N", 1000) as usize;
    let mut ends = roads
        .iter()
        .map(|road| {
            Ok((Client::connect(&road.doors[0].address)?, road.doors[0].request(recorded, Wanted::Short)))
        })
        .collect::<Result<Vec<_>>>()?;
    for round in 0..WARM_UP + n {
        for step in 0..roads.len() {
            let at = (round + step) % roads.len();
            let (client, request) = &mut ends[at];
            let first_byte = client.begin(request).and_then(|time| client.finish().map(|_| time));
            let first_byte = first_byte.with_context(|| format!("{}: request {round}", roads[at].name))?;
            if round >= WARM_UP {
                roads[at].found.first_byte_ms.push(first_byte.as_secs_f64() * 1000.0);
            }
        }
    }
    Ok(())
}

/// As many requests as go through [`CONNECTIONS`] connections.
fn under_load(roads: &mut [Road], recorded: &Received) -> Result<()> {
    let time = Duration::from_secs(setting("BENCH_GATEWAY_S", 3));
    for _ in 0..ROUNDS {
        for road in roads.iter_mut() {
            let (per_s, per_core) =
                load(road, recorded, time).with_context(|| format!("{}: load", road.name))?;
            road.found.per_s.push(per_s);
            road.found.per_core.push(per_core);
        }
    }
    Ok(())
}

/// Requests a second: by the clock, and by the proxy's processor time.
fn load(road: &Road, recorded: &Received, time: Duration) -> Result<(f64, f64)> {
    let (start, count) = (Barrier::new(CONNECTIONS + 1), AtomicU64::new(0));
    let mut clients = (0..CONNECTIONS)
        .map(|index| {
            let door = &road.doors[index % road.doors.len()];
            let request = door.request(recorded, Wanted::Short);
            let mut client = Client::connect(&door.address)?;
            client.begin(&request)?;
            client.finish()?;
            Ok((client, request))
        })
        .collect::<Result<Vec<_>>>()?;
    let (begun, cpu) = std::thread::scope(|scope| {
        let ask = |(client, request): &mut (Client, Vec<u8>)| {
            start.wait();
            let end = Instant::now() + time;
            while Instant::now() < end {
                client.begin(request)?;
                client.finish()?;
                count.fetch_add(1, Ordering::Relaxed);
            }
            anyhow::Ok(())
        };
        let askers: Vec<_> = clients.iter_mut().map(|client| scope.spawn(move || ask(client))).collect();
        let cpu = cpu_s(&road.pids);
        start.wait();
        let begun = Instant::now();
        for asker in askers {
            asker.join().map_err(|_| anyhow!("a client died"))??;
        }
        anyhow::Ok((begun, cpu?))
    })?;
    let count = count.into_inner() as f64;
    let used_s = cpu_s(&road.pids)? - cpu;
    Ok((count / begun.elapsed().as_secs_f64(), count / used_s))
}

/// One long answer at a time, in MB/s from its first byte.
fn long_answers(roads: &mut [Road], recorded: &Received) -> Result<()> {
    let megabytes = setting("BENCH_GATEWAY_MB", 16).clamp(1, 999) as u16;
    for _ in 0..ROUNDS {
        for road in roads.iter_mut() {
            let door = &road.doors[0];
            let mut client = Client::connect(&door.address)?;
            let request = door.request(recorded, Wanted::Long(megabytes));
            let begun = client.begin(&request).map(|_| Instant::now());
            let whole = begun.and_then(|begun| Ok((client.finish()?, begun.elapsed())));
            let (bytes, took) = whole.with_context(|| format!("{}: a long answer", road.name))?;
            road.found.streamed.push(bytes as f64 / 1e6 / took.as_secs_f64());
        }
    }
    Ok(())
}

/// So many answers under way at once; the most memory that was resident from the first to the last of them. A
/// road that has no more to give is left with those that it carried.
fn open_streams(road: &mut Road, recorded: &Received, upstream: &Upstream, streams: u64) -> Result<()> {
    forget_peak(&road.pids)?;
    let next = AtomicU64::new(0);
    let (opened, failed) = (Mutex::new(Vec::new()), Mutex::new(None));
    let open = |index: u64| {
        let door = &road.doors[index as usize % road.doors.len()];
        let mut client = Client::connect(&door.address)?;
        client.begin(&door.request(recorded, Wanted::Hold)).with_context(|| format!("stream {index}"))?;
        opened.lock().map_err(|_| anyhow!("a client died"))?.push(client);
        anyhow::Ok(())
    };
    std::thread::scope(|scope| {
        for _ in 0..OPENERS {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= streams {
                        return;
                    }
                    if let Err(error) = open(index) {
                        next.store(streams, Ordering::Relaxed);
                        failed.lock().expect("no panic").get_or_insert(error);
                    }
                }
            });
        }
    });
    std::thread::sleep(HELD);
    road.found.streams_mb = peak_mb(&road.pids)?;
    upstream.release()?;
    let mut all: Vec<Client> = opened.into_inner().map_err(|_| anyhow!("a client died"))?;
    road.found.streams = all.len();
    // All must have come to their end, whole.
    let ended = all.iter_mut().try_for_each(|client| client.finish().map(drop));
    failed.into_inner().map_err(|_| anyhow!("a client died"))?.map_or(ended, Err)
}

/// How much later than the direct one of the same round.
fn added(road: &Road, direct: &Road) -> Samples {
    road.found.first_byte_ms.iter().zip(&direct.found.first_byte_ms).map(|(a, b)| a - b).collect()
}

fn rows(roads: &[Road], request_bytes: usize, streams: u64, cells: u64, init_mb: f64) -> Vec<Row> {
    let kb = request_bytes / 1000;
    let direct = &roads[DIRECT];
    let alone: Samples = direct.found.first_byte_ms.iter().copied().collect();
    let mut rows = vec![
        Row::median(format!("direct: first byte, {kb} KB request"), &alone, "ms"),
        Row::one("direct: first byte, p99", alone.percentile(99), "ms"),
    ];
    for (at, road) in roads.iter().enumerate().skip(1) {
        let added = added(road, direct);
        let half = Row::median(format!("{}: added to the first byte", road.name), &added, "ms");
        let late = Row::one(format!("{}: added, p99", road.name), added.percentile(99), "ms");
        let ours = matches!(at, SOCKET | INSIDE);
        rows.push(if ours { half.bar(Bar::ValueAtMost(ADDED_MS_MAX.0)) } else { half });
        rows.push(if ours { late.bar(Bar::ValueAtMost(ADDED_MS_MAX.1)) } else { late });
    }
    for road in roads {
        let name = format!("{}: requests, {CONNECTIONS} connections", road.name);
        rows.push(Row::median(name, &road.found.per_s, "req/s").against("direct", &direct.found.per_s));
    }
    for (at, road) in roads.iter().enumerate().skip(1) {
        let row = |road: &Road| {
            Row::median(format!("{}: requests per core", road.name), &road.found.per_core, "req/s")
        };
        if matches!(at, SOCKET | INSIDE) {
            for peer in [&roads[MITMPROXY], &roads[LITELLM]] {
                let bar = Bar::RatioAtLeast(TIMES_THE_PYTHONS_MIN);
                rows.push(row(road).against(peer.name, &peer.found.per_core).bar(bar));
            }
        } else {
            rows.push(row(road));
        }
    }
    for road in roads {
        let name = format!("{}: a long answer", road.name);
        rows.push(Row::median(name, &road.found.streamed, "MB/s").against("direct", &direct.found.streamed));
    }
    rows.push(Row::one("hotcell: resident, no cell", roads[SOCKET].found.idle_mb, "MB"));
    rows.extend(
        roads[INSIDE + 1..]
            .iter()
            .map(|road| Row::one(format!("{}: resident, idle", road.name), road.found.idle_mb, "MB")),
    );
    let ours = format!("hotcell: most resident, {streams} streams, {cells} cells");
    rows.push(Row::one(ours, roads[INSIDE].found.streams_mb, "MB").bar(Bar::ValueAtMost(STREAMS_MB_MAX)));
    rows.extend(roads[INSIDE + 1..].iter().map(|road| {
        let name = format!("{}: most resident, {} streams", road.name, road.found.streams);
        Row::one(name, road.found.streams_mb, "MB")
    }));
    rows.push(Row::one("hotcell-init: most resident in any cell", init_mb, "MB"));
    rows
}
