//! The store's ledger behind real leases: jobs of several users at once, under budgets of the daemon.

use std::sync::Arc;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::Request;
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::net::{TcpListener, UnixStream};
use tokio_util::sync::CancellationToken;

use super::*;
use crate::gateway::tests::{config, me, plan};
use crate::gateway::{CredentialSource, Gateway, GatewayEvent, Lease, LeaseSpec, Limits};
use crate::job::Identity;
use crate::model::{Recorder, Script, serve};
use crate::money::Caps;
use crate::policy::{Plan, Unpriced};
use crate::pricing::Prices;
use crate::store::ledger::report::{By, CostQuery};
use crate::store::{NewJob, Payer};

const TOKEN: &str = "job-token";
/// Each answer costs 0.12 USD.
const SCRIPT: &str = "[default]\ntext = \"x\"\nlatency_ms = 20\nusage = { input = 0, output = 8000 }";
const COST: MicroUsd = MicroUsd(120_000);

/// Four jobs of two users, each with its lease, on one store.
struct World {
    dir: tempfile::TempDir,
    store: Store,
    gateway: Arc<Gateway>,
    recorder: Arc<Recorder>,
    stop: CancellationToken,
    leases: Vec<Lease>,
    plan: Arc<Plan>,
}

fn utc() -> Calendar {
    Calendar::new(Some("UTC")).unwrap()
}

fn new_job(n: u64, uid: u32) -> NewJob {
    NewJob {
        id: JobId::new(n, 0),
        identity: Identity { uid, gid: uid, groups: Vec::new() },
        priority: 0,
        spec_json: "{}".to_owned(),
        plan_json: "{}".to_owned(),
        policy: "test".to_owned(),
        model: "m".to_owned(),
        labels: Default::default(),
        batch: None,
        idem: None,
        created_ms: n,
    }
}

impl World {
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let base_url = format!("http://{}", listener.local_addr().unwrap());
        let (stop, recorder) = (CancellationToken::new(), Arc::new(Recorder::memory()));
        let script = Arc::new(Script::parse(SCRIPT, "test").unwrap());
        tokio::spawn(serve(listener, script, Arc::clone(&recorder), stop.clone()));
        let key = dir.path().join("key");
        std::fs::write(&key, "canary").unwrap();
        let config = config(&base_url, CredentialSource::File(key));
        let prices = Arc::new(Prices::built_in().unwrap());
        let gateway = Gateway::open(config, prices, Limits::default(), &crate::gateway::Reach::default())
            .await
            .unwrap();
        let store = Store::open(dir.path().join("state")).await.unwrap();
        for n in 0..4 {
            store.submit(new_job(n, 1000 + (n / 2) as u32)).await.unwrap();
        }
        Self { dir, store, gateway, recorder, stop, leases: Vec::new(), plan: plan(vec!["*".into()]) }
    }

    /// Opens the lease of every job under these budgets.
    async fn lease(&mut self, caps: Caps) {
        for n in 0..4 {
            let run_dir = self.dir.path().join(n.to_string());
            std::fs::create_dir_all(&run_dir).unwrap();
            let cell = CellId::new(n);
            let spec = LeaseSpec {
                job: JobId::new(n, 0),
                cell: cell.clone(),
                token: TOKEN.into(),
                identity: me(),
                plan: self.plan.clone(),
                budgets: caps.of_job(Some(MicroUsd(5_000_000)), None, None),
                egress: None,
                model: true,
                first: None,
                output_tokens_max: None,
                run_dir,
                socket_owner: None,
            };
            let ledger = StoreLedger { store: self.store.clone(), cell, calendar: utc() };
            self.leases.push(self.gateway.lease(spec, Arc::new(ledger)).await.unwrap());
        }
    }

    async fn post(&self, job: usize) -> (u16, String) {
        post(self.dir.path().join(job.to_string()).join("api.sock"), "claude-sonnet-4-6").await
    }

    async fn destroy_leases(&mut self) -> Vec<GatewayEvent> {
        let mut events = Vec::new();
        for lease in self.leases.drain(..) {
            events.extend(lease.destroy().await);
        }
        events
    }

    async fn standing(&self, budgets: Vec<Budget>) -> Vec<Standing> {
        let payer = Payer { uid: 1000, job: None, batch: None };
        self.store.budget_standing(payer, budgets, utc(), clock::wall_ms()).await.unwrap()
    }
}

async fn post(socket: std::path::PathBuf, model: &'static str) -> (u16, String) {
    let stream = UnixStream::connect(socket).await.unwrap();
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let body: Value = json!({ "model": model, "max_tokens": 8000,
        "messages": [{ "role": "user", "content": "x" }] });
    let request = Request::post("/v1/messages").header("host", "model").header("x-api-key", TOKEN);
    let response =
        sender.send_request(request.body(Full::new(Bytes::from(body.to_string()))).unwrap()).await.unwrap();
    let status = response.status().as_u16();
    let bytes = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8_lossy(&bytes).into_owned())
}

/// The worst case of the request, as the gateway counts it.
fn reserved(events: &[GatewayEvent]) -> MicroUsd {
    let reserved = events.iter().find_map(|event| match event {
        GatewayEvent::Requested { reserved, .. } => Some(*reserved),
        _ => None,
    });
    reserved.expect("a request was reserved")
}

