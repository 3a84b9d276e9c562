//! Money against a model of it: any interleaving of requests, aborts, kills and clocks, under budgets at all
//! levels, on the real database. And the way here from an older one.

use std::collections::BTreeMap;

use proptest::prelude::*;
use tempfile::TempDir;

use super::report::{By, CostQuery, Costs};
use super::*;
use crate::job::{Identity, Input, Outcome};
use crate::money::Caps;
use crate::store::{FILE_NAME, NewJob};

const HOUR_MS: u64 = 3_600_000;
const START_MS: u64 = 1_772_366_400_000; // 2026-03-01T12:00:00Z

pub(in crate::store) fn utc() -> Calendar {
    Calendar::new(Some("UTC")).unwrap()
}

/// A job's cost limit alone.
pub(in crate::store) fn job_limit(micro: Option<u64>) -> Vec<Budget> {
    Caps::default().of_job(micro.map(MicroUsd), None, None)
}

pub(in crate::store) fn reservation(
    job: &JobId,
    cell: &CellId,
    model: &str,
    want: u64,
    floor: u64,
    budgets: Vec<Budget>,
    now_ms: u64,
) -> NewReservation {
    NewReservation {
        job: job.clone(),
        cell: cell.clone(),
        model: model.to_owned(),
        credential: "key-a".to_owned(),
        provider: "p".to_owned(),
        want: MicroUsd(want),
        floor: MicroUsd(floor),
        budgets,
        calendar: utc(),
        now_ms,
    }
}

fn new_job(n: u64, uid: u32, batch: Option<(&str, Option<u64>)>) -> NewJob {
    NewJob {
        id: JobId::new(n, 0),
        identity: Identity { uid, gid: uid, groups: Vec::new() },
        priority: 0,
        spec_json: "{}".to_owned(),
        plan_json: "{}".to_owned(),
        policy: "default".to_owned(),
        model: "m".to_owned(),
        labels: [("team".to_owned(), format!("t{uid}")), ("n".to_owned(), n.to_string())].into(),
        batch: batch.map(|(name, limit)| Batch { name: name.to_owned(), limit: limit.map(MicroUsd) }),
        idem: None,
        created_ms: n,
    }
}

async fn open(dir: &TempDir) -> Store {
    Store::open(dir.path()).await.unwrap()
}

async fn report(store: &Store, by: By) -> Costs {
    store.costs(CostQuery { uid: None, since_ms: None, until_ms: None, by }).await.unwrap()
}

#[derive(Debug, Clone)]
enum Op {
    /// A request of a job for `want`, worth it from `part` percent of that on.
    Request { job: usize, want: u64, part: u64 },
    /// A request ends; its usage was seen, or it was not.
    End { which: usize, billed_percent: u64, seen: bool },
    /// The daemon dies and comes back; each of its requests was billed this part.
    Kill { billed_percent: u64 },
    /// The next daemon takes up a job.
    TakeUp { job: usize },
    /// The clock goes on, or jumps, by hours.
    Clock { hours: i64 },
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (0usize..5, 1u64..200, 0u64..=100).prop_map(|(job, want, part)| Op::Request { job, want, part }),
        6 => (any::<usize>(), 0u64..=100, prop::bool::weighted(0.8))
            .prop_map(|(which, billed_percent, seen)| Op::End { which, billed_percent, seen }),
        1 => (0u64..=100).prop_map(|billed_percent| Op::Kill { billed_percent }),
        2 => (0usize..5).prop_map(|job| Op::TakeUp { job }),
        1 => prop_oneof![0i64..30, -100i64..0, Just(24 * 20)].prop_map(|hours| Op::Clock { hours }),
    ]
}

/// Jobs 0 and 1 are a batch of user 1000, job 2 is the same user's, jobs 3 and 4 are another's.
const USERS: [u32; 5] = [1000, 1000, 1000, 1001, 1001];

