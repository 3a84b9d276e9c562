//! The store against a model of it, kill -9, a full disk and damaged files.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io::{BufRead, BufReader};

use proptest::prelude::*;
use tempfile::TempDir;

use super::ledger::Settled;
use super::ledger::tests::{job_limit, reservation};
use super::*;
use crate::event::Totals;
use crate::job::{CellId, Identity, Input, Outcome, StopReason};
use crate::money::Scope;
use crate::pricing::Usage;

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

pub(super) fn new_job(n: u64, uid: u32) -> NewJob {
    NewJob {
        id: JobId::new(n, 0),
        identity: Identity { uid, gid: uid, groups: vec![4, 24] },
        priority: 0,
        spec_json: r#"{"task":"x"}"#.to_owned(),
        plan_json: "{}".to_owned(),
        policy: "default".to_owned(),
        model: "m".to_owned(),
        labels: BTreeMap::new(),
        batch: None,
        idem: None,
        created_ms: n,
    }
}

fn cell_row(job: &JobId, random: u64) -> CellRow {
    CellRow {
        cell: CellId::new(random),
        job: job.clone(),
        attempt: 1,
        container: None,
        ctl_key: vec![1; 32],
        token: "secret-token".to_owned(),
        cell_uid: 0x6000_0001,
        runtime: Some(crate::job::spec::Runtime::Runsc),
        created_boot_ms: 1,
        gone_ms: None,
    }
}

pub(super) async fn open(dir: &TempDir) -> Store {
    Store::open(dir.path()).await.unwrap()
}

#[tokio::test]
async fn a_job_goes_its_way_and_is_found_again_after_a_restart() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir).await;
    let instance = store.instance().clone();
    let mut job = new_job(1, 1000);
    job.labels.insert("batch".to_owned(), "b1".to_owned());
    let id = job.id.clone();
    assert_eq!(store.submit(job.clone()).await.unwrap(), Submitted::New(id.clone()));
    assert_eq!(store.oldest_queued_ms().await.unwrap(), Some(1));
    let state = store.transition(&id, &State::Queued, &Input::Admit, Some(2), 10).await.unwrap();
    let state = store.transition(&id, &state, &Input::Booted, None, 20).await.unwrap();
    store.set_state_seq(&id, &state, 3).await.unwrap();
    assert_eq!(store.job(&id).await.unwrap().unwrap().row.state_seq, Some(3));
    let state = store.transition(&id, &state, &Input::CellEnded, Some(4), 30).await.unwrap();
    let totals = Totals { turns: 3, ..Totals::default() };
    let summary = crate::change::Summary { added: 2, ..crate::change::Summary::default() };
    let early = store.found_changes(&id, summary.clone()).await;
    assert!(matches!(early, Err(StoreError::NotDone { .. })), "{early:?}");
    let answer = Some("ä".repeat(jobs::RESULT_BYTES_MAX));
    store.finish(&id, &state, Outcome::Succeeded, totals.clone(), answer, Some(5), 40).await.unwrap();
    store.close().await.unwrap();

    let store = open(&dir).await;
    assert_eq!(store.instance(), &instance);
    let found = store.job(&id).await.unwrap().unwrap();
    assert_eq!(found.row.state, State::Done(Outcome::Succeeded));
    assert_eq!((found.row.started_ms, found.row.ended_ms), (Some(10), Some(40)));
    assert_eq!((found.row.state_seq, found.row.totals), (Some(5), Some(totals)));
    assert_eq!((found.row.identity, found.row.labels), (job.identity, job.labels));
    assert_eq!(found.spec_json, job.spec_json);
    store.found_changes(&id, summary.clone()).await.unwrap();
    let later = store.job(&id).await.unwrap().unwrap().row.totals;
    assert_eq!(later.map(|totals| (totals.turns, totals.changes)), Some((3, Some(summary))));
    assert_eq!(found.result_text.map(|text| text.len()), Some(jobs::RESULT_BYTES_MAX));
    assert_eq!(store.counts_by_state().await.unwrap()["done"], 1);
    assert_eq!(store.oldest_queued_ms().await.unwrap(), None);
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_move_from_a_state_the_job_is_not_in_changes_nothing() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir).await;
    let job = new_job(1, 1000);
    store.submit(job.clone()).await.unwrap();
    let moved = store.transition(&job.id, &State::Running, &Input::CellEnded, None, 1).await;
    assert_eq!(moved, Err(StoreError::Conflict { actual: Box::new(State::Queued) }));
    let illegal = store.transition(&job.id, &State::Queued, &Input::Booted, None, 1).await;
    assert!(matches!(illegal, Err(StoreError::Illegal(_))));
    let (before, after) = store.stop(&job.id, StopReason::Cancelled, 5).await.unwrap();
    let ended = State::Done(Outcome::Stopped { reason: StopReason::Cancelled });
    assert_eq!((before, &after), (State::Queued, &ended));
    assert!(matches!(store.stop(&job.id, StopReason::Deadline, 6).await, Err(StoreError::Illegal(_))));
    assert_eq!(store.job(&job.id).await.unwrap().unwrap().row.ended_ms, Some(5));
    let nobody = JobId::new(9, 9);
    let missing = store.stop(&nobody, StopReason::Cancelled, 1).await;
    assert_eq!(missing, Err(StoreError::NoSuchJob { job: nobody.clone() }));
    assert!(store.job(&nobody).await.unwrap().is_none());
    store.close().await.unwrap();
}