#[tokio::test]
async fn of_two_hundred_calls_of_four_jobs_with_a_day_for_one_only_one_goes_upstream() {
    let mut world = World::new().await;
    world.lease(Caps::default()).await;
    assert_eq!(world.post(0).await.0, 200);
    let worst = reserved(&world.destroy_leases().await);
    let before = world.recorder.total();
    // What the first call spent, and room for one more.
    let limit = COST.plus(worst);
    world.lease(Caps { day: Some(limit), ..Caps::default() }).await;
    let mut calls = tokio::task::JoinSet::new();
    for n in 0..200 {
        calls.spawn(post(world.dir.path().join((n % 4).to_string()).join("api.sock"), "claude-sonnet-4-6"));
    }
    let answers = calls.join_all().await;
    let of = |status| answers.iter().filter(|(found, _)| *found == status).count();
    assert_eq!((of(200), of(403)), (1, 199));
    assert_eq!(world.recorder.total() - before, 1);
    let refused = answers.iter().find(|(status, _)| *status == 403).unwrap();
    assert!(refused.1.contains("hotcell: daemon's budget of the day of "), "{}", refused.1);
    assert!(refused.1.contains("it is empty again at "), "{}", refused.1);
    let events = world.destroy_leases().await;
    let told = events.iter().filter(|event| {
        matches!(event, GatewayEvent::BudgetExhausted { scope: Scope::Day, resets_at_ms: Some(_), .. })
    });
    assert_eq!(told.count(), 199);
    let standing = world.standing(vec![Budget { scope: Scope::Day, limit }]).await[0];
    assert_eq!((standing.charged, standing.reserved), (COST.plus(COST), MicroUsd::ZERO));
    world.stop.cancel();
    world.store.close().await.unwrap();
}

#[tokio::test]
async fn a_users_day_bounds_all_jobs_of_the_user_and_nobody_elses() {
    let mut world = World::new().await;
    // Room for one answer, whatever the estimate of its input; not for two.
    world.lease(Caps { user_day: Some(MicroUsd(180_000)), ..Caps::default() }).await;
    assert_eq!(world.post(0).await.0, 200);
    let (status, body) = world.post(1).await;
    assert_eq!(status, 403, "{body}");
    assert!(body.contains("user's budget of the day of 0.18 USD reached (0.12 USD spent"), "{body}");
    assert_eq!(world.post(2).await.0, 200, "another user's");
    world.destroy_leases().await;
    let query = CostQuery { uid: None, since_ms: None, until_ms: None, by: By::User };
    let costs = world.store.costs(query).await.unwrap();
    let users: Vec<_> =
        costs.rows.iter().map(|(key, spend)| (key.as_deref().unwrap(), spend.charged)).collect();
    assert_eq!(users, [("1000", COST), ("1001", COST)]);
    let query = CostQuery { uid: None, since_ms: None, until_ms: None, by: By::Credential };
    assert_eq!(world.store.costs(query).await.unwrap().rows[0].0.as_deref(), Some("key"));
    world.stop.cancel();
    world.store.close().await.unwrap();
}

#[tokio::test]
async fn an_answer_cut_short_by_the_month_names_the_month() {
    let mut world = World::new().await;
    world.lease(Caps { month: Some(MicroUsd(100_000)), ..Caps::default() }).await;
    // Less than the worst case of 8000 tokens, more than that of the floor: lowered, and it ends at the limit.
    assert_eq!(world.post(0).await.0, 200);
    let sent = world.recorder.requests()[0].json()["max_tokens"].as_u64().unwrap();
    assert!((4096..8000).contains(&sent), "{sent}");
    let events = world.destroy_leases().await;
    let exhausted = events.iter().find_map(|event| match event {
        GatewayEvent::BudgetExhausted { scope, spent, limit, resets_at_ms } => {
            Some((*scope, *spent, *limit, resets_at_ms.is_some()))
        }
        _ => None,
    });
    let limit = MicroUsd(100_000);
    let (scope, spent, told, resets) = exhausted.expect("it was told");
    assert_eq!((scope, told, resets), (Scope::Month, limit, true));
    assert!(spent <= limit && spent > MicroUsd::ZERO, "{spent}");
    world.stop.cancel();
    world.store.close().await.unwrap();
}

#[tokio::test]
async fn a_model_without_a_price_costs_the_policys_maximum_or_is_refused() {
    let mut world = World::new().await;
    let socket = world.dir.path().join("0/api.sock");
    world.lease(Caps::default()).await;
    let (status, body) = post(socket.clone(), "somebodys-model").await;
    assert!(status == 403 && body.contains("has no price"), "{body}");
    world.destroy_leases().await;
    let unpriced = Some(Unpriced { input: 10.0, output: 50.0 });
    world.plan = Arc::new(Plan { unpriced, ..(*world.plan).clone() });
    world.lease(Caps::default()).await;
    let (status, body) = post(socket, "somebodys-model").await;
    assert_eq!(status, 200, "{body}");
    assert!(reserved(&world.destroy_leases().await) > MicroUsd(8000 * 50));
    assert_eq!(world.store.spend(&JobId::new(0, 0)).await.unwrap().charged, MicroUsd(8000 * 50));
    world.stop.cancel();
    world.store.close().await.unwrap();
}