struct World {
    caps: Caps,
    job_limit: MicroUsd,
    batch_limit: MicroUsd,
    now_ms: u64,
    /// Open reservations of this daemon: job, amount.
    open: BTreeMap<ReservationId, (usize, u64)>,
    /// Of a dead one, whose cost nobody saw.
    orphans: Vec<(usize, u64)>,
    billed: u64,
    charged: u64,
    /// Reservations whose requests were not followed to their end.
    unseen: u64,
}

impl World {
    fn budgets(&self, job: usize) -> Vec<Budget> {
        self.caps.of_job(Some(self.job_limit), (job < 2).then_some(self.batch_limit), None)
    }

    async fn step(&mut self, store: &mut Option<Store>, dir: &TempDir, op: Op) {
        let id = |job: usize| JobId::new(job as u64, 0);
        let live = store.as_ref().unwrap();
        match op {
            Op::Request { job, want, part } => {
                if self.orphans.iter().any(|(of, _)| *of == job) {
                    self.take_up(live, job).await;
                }
                let (cell, floor) = (CellId::new(1), want * part / 100);
                let ask = reservation(&id(job), &cell, "m", want, floor, self.budgets(job), self.now_ms);
                match live.reserve(ask).await {
                    Ok(reserved) => {
                        assert!(reserved.amount.0 >= floor && reserved.amount.0 <= want);
                        self.open.insert(reserved.id, (job, reserved.amount.0));
                    }
                    Err(StoreError::OverBudget(at)) => assert!(at.charged.0 + floor > at.limit.0, "{at:?}"),
                    Err(StoreError::BudgetBusy(at)) => {
                        assert!(at.reserved.0 > 0 && at.charged.0 + floor <= at.limit.0, "{at:?}");
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            Op::End { which, billed_percent, seen } => {
                let Some(reserved) = self.open.keys().copied().nth(which % self.open.len().max(1)) else {
                    return;
                };
                let (_, amount) = self.open.remove(&reserved).unwrap();
                let billed = amount * billed_percent / 100;
                let charge = if seen { billed } else { amount };
                self.unseen += if seen { 0 } else { amount };
                let usage = Usage { input: billed, ..Usage::default() };
                // Every other one as the gateway does it.
                let (charged, now_ms) = (MicroUsd(charge), self.now_ms);
                if reserved.get() % 2 == 0 {
                    live.settle_soon(reserved, usage, charged, now_ms).await.unwrap();
                } else {
                    live.settle(reserved, usage, charged, now_ms).await.unwrap();
                }
                assert!(live.settle(reserved, usage, charged, now_ms).await.is_err(), "only once");
                self.billed += billed;
                self.charged += charge;
            }
            Op::Kill { billed_percent } => {
                for (job, amount) in std::mem::take(&mut self.open).into_values() {
                    self.billed += amount * billed_percent / 100;
                    self.unseen += amount;
                    self.orphans.push((job, amount));
                }
                store.take().unwrap().close().await.unwrap();
                *store = Some(self::open(dir).await);
            }
            Op::TakeUp { job } => self.take_up(live, job).await,
            Op::Clock { hours } => self.now_ms = self.now_ms.saturating_add_signed(hours * HOUR_MS as i64),
        }
    }

    async fn take_up(&mut self, store: &Store, job: usize) {
        if self.open.values().any(|(of, _)| *of == job) {
            return;
        }
        let of_job: Vec<u64> = self.orphans.iter().filter(|(of, _)| *of == job).map(|(_, a)| *a).collect();
        self.orphans.retain(|(of, _)| *of != job);
        let released = store.release_open(&JobId::new(job as u64, 0), self.now_ms).await;
        assert_eq!(released, Ok(of_job.len() as u64));
        self.charged += of_job.iter().sum::<u64>();
    }

    /// Everything that must hold at any moment, read beside the store.
    fn check(&self, db: &rusqlite::Connection) {
        let limit = |scope: &str| match scope {
            "job" => self.job_limit,
            "batch" => self.batch_limit,
            "user_day" => self.caps.user_day.unwrap(),
            "day" => self.caps.day.unwrap(),
            _ => self.caps.month.unwrap(),
        };
        let mut statement =
            db.prepare("SELECT scope, key, charged_micro, reserved_micro FROM budget_sums").unwrap();
        let mut rows = statement.query([]).unwrap();
        let mut sums: BTreeMap<String, (u64, u64)> = BTreeMap::new();
        while let Some(row) = rows.next().unwrap() {
            let (scope, key): (String, String) = (row.get(0).unwrap(), row.get(1).unwrap());
            let (charged, reserved) = (int(row, 2).unwrap(), int(row, 3).unwrap());
            assert!(charged + reserved <= limit(&scope).0, "{scope} {key}: {charged} and {reserved}");
            let sum = sums.entry(scope).or_default();
            *sum = (sum.0 + charged, sum.1 + reserved);
        }
        let in_flight: u64 = self.open.values().map(|(_, amount)| amount).sum();
        let reserved = in_flight + self.orphans.iter().map(|(_, amount)| amount).sum::<u64>();
        for scope in ["job", "user_day", "day", "month"] {
            let sum = sums.get(scope).copied().unwrap_or_default();
            assert_eq!(sum, (self.charged, reserved), "{scope}");
        }
        let count = |sql: &str| db.query_row(sql, [], |row| int(row, 0)).unwrap();
        assert_eq!(count("SELECT coalesce(sum(charged_micro), 0) FROM charges"), self.charged);
        assert_eq!(count("SELECT coalesce(sum(charged_micro), 0) FROM job_costs"), self.charged);
        let orphaned: u64 = self.orphans.iter().map(|(_, amount)| amount).sum();
        assert!(self.billed <= self.charged + orphaned, "nothing is charged less than it cost");
        assert!(self.charged <= self.billed + self.unseen, "only what nobody saw is charged in full");
    }
}

async fn run(ops: Vec<Op>, limits: [u64; 5]) {
    let dir = TempDir::new().unwrap();
    let [job, batch, user_day, day, month] = limits.map(MicroUsd);
    let mut store = Some(open(&dir).await);
    for (n, uid) in USERS.into_iter().enumerate() {
        let batch = (n < 2).then_some(("b", Some(batch.0)));
        store.as_ref().unwrap().submit(new_job(n as u64, uid, batch)).await.unwrap();
    }
    let mut world = World {
        caps: Caps { user_day: Some(user_day), day: Some(day), month: Some(month) },
        job_limit: job,
        batch_limit: batch,
        now_ms: START_MS,
        open: BTreeMap::new(),
        orphans: Vec::new(),
        billed: 0,
        charged: 0,
        unseen: 0,
    };
    let db = rusqlite::Connection::open(dir.path().join(FILE_NAME)).unwrap();
    for op in ops {
        world.step(&mut store, &dir, op).await;
        world.check(&db);
    }
    // The end of all jobs.
    world.step(&mut store, &dir, Op::Kill { billed_percent: 50 }).await;
    let store = store.unwrap();
    for job in 0..USERS.len() {
        world.take_up(&store, job).await;
    }
    world.check(&db);
    let left = "SELECT (SELECT count(*) FROM ledger WHERE status = 'open') + (SELECT coalesce(sum(reserved_micro), 0) \
                FROM budget_sums)";
    assert_eq!(db.query_row(left, [], |row| int(row, 0)).unwrap(), 0, "a reservation is left");
    for (by, limit) in [(By::Day, day), (By::Month, month), (By::Job, job)] {
        let costs = report(&store, by).await;
        assert_eq!(costs.total.charged.0, world.charged);
        assert!(costs.rows.iter().all(|(_, spend)| spend.charged <= limit));
    }
    store.close().await.unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: ProptestConfig::default().cases.div_ceil(16),
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_interleaving_spends_more_than_any_budget(
        ops in proptest::collection::vec(op(), 1..60), limits in prop::array::uniform5(50u64..900)
    ) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        runtime.block_on(run(ops, limits));
    }
}

#[tokio::test]
async fn a_budget_day_never_goes_back() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir).await;
    store.submit(new_job(1, 1000, None)).await.unwrap();
    let (job, cell) = (JobId::new(1, 0), CellId::new(1));
    let caps = Caps { user_day: None, day: Some(MicroUsd(100)), month: Some(MicroUsd(150)) };
    let ask = |want, now| reservation(&job, &cell, "m", want, want, caps.of_job(None, None, None), now);
    let yesterday = store.reserve(ask(90, START_MS)).await.unwrap();
    let later = START_MS + 24 * HOUR_MS;
    let today = store.reserve(ask(20, later)).await.unwrap();
    // Settled today, and it is still yesterday's money.
    store.settle(yesterday.id, Usage::default(), MicroUsd(90), later).await.unwrap();
    store.settle(today.id, Usage::default(), MicroUsd(20), later).await.unwrap();
    store.close().await.unwrap();