#[tokio::test]
async fn of_many_admissions_at_once_one_wins() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir).await;
    let job = new_job(1, 1000);
    store.submit(job.clone()).await.unwrap();
    let mut tries = tokio::task::JoinSet::new();
    for _ in 0..100 {
        let (store, id) = (store.clone(), job.id.clone());
        tries.spawn(async move { store.transition(&id, &State::Queued, &Input::Admit, None, 1).await });
    }
    let results = tries.join_all().await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 1);
    let lost = Err(StoreError::Conflict { actual: Box::new(State::Preparing) });
    assert_eq!(results.iter().filter(|result| **result == lost).count(), 99);
    store.close().await.unwrap();
}

#[tokio::test]
async fn an_idempotency_key_names_one_job_of_one_user() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir).await;
    let with_key = |n, uid, hash| NewJob { idem: Some(("k".to_owned(), [hash; 32])), ..new_job(n, uid) };
    let first = JobId::new(1, 0);
    assert_eq!(store.submit(with_key(1, 1000, 7)).await, Ok(Submitted::New(first.clone())));
    assert_eq!(store.submit(with_key(2, 1000, 7)).await, Ok(Submitted::Existing(first.clone())));
    let conflict = Err(StoreError::IdempotencyConflict { existing: first });
    assert_eq!(store.submit(with_key(3, 1000, 8)).await, conflict);
    assert_eq!(store.submit(with_key(4, 1001, 8)).await, Ok(Submitted::New(JobId::new(4, 0))));
    assert_eq!(store.jobs(Filter::default()).await.unwrap().rows.len(), 2);
    store.close().await.unwrap();
}