    // The clock jumps back over the restart: what was spent on the later day still counts.
    let store = open(&dir).await;
    let payer = Payer { uid: 1000, job: None, batch: None };
    let standings =
        store.budget_standing(payer, caps.of_job(None, None, None), utc(), START_MS).await.unwrap();
    let midnight = utc().moment_ms("2026-03-03", false).unwrap();
    let april = utc().moment_ms("2026-04-01", false).unwrap();
    let found: Vec<_> =
        standings.iter().map(|s| (s.scope, s.charged.0, s.reserved.0, s.resets_at_ms)).collect();
    assert_eq!(found, [(Scope::Day, 20, 0, Some(midnight)), (Scope::Month, 110, 0, Some(april))]);
    match store.reserve(ask(81, START_MS)).await {
        Err(StoreError::OverBudget(at)) => {
            assert_eq!((at.scope, at.resets_at_ms), (Scope::Day, Some(midnight)))
        }
        other => panic!("{other:?}"),
    }
    match store.reserve(ask(41, START_MS)).await {
        Err(StoreError::OverBudget(at)) => {
            assert_eq!((at.scope, at.resets_at_ms), (Scope::Month, Some(april)))
        }
        other => panic!("{other:?}"),
    }
    let days: Vec<_> =
        report(&store, By::Day).await.rows.into_iter().map(|(k, s)| (k.unwrap(), s.charged.0)).collect();
    assert_eq!(days, [("2026-03-01".to_owned(), 90), ("2026-03-02".to_owned(), 20)]);
    store.close().await.unwrap();
}