#[tokio::test]
async fn pages_are_newest_first_and_stay_stable() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir).await;
    for n in 0..50_u64 {
        let mut job = new_job(n, 1000 + (n % 2) as u32);
        job.labels.insert("batch".to_owned(), format!("b{}", n % 3));
        job.labels.insert("owner's \"key\"".to_owned(), "v".to_owned());
        if n % 5 == 0 {
            job.policy = "trusted".to_owned();
        }
        store.submit(job).await.unwrap();
    }
    let mut seen = Vec::new();
    let mut filter = Filter { uid: Some(1000), limit: 7, ..Filter::default() };
    loop {
        let page = store.jobs(filter.clone()).await.unwrap();
        seen.extend(page.rows.iter().map(|row| row.created_ms));
        // A job that comes in between belongs to none of the later pages.
        store.submit(new_job(1000 + seen.len() as u64, 1000)).await.unwrap();
        let Some(cursor) = page.next_cursor else { break };
        filter.cursor = Some(cursor.to_string().parse().unwrap());
    }
    assert_eq!(seen, (0..50).rev().filter(|n| n % 2 == 0).collect::<Vec<u64>>());

    let labels = vec![("batch".to_owned(), "b0".to_owned()), ("owner's \"key\"".to_owned(), "v".to_owned())];
    let filter = Filter {
        labels,
        policy: Some("trusted".to_owned()),
        model: Some("m".to_owned()),
        states: Some(vec!["queued".to_owned(), "done".to_owned()]),
        since_ms: Some(15),
        until_ms: Some(45),
        ..Filter::default()
    };
    let found = store.jobs(filter.clone()).await.unwrap();
    assert_eq!(found.rows.iter().map(|row| row.created_ms).collect::<Vec<_>>(), [30, 15]);
    assert_eq!(found.next_cursor, None);
    let none = Filter { states: Some(vec!["running".to_owned()]), ..filter };
    assert!(store.jobs(none).await.unwrap().rows.is_empty());
    let fifo = store.open_jobs().await.unwrap();
    assert!(fifo.windows(2).all(|pair| pair[0].id < pair[1].id));
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_cell_is_known_until_it_is_gone_and_keeps_its_job() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir).await;
    let job = new_job(1, 1000);
    store.submit(job.clone()).await.unwrap();
    let row = cell_row(&job.id, 5);
    assert!(!format!("{row:?}").contains("secret"));
    store.put_cell(row.clone()).await.unwrap();
    assert!(store.put_cell(row.clone()).await.is_err());
    assert!(store.put_cell(cell_row(&JobId::new(77, 0), 6)).await.is_err(), "a cell of no job");
    store.set_container(&row.cell, "abc").await.unwrap();
    let with_container = CellRow { container: Some("abc".to_owned()), ..row.clone() };
    assert_eq!(store.live_cells().await.unwrap(), std::slice::from_ref(&with_container));
    assert_eq!(store.cell_of(&job.id).await.unwrap(), Some(with_container.clone()));
    let errand = CellRow { runtime: None, gone_ms: Some(8), ..cell_row(&job.id, 6) };
    store.put_cell(errand.clone()).await.unwrap();
    assert_eq!(store.cell_of(&job.id).await.unwrap(), Some(errand));
    assert_eq!(store.agent_cell_of(&job.id).await.unwrap(), Some(with_container), "not the one of an errand");
    assert_eq!(store.delete(&job.id).await, Err(StoreError::NotDone { state: "queued".to_owned() }));
    store.stop(&job.id, StopReason::Cancelled, 1).await.unwrap();
    assert_eq!(store.delete(&job.id).await, Err(StoreError::CellsLeft));
    store.cell_gone(&row.cell, 9).await.unwrap();
    store.cell_gone(&row.cell, 10).await.unwrap();
    assert_eq!(store.agent_cell_of(&job.id).await.unwrap().unwrap().gone_ms, Some(9));
    assert!(store.live_cells().await.unwrap().is_empty());
    store.delete(&job.id).await.unwrap();
    assert!(store.job(&job.id).await.unwrap().is_none());
    assert!(store.cell_of(&job.id).await.unwrap().is_none());
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_budget_is_a_bound_and_nothing_is_charged_too_little() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir).await;
    let job = new_job(1, 1000);
    store.submit(job.clone()).await.unwrap();
    let cell = CellId::new(5);
    let limit = job_limit(Some(100));
    let ask = |model, want, floor, now| reservation(&job.id, &cell, model, want, floor, limit.clone(), now);
    let Reserved { id: first, amount, .. } = store.reserve(ask("m", 60, 60, 1)).await.unwrap();
    assert_eq!(amount, MicroUsd(60));
    let refused = store.reserve(ask("m", 41, 41, 1)).await;
    let standing = |charged, reserved| Standing {
        scope: Scope::Job,
        limit: MicroUsd(100),
        charged: MicroUsd(charged),
        reserved: MicroUsd(reserved),
        resets_at_ms: None,
    };
    assert_eq!(refused, Err(StoreError::BudgetBusy(standing(0, 60))));
    let usage = Usage { input: 3, output: 4, ..Usage::default() };
    let settled = Settled { spent: MicroUsd(20), above: MicroUsd::ZERO };
    assert_eq!(store.settle(first, usage, MicroUsd(20), 2).await, Ok(settled));
    let refused = store.reserve(ask("m", 90, 81, 2)).await;
    assert_eq!(refused, Err(StoreError::OverBudget(standing(20, 0))));
    assert_eq!(store.settle(first, usage, MicroUsd(20), 2).await, Err(StoreError::NotReserved(first)));
    store.reserve(ask("n", 80, 80, 3)).await.unwrap();
    store.close().await.unwrap();

    // The daemon died with a request under way: its reservation is charged whole.
    let store = open(&dir).await;
    let spend = store.spend(&job.id).await.unwrap();
    assert_eq!((spend.charged, spend.reserved_open, spend.requests), (MicroUsd(20), MicroUsd(80), 1));
    assert_eq!(store.release_open(&job.id, 4).await, Ok(1));
    assert_eq!(store.release_open(&job.id, 4).await, Ok(0));
    let spend = store.spend(&job.id).await.unwrap();
    assert_eq!((spend.charged, spend.reserved_open, spend.usage), (MicroUsd(100), MicroUsd::ZERO, usage));
    let unlimited = |model, want, now| reservation(&job.id, &cell, model, want, want, Vec::new(), now);
    let over = store.reserve(unlimited("m", 5, 5)).await.unwrap();
    assert_eq!(store.settle(over.id, usage, MicroUsd(7), 5).await.map(|s| s.above), Ok(MicroUsd(2)));

    store.reserve(unlimited("n", 6, 6)).await.unwrap();
    store.stop(&job.id, StopReason::Cancelled, 6).await.unwrap();
    store.delete(&job.id).await.unwrap();
    let totals = store.cost_totals().await.unwrap();
    let by_model: Vec<_> = totals.iter().map(|cost| (&*cost.model, cost.charged.0, cost.requests)).collect();
    assert_eq!(by_model, [("m", 27, 2), ("n", 86, 2)], "sums by model outlive the job");
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_second_daemon_is_told_who_is_there() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir).await;
    let path = dir.path().join(LOCK_NAME);
    let locked = StoreError::Locked { path, pid: Some(std::process::id()) };
    assert_eq!(Store::open(dir.path()).await.unwrap_err(), locked);
    assert_eq!(Store::set_aside(dir.path(), 1, Vec::new()).await, Err(locked));
    let clone = store.clone();
    store.close().await.unwrap();
    assert_eq!(clone.open_jobs().await, Err(StoreError::Closed));
    assert_eq!(clone.submit(new_job(1, 1)).await, Err(StoreError::Closed));
    open(&dir).await.close().await.unwrap();
}

#[tokio::test]
async fn files_that_are_not_ours_or_not_whole_are_refused_and_can_be_set_aside() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join(FILE_NAME);
    let store = open(&dir).await;
    let instance = store.instance().clone();
    for n in 0..200 {
        store.submit(new_job(n, 1000)).await.unwrap();
    }
    store.close().await.unwrap();
    let good = std::fs::read(&path).unwrap();

    let mut bad = good.clone();
    let middle = bad.len() / 2;
    bad[middle..middle + 4096].fill(0xff);
    std::fs::write(&path, &bad).unwrap();
    let error = Store::open(dir.path()).await.unwrap_err();
    assert!(matches!(&error, StoreError::Corrupt { path: named, .. } if *named == path), "{error}");
    std::fs::write(&path, b"this is no database, it only has its name").unwrap();
    let error = Store::open(dir.path()).await.unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
    let aside = Store::set_aside(dir.path(), 42, Vec::new()).await.unwrap();
    assert!(std::fs::read(aside.join(FILE_NAME)).unwrap().starts_with(b"this is no database"));
    let store = open(&dir).await;
    assert_eq!(store.instance(), &instance, "what is left of the old one's cells is this one's to remove");
    assert_eq!(store.jobs(Filter::default()).await.unwrap().rows.len(), 0);
    store.close().await.unwrap();
    // A store from before the id had a file of its own: it is read from the damaged one.
    std::fs::write(&path, &bad).unwrap();
    std::fs::remove_file(dir.path().join(INSTANCE_NAME)).unwrap();
    Store::set_aside(dir.path(), 43, Vec::new()).await.unwrap();
    let store = open(&dir).await;
    assert_eq!(store.instance(), &instance);
    store.close().await.unwrap();

    std::fs::write(&path, &good).unwrap();
    Connection::open(&path).unwrap().pragma_update(None, "user_version", 99).unwrap();
    let error = Store::open(dir.path()).await.unwrap_err();
    assert!(matches!(error, StoreError::TooNew { found: 99, .. }), "{error}");
    std::fs::remove_file(&path).unwrap();
    Connection::open(&path).unwrap().execute_batch("CREATE TABLE theirs (x)").unwrap();
    let error = Store::open(dir.path()).await.unwrap_err();
    assert!(matches!(error, StoreError::Foreign { .. }), "{error}");
}

#[tokio::test]
async fn one_failed_request_takes_no_other_along() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir).await;
    let mut requests = tokio::task::JoinSet::new();
    for n in 0..300_u64 {
        let store = store.clone();
        // Every third id is used twice: one of the two fails, in the middle of a batch.
        requests.spawn(async move { store.submit(new_job(n - n % 3 / 2, 1000)).await });
    }
    let results = requests.join_all().await;
    assert_eq!(results.iter().filter(|result| result.is_ok()).count(), 200);
    assert_eq!(store.open_jobs().await.unwrap().len(), 200);
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_store_without_space_refuses_and_goes_on_after() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir).await;
    let pages = |count: i64| {
        store.write(Durability::Soon, move |db| {
            Ok(db.pragma_update_and_check(None, "max_page_count", count, |row| row.get::<_, i64>(0))?)
        })
    };
    pages(60).await.unwrap();
    let big = |n| NewJob { spec_json: "x".repeat(100_000), ..new_job(n, 1) };
    let mut stored = Vec::new();
    let mut requests = tokio::task::JoinSet::new();
    for n in 0..20 {
        let (store, job) = (store.clone(), big(n));
        requests.spawn(async move { (n, store.submit(job).await) });
    }
    let mut full = 0;
    for (n, result) in requests.join_all().await {
        match result {
            Ok(_) => stored.push(JobId::new(n, 0)),
            Err(error) => {
                assert_eq!(error, StoreError::Full);
                full += 1;
            }
        }
    }
    assert!(full > 0);
    let found: BTreeSet<_> = store.open_jobs().await.unwrap().into_iter().map(|job| job.id).collect();
    assert_eq!(found, stored.into_iter().collect(), "what was acknowledged is there, and nothing else");
    pages(1_000_000).await.unwrap();
    store.submit(big(100)).await.unwrap();
    store.close().await.unwrap();
}