#[tokio::test]
async fn a_settlement_that_waits_for_the_next_request_is_done_with_it_or_without() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir).await;
    store.submit(new_job(1, 1000, None)).await.unwrap();
    let (job, cell) = (JobId::new(1, 0), CellId::new(1));
    let ask = || reservation(&job, &cell, "m", 10, 10, job_limit(Some(30)), START_MS);
    let settle = |id| store.settle_soon(id, Usage::default(), MicroUsd(10), START_MS);
    // Nothing else is asked for.
    let first = store.reserve(ask()).await.unwrap();
    assert_eq!(settle(first.id).await.unwrap().spent, MicroUsd(10));
    assert_eq!(settle(first.id).await, Err(StoreError::NotReserved(first.id)));
    // The next request takes it along, and finds the room that it made.
    let (second, third) = (store.reserve(ask()).await.unwrap(), store.reserve(ask()).await.unwrap());
    let free = store.settle_soon(second.id, Usage::default(), MicroUsd::ZERO, START_MS);
    let (freed, fourth) = tokio::join!(free, store.reserve(ask()));
    assert_eq!((freed.unwrap().spent, fourth.unwrap().amount), (MicroUsd(10), MicroUsd(10)));
    // Who asked for it goes away at once.
    {
        let mut left = std::pin::pin!(settle(third.id));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(left.as_mut().poll(&mut context).is_pending());
    }
    assert_eq!(settle(third.id).await, Err(StoreError::NotReserved(third.id)));
    assert_eq!(store.spend(&job).await.unwrap().charged, MicroUsd(20));
    let late = store.clone();
    store.close().await.unwrap();
    let closed = late.settle_soon(first.id, Usage::default(), MicroUsd(10), START_MS).await;
    assert_eq!(closed, Err(StoreError::Closed));
}