/// Submits for ever and prints each id once the store said that it is stored.
fn child_that_submits(dir: &Path) {
    runtime().block_on(async {
        let store = Store::open(dir).await.unwrap();
        for n in 0_u64.. {
            let Submitted::New(id) = store.submit(new_job(n, 1000)).await.unwrap() else { return };
            store.transition(&id, &State::Queued, &Input::Admit, None, 1).await.unwrap();
            println!("\nstored {id}");
        }
    });
}

#[test]
fn what_was_acknowledged_survives_kill_9() {
    if let Some(dir) = std::env::var_os("HOTCELL_TEST_STORE_DIR") {
        return child_that_submits(Path::new(&dir));
    }
    let dir = TempDir::new().unwrap();
    let mut child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "store::tests::what_was_acknowledged_survives_kill_9", "--nocapture"])
        .env("HOTCELL_TEST_STORE_DIR", dir.path())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut acknowledged = BTreeSet::new();
    let mut killed = false;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        let line = line.unwrap();
        // A last line may be cut by the kill.
        if let Some(Ok(id)) = line.strip_prefix("stored ").map(str::parse::<JobId>) {
            acknowledged.insert(id);
        }
        if acknowledged.len() >= 200 && !killed {
            child.kill().unwrap();
            killed = true;
        }
    }
    child.wait().unwrap();
    assert!(killed);
    runtime().block_on(async {
        let store = Store::open(dir.path()).await.unwrap();
        let rows = store.open_jobs().await.unwrap();
        let preparing: BTreeSet<_> =
            rows.into_iter().filter(|job| job.state == State::Preparing).map(|job| job.id).collect();
        assert!(acknowledged.is_subset(&preparing));
        store.close().await.unwrap();
    });
}

#[derive(Debug, Clone)]
enum Op {
    Submit { uid: u32, key: Option<u8>, hash: u8 },
    Move { job: usize, stale: bool, input: Input },
    Stop { job: usize },
    Reserve { job: usize, amount: u64 },
    Settle { reservation: usize, part_percent: u64 },
    Release { job: usize },
    Delete { job: usize },
    Reopen,
}

fn op() -> impl Strategy<Value = Op> {
    let input = prop_oneof![
        3 => Just(Input::Admit),
        2 => Just(Input::Booted),
        2 => Just(Input::CellEnded),
        1 => Just(Input::Stop(StopReason::Deadline)),
        2 => Just(Input::Finish(Outcome::Succeeded)),
    ];
    let job = 0_usize..100;
    prop_oneof![
        4 => (1000_u32..1003, proptest::option::of(0_u8..3), 0_u8..2)
            .prop_map(|(uid, key, hash)| Op::Submit { uid, key, hash }),
        8 => (job.clone(), prop::bool::weighted(0.2), input)
            .prop_map(|(job, stale, input)| Op::Move { job, stale, input }),
        1 => job.clone().prop_map(|job| Op::Stop { job }),
        5 => (job.clone(), 0_u64..60).prop_map(|(job, amount)| Op::Reserve { job, amount }),
        4 => (0_usize..100, 0_u64..=100)
            .prop_map(|(reservation, part_percent)| Op::Settle { reservation, part_percent }),
        1 => job.clone().prop_map(|job| Op::Release { job }),
        1 => job.prop_map(|job| Op::Delete { job }),
        1 => Just(Op::Reopen),
    ]
}

const LIMIT: MicroUsd = MicroUsd(100);

#[derive(Default)]
struct Model {
    jobs: BTreeMap<JobId, State>,
    keys: HashMap<(u32, u8), (JobId, u8)>,
    open: BTreeMap<ReservationId, (JobId, u64)>,
    charged: BTreeMap<JobId, u64>,
    submits: u64,
}

impl Model {
    fn pick(&self, index: usize) -> Option<(JobId, State)> {
        let (id, state) = self.jobs.iter().nth(index % self.jobs.len().max(1))?;
        Some((id.clone(), state.clone()))
    }

    fn reserved(&self, job: &JobId) -> u64 {
        self.open.values().filter(|(owner, _)| owner == job).map(|(_, amount)| amount).sum()
    }

    async fn submit(&mut self, store: &Store, uid: u32, key: Option<u8>, hash: u8) {
        self.submits += 1;
        let mut job = new_job(self.submits, uid);
        job.idem = key.map(|key| (key.to_string(), [hash; 32]));
        let id = job.id.clone();
        let known = key.and_then(|key| self.keys.get(&(uid, key)).cloned());
        let expected = match known {
            None => Ok(Submitted::New(id.clone())),
            Some((existing, old)) if old == hash => Ok(Submitted::Existing(existing)),
            Some((existing, _)) => Err(StoreError::IdempotencyConflict { existing }),
        };
        assert_eq!(store.submit(job).await, expected);
        if matches!(expected, Ok(Submitted::New(_))) {
            self.jobs.insert(id.clone(), State::Queued);
            self.keys.extend(key.map(|key| ((uid, key), (id, hash))));
        }
    }

    async fn step(&mut self, store: &Store, op: Op) {
        match op {
            Op::Submit { uid, key, hash } => self.submit(store, uid, key, hash).await,
            Op::Move { job, stale, input } => {
                let Some((id, state)) = self.pick(job) else { return };
                let guess = if stale { State::Done(Outcome::Lost) } else { state.clone() };
                let expected = if stale {
                    Err(StoreError::Conflict { actual: Box::new(state) })
                } else {
                    state.next(&input).map_err(StoreError::Illegal)
                };
                assert_eq!(store.transition(&id, &guess, &input, None, 1).await, expected);
                if let Ok(next) = expected {
                    self.jobs.insert(id, next);
                }
            }
            Op::Stop { job } => {
                let Some((id, state)) = self.pick(job) else { return };
                let next = state.next(&Input::Stop(StopReason::Budget));
                let expected = next.clone().map(|next| (state, next)).map_err(StoreError::Illegal);
                assert_eq!(store.stop(&id, StopReason::Budget, 1).await, expected);
                if let Ok(next) = next {
                    self.jobs.insert(id, next);
                }
            }
            Op::Reserve { job, amount } => {
                let Some((id, _)) = self.pick(job) else { return };
                let spent = self.charged.get(&id).copied().unwrap_or(0) + self.reserved(&id);
                let cell = CellId::new(1);
                let got = store
                    .reserve(reservation(&id, &cell, "m", amount, amount, job_limit(Some(LIMIT.0)), 1))
                    .await;
                assert_eq!(got.is_ok(), spent + amount <= LIMIT.0);
                if let Ok(reserved) = got {
                    assert!(self.open.insert(reserved.id, (id, amount)).is_none());
                }
            }
            Op::Settle { reservation, part_percent } => {
                let Some(id) = self.open.keys().copied().nth(reservation % self.open.len().max(1)) else {
                    return;
                };
                let Some((job, amount)) = self.open.remove(&id) else { return };
                let charge = amount * part_percent / 100;
                store.settle(id, Usage::default(), MicroUsd(charge), 1).await.unwrap();
                *self.charged.entry(job).or_default() += charge;
            }
            Op::Release { job } => {
                let Some((id, _)) = self.pick(job) else { return };
                let (reserved, before) = (self.reserved(&id), self.open.len());
                self.open.retain(|_, (owner, _)| *owner != id);
                let released = (before - self.open.len()) as u64;
                assert_eq!(store.release_open(&id, 1).await, Ok(released));
                *self.charged.entry(id).or_default() += reserved;
            }
            Op::Delete { job } => {
                let Some((id, state)) = self.pick(job) else { return };
                let expected = if state.is_done() {
                    Ok(())
                } else {
                    Err(StoreError::NotDone { state: state.name().to_owned() })
                };
                assert_eq!(store.delete(&id).await, expected);
                if state.is_done() {
                    self.jobs.remove(&id);
                    self.keys.retain(|_, (owner, _)| *owner != id);
                    self.open.retain(|_, (owner, _)| *owner != id);
                    self.charged.remove(&id);
                }
            }
            Op::Reopen => {}
        }
    }