#[tokio::test]
async fn the_log_stays_bounded_while_requests_never_pause() {
    const LOG_BYTES_MAX: u64 = 32 << 20;
    let dir = TempDir::new().unwrap();
    let store = open(&dir).await;
    store.submit(new_job(1, 1000, None)).await.unwrap();
    let (job, cell) = (JobId::new(1, 0), CellId::new(1));
    let mut written = 0;
    // Some 8 pages each: several times what the log may hold.
    for n in 0..4_000 {
        let reserved = store.reserve(reservation(&job, &cell, "m", 1, 1, job_limit(None), n)).await.unwrap();
        store.settle(reserved.id, Usage::default(), MicroUsd(1), n).await.unwrap();
        written += 1;
    }
    let log = std::fs::metadata(dir.path().join(format!("{FILE_NAME}-wal"))).unwrap().len();
    assert!(log <= LOG_BYTES_MAX, "{log} bytes after {written} requests");
    assert_eq!(store.spend(&job).await.unwrap().charged, MicroUsd(written));
    store.close().await.unwrap();
    let store = open(&dir).await;
    assert_eq!(store.spend(&job).await.unwrap().charged, MicroUsd(written));
    store.close().await.unwrap();
}

#[tokio::test]
async fn the_first_job_of_a_batch_decides_its_budget() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir).await;
    store.submit(new_job(1, 1000, Some(("b", Some(100))))).await.unwrap();
    store.submit(new_job(2, 1000, Some(("b", None)))).await.unwrap();
    store.submit(new_job(3, 1001, Some(("b", Some(5))))).await.unwrap();
    let refused = store.submit(new_job(4, 1000, Some(("b", Some(101))))).await;
    let first = Some(MicroUsd(100));
    assert_eq!(refused, Err(StoreError::BatchBudget { name: "b".to_owned(), first }));
    assert!(store.job(&JobId::new(4, 0)).await.unwrap().is_none(), "what is refused leaves nothing behind");
    let of = async |n| store.batch_of(&JobId::new(n, 0)).await.unwrap().map(|batch| batch.limit);
    assert_eq!((of(2).await, of(3).await), (Some(first), Some(Some(MicroUsd(5)))));

    let (cell, budgets) = (CellId::new(1), Caps::default().of_job(None, first, None));
    let ask = |n, want| reservation(&JobId::new(n, 0), &cell, "m", want, want, budgets.clone(), 1);
    store.reserve(ask(1, 60)).await.unwrap();
    assert!(
        matches!(store.reserve(ask(2, 41)).await, Err(StoreError::BudgetBusy(at)) if at.scope == Scope::Batch)
    );
    store.reserve(ask(3, 41)).await.unwrap();
    store.close().await.unwrap();
}