    async fn compare(&self, store: &Store) {
        let rows = store.jobs(Filter::default()).await.unwrap().rows;
        let found: BTreeMap<_, _> = rows.into_iter().map(|row| (row.id, row.state)).collect();
        assert_eq!(found, self.jobs);
        let counts = store.counts_by_state().await.unwrap();
        assert_eq!(counts.values().sum::<u64>(), self.jobs.len() as u64);
        for id in self.jobs.keys() {
            let spend = store.spend(id).await.unwrap();
            assert_eq!(spend.charged.0, self.charged.get(id).copied().unwrap_or(0));
            assert_eq!(spend.reserved_open.0, self.reserved(id));
            assert!(spend.charged.plus(spend.reserved_open) <= LIMIT);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn any_life_of_a_store_matches_its_model(ops in proptest::collection::vec(op(), 1..120)) {
        let dir = TempDir::new().unwrap();
        runtime().block_on(async {
            let mut store = open(&dir).await;
            let mut model = Model::default();
            for op in ops {
                if matches!(op, Op::Reopen) {
                    store.close().await.unwrap();
                    store = open(&dir).await;
                    model.compare(&store).await;
                }
                model.step(&store, op).await;
            }
            model.compare(&store).await;
            store.close().await.unwrap();
        });
    }
}

#[test]
fn the_readme_says_what_a_power_loss_can_take() {
    let readme = include_str!("../../README.md");
    assert!(readme.contains(&format!("the last {} ms of them", super::SYNC_DELAY_MS)));
}

/// A store with jobs as a killed daemon leaves it, its log beside it: database, log.
async fn killed_store() -> (TempDir, Vec<u8>, Vec<u8>) {
    let dir = TempDir::new().unwrap();
    let store = open(&dir).await;
    for n in 0..300 {
        store.submit(new_job(n, 1000)).await.unwrap();
    }
    store.close().await.unwrap();
    let store = open(&dir).await;
    for n in 300..600 {
        store.submit(new_job(n, 1000)).await.unwrap();
    }
    let read = |name: String| std::fs::read(dir.path().join(name)).unwrap();
    let files = (read(FILE_NAME.to_owned()), read(format!("{FILE_NAME}-wal")));
    store.close().await.unwrap();
    (dir, files.0, files.1)
}

/// The jobs of a directory with these files, or why it is refused. Whatever is refused can be set aside.
async fn jobs_with(dir: &TempDir, database: &[u8], log: &[u8]) -> Result<BTreeSet<JobId>, StoreError> {
    std::fs::write(dir.path().join(FILE_NAME), database).unwrap();
    std::fs::write(dir.path().join(format!("{FILE_NAME}-wal")), log).unwrap();
    let _ = std::fs::remove_file(dir.path().join(format!("{FILE_NAME}-shm")));
    let store = Store::open(dir.path()).await?;
    let mut jobs = BTreeSet::new();
    let mut filter = Filter::default();
    let read = loop {
        match store.jobs(filter.clone()).await {
            Ok(page) => {
                jobs.extend(page.rows.into_iter().map(|row| row.id));
                match page.next_cursor {
                    Some(cursor) => filter.cursor = Some(cursor),
                    None => break Ok(jobs),
                }
            }
            Err(error) => break Err(error),
        }
    };
    store.close().await.unwrap();
    read
}

#[tokio::test]
async fn a_flipped_or_cut_page_is_refused_as_damage_and_a_flipped_or_cut_log_ends_earlier() {
    let (dir, database, log) = killed_store().await;
    assert_eq!(jobs_with(&dir, &database, &log).await.unwrap().len(), 600);
    let pages = database.len() / 4096;
    let (mut refused, mut tried) = (0, 0);
    for page in (0..pages).step_by(pages / 12 + 1) {
        tried += 1;
        let mut bad = database.clone();
        bad[page * 4096..(page + 1) * 4096].iter_mut().for_each(|byte| *byte ^= 0x5a);
        // Without a log, which may hold the page anew.
        match jobs_with(&dir, &bad, &[]).await {
            Ok(jobs) => assert!(jobs.len() <= 300, "page {page}"),
            Err(StoreError::Corrupt { .. } | StoreError::Unreadable { .. }) => refused += 1,
            Err(other) => panic!("page {page}: {other}"),
        }
    }
    assert!(refused * 10 >= tried * 7, "{refused} of {tried} pages");
    for bytes in [0, 1, 100, 4096, database.len() / 2, database.len() - 4096, database.len() - 1] {
        let error = jobs_with(&dir, &database[..bytes], &[]).await.err();
        let error = error.unwrap_or_else(|| panic!("{bytes} bytes are taken for a whole store"));
        assert!(matches!(error, StoreError::Corrupt { .. }), "{bytes}: {error}");
        assert!(error.to_string().contains("--set-store-aside"), "{error}");
    }
    // What a log has after damage is not taken: a prefix of the commits is, whole; or, where a part of the log was
    // in the database already, the store is refused.
    let whole: Vec<JobId> = (0..600).map(|n| JobId::new(n, 0)).collect();
    for at in (0..log.len()).step_by(log.len() / 5) {
        let mut bad = log.clone();
        bad[at] ^= 0xff;
        for log in [&bad[..], &log[..at]] {
            let jobs = match jobs_with(&dir, &database, log).await {
                Ok(jobs) => jobs,
                Err(StoreError::Corrupt { .. }) => continue,
                Err(other) => panic!("byte {at}: {other}"),
            };
            let prefix: BTreeSet<JobId> = whole[..jobs.len()].iter().cloned().collect();
            assert!(jobs.len() >= 300 && jobs == prefix, "byte {at}: {} jobs", jobs.len());
        }
    }
    // Gone, where there was one: not a new one.
    for suffix in ["", "-wal", "-shm"] {
        let _ = std::fs::remove_file(dir.path().join(format!("{FILE_NAME}{suffix}")));
    }
    let error = Store::open(dir.path()).await.unwrap_err();
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error}");
    let journals = dir.path().join("jobs");
    std::fs::create_dir(&journals).unwrap();
    std::fs::write(journals.join("one"), "kept").unwrap();
    let aside =
        Store::set_aside(dir.path(), 7, vec![journals.clone(), dir.path().join("none")]).await.unwrap();
    assert_eq!(std::fs::read_to_string(aside.join("jobs/one")).unwrap(), "kept");
    assert!(!journals.exists());
    open(&dir).await.close().await.unwrap();
}

#[tokio::test]
async fn a_file_of_another_program_is_refused_and_stays_as_it_is() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join(FILE_NAME);
    std::fs::write(&path, "somebody's notes").unwrap();
    let error = Store::open(dir.path()).await.unwrap_err();
    assert!(matches!(error, StoreError::Foreign { .. }), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "somebody's notes");
    assert!(!dir.path().join(INSTANCE_NAME).exists());
}

#[tokio::test]
async fn before_each_migration_a_copy_is_kept_that_opens_with_the_old_number() {
    use std::os::unix::fs::PermissionsExt;
    for old in 1..schema::MIGRATIONS.len() {
        let dir = TempDir::new().unwrap();
        let path = dir.path().join(FILE_NAME);
        let db = Connection::open(&path).unwrap();
        for step in &schema::MIGRATIONS[..old] {
            db.execute_batch(step).unwrap();
        }
        db.execute_batch("INSERT INTO meta VALUES ('mark', 'of this one')").unwrap();
        db.pragma_update(None, "application_id", 0x686f_7463).unwrap();
        db.pragma_update(None, "user_version", old as u32).unwrap();
        let id: String = InstanceId::new(5).to_string();
        db.execute("INSERT INTO meta VALUES ('instance', ?1)", [&id]).unwrap();
        drop(db);
        for n in 0..old {
            std::fs::write(dir.path().join(format!("{FILE_NAME}.schema-{n}")), "older").unwrap();
        }
        let store = open(&dir).await;
        assert_eq!(store.instance().as_str(), id);
        store.close().await.unwrap();
        assert_eq!(std::fs::read_to_string(dir.path().join(INSTANCE_NAME)).unwrap().trim(), id);
        let copy = dir.path().join(format!("{FILE_NAME}.schema-{old}"));
        assert_eq!(std::fs::metadata(&copy).unwrap().permissions().mode() & 0o777, 0o600);
        let db = Connection::open(&copy).unwrap();
        let one = |sql: &str| db.query_row(sql, [], |row| row.get::<_, rusqlite::types::Value>(0)).unwrap();
        assert_eq!(one("PRAGMA user_version"), (old as i64).into());
        assert_eq!(one("PRAGMA application_id"), 0x686f_7463_i64.into());
        assert_eq!(one("PRAGMA integrity_check"), "ok".to_owned().into());
        assert_eq!(one("SELECT value FROM meta WHERE key = 'mark'"), "of this one".to_owned().into());
        let mut copies: Vec<String> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.contains(".schema"))
            .collect();
        copies.sort();
        let kept = [old - 1, old].map(|n| format!("{FILE_NAME}.schema-{n}"));
        assert_eq!(copies, kept, "the last two are kept");
        // Open again: no further copy, and the copy opens as a store of its own.
        open(&dir).await.close().await.unwrap();
        let again = TempDir::new().unwrap();
        std::fs::copy(&copy, again.path().join(FILE_NAME)).unwrap();
        open(&again).await.close().await.unwrap();
    }
}