#[tokio::test]
async fn the_report_adds_up_by_every_dimension_and_outlives_its_jobs() {
    let dir = TempDir::new().unwrap();
    let store = open(&dir).await;
    for (n, uid, batch) in [(1, 1000, Some(("nightly", None))), (2, 1000, None), (3, 1001, None)] {
        store.submit(new_job(n, uid, batch)).await.unwrap();
        let ask = reservation(&JobId::new(n, 0), &CellId::new(1), "m", 10 * n, 0, Vec::new(), START_MS + n);
        let id = store.reserve(ask).await.unwrap().id;
        let usage = Usage { input: n, web_searches: 1, ..Usage::default() };
        store.settle(id, usage, MicroUsd(10 * n), START_MS + 9).await.unwrap();
    }
    let (removed, queued) = (JobId::new(3, 0), crate::job::State::Queued);
    store
        .transition(&removed, &queued, &Input::Stop(crate::job::StopReason::Cancelled), None, 1)
        .await
        .unwrap();
    assert!(matches!(
        store.job(&removed).await.unwrap().unwrap().row.state,
        crate::job::State::Done(Outcome::Stopped { .. })
    ));
    store.delete(&removed).await.unwrap();

    let rows = async |by| {
        let costs = report(&store, by).await;
        assert_eq!(
            (costs.total.charged, costs.total.requests, costs.total.usage.web_searches),
            (MicroUsd(60), 3, 3)
        );
        costs
            .rows
            .into_iter()
            .map(|(key, spend)| format!("{}={}", key.unwrap_or_default(), spend.charged.0))
            .collect::<Vec<_>>()
    };
    let ids = [3, 2, 1].map(|n| format!("{}={}", JobId::new(n, 0), 10 * n));
    assert_eq!(rows(By::Job).await, ids);
    assert_eq!(rows(By::User).await, ["1000=30", "1001=30"]);
    assert_eq!(rows(By::Model).await, ["m=60"]);
    assert_eq!(rows(By::Policy).await, ["default=60"]);
    assert_eq!(rows(By::Credential).await, ["key-a=60"]);
    assert_eq!(rows(By::Batch).await, ["=50", "nightly=10"]);
    assert_eq!(rows(By::Label(Some("team".into()))).await, ["t1000=30", "t1001=30"]);
    assert_eq!(rows(By::Label(Some("absent".into()))).await, ["=60"]);
    assert_eq!(rows(By::Label(None)).await, ["n=3=30", "team=t1000=30", "team=t1001=30", "n=2=20", "n=1=10"]);
    assert_eq!(rows(By::Day).await, ["2026-03-01=60"]);
    assert_eq!(rows(By::Month).await, ["2026-03=60"]);

    let some = CostQuery {
        uid: Some(1000),
        since_ms: Some(START_MS + 2),
        until_ms: Some(START_MS + 3),
        by: By::Job,
    };
    assert_eq!(store.costs(some.clone()).await.unwrap().total.charged, MicroUsd(20));
    let none = store.costs(CostQuery { uid: Some(7), ..some }).await.unwrap();
    assert_eq!(none, Costs { rows: Vec::new(), total: Spend::default(), truncated: false });
    store.close().await.unwrap();
}

/// A database of the schema before this one, as its own program wrote it.
const BEFORE: &str = include_str!("fixtures/before_money.sql");

#[tokio::test]
async fn an_older_store_keeps_its_money() {
    let dir = TempDir::new().unwrap();
    let db = rusqlite::Connection::open(dir.path().join(FILE_NAME)).unwrap();
    db.execute_batch(BEFORE).unwrap();
    drop(db);
    let store = open(&dir).await;
    let job: JobId = "j0000000000000a1".parse().unwrap();
    let spend = store.spend(&job).await.unwrap();
    assert_eq!((spend.charged, spend.reserved_open, spend.requests), (MicroUsd(700), MicroUsd(50), 2));
    let costs = report(&store, By::Job).await;
    assert_eq!((costs.rows.len(), costs.total.charged, costs.total.usage.output), (2, MicroUsd(800), 31));
    assert_eq!(report(&store, By::Label(Some("team".into()))).await.rows.len(), 2);
    // Its limit counts what was spent before, and its open request is charged to the day it began on.
    let cell = CellId::new(1);
    let over = store.reserve(reservation(&job, &cell, "m", 300, 251, job_limit(Some(1000)), START_MS)).await;
    assert!(matches!(over, Err(StoreError::BudgetBusy(_))), "{over:?}");
    assert_eq!(store.release_open(&job, START_MS).await, Ok(1));
    let over = store.reserve(reservation(&job, &cell, "m", 300, 251, job_limit(Some(1000)), START_MS)).await;
    assert!(matches!(over, Err(StoreError::OverBudget(at)) if at.charged.0 == 750), "{over:?}");
    let months = report(&store, By::Month).await;
    assert_eq!(months.rows.len(), 1);
    assert_eq!(months.rows[0].0.as_deref(), Some("2026-02"));
    let payer = Payer { uid: 1000, job: Some(job), batch: None };
    let budget = vec![Budget { scope: Scope::Month, limit: MicroUsd(1) }];
    let february = store.budget_standing(payer, budget, utc(), START_MS - 15 * 24 * HOUR_MS).await.unwrap();
    assert_eq!((february[0].charged, february[0].reserved), (MicroUsd(850), MicroUsd::ZERO));
    store.close().await.unwrap();
    open(&dir).await.close().await.unwrap();
}
