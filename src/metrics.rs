//! Every Prometheus name in one place. Labels are closed lists, every series is there from the start at 0,
//! and error text, job ids and paths are never labels.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use prometheus::{
    CounterVec, Encoder, Gauge, GaugeVec, Histogram, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Registry, TextEncoder,
};

use crate::event::{Decision, Refusal};
use crate::job::outcome::Failure;
use crate::job::{FailReason, Outcome, ParkReason, Phase, State, StopReason};
use crate::money::{MicroUsd, Scope};
use crate::pricing::Usage;
use register::{
    counter, counters, float_counters, float_gauge, float_gauges, gauge, gauges, histogram, histograms,
};

mod cache;
mod register;
mod words;

use cache::Cache;
pub use cache::CacheFigures;
pub use words::{CopyStep, Orphan, Retired};

/// Label of a model that the price list does not name.
pub const OTHER_MODEL: &str = "other";

const TOKEN_TYPES: [&str; 5] = ["input", "output", "cache_read", "cache_write_5m", "cache_write_1h"];

/// The daemon's metrics.
pub struct Metrics {
    registry: Registry,
    models: Vec<String>,
    /// 1 while the engine answers.
    pub engine_up: IntGauge,
    /// Slots in all.
    pub slots: IntGauge,
    /// Slots taken.
    pub slots_used: IntGauge,
    /// Cells of jobs that are over of which something is left.
    pub cells_left: IntGauge,
    /// 1 while nothing starts because somebody said so.
    pub paused: IntGauge,
    /// Requests that may go to the model provider at once.
    pub provider_concurrency: IntGauge,
    /// Seconds for which the provider still pauses all requests.
    pub provider_paused_s: Gauge,
    /// Seconds since the oldest queued job was submitted.
    pub queue_age_s: Gauge,
    jobs: Jobs,
    money: Money,
    doors: Doors,
    cache: Cache,
    orphans_total: IntCounterVec,
    retired_total: IntCounterVec,
    retired_bytes_total: IntCounterVec,
    notices_total: IntCounterVec,
}

/// What becomes of jobs.
struct Jobs {
    by_state: IntGaugeVec,
    ended_total: IntCounterVec,
    failures_total: IntCounterVec,
    stops_total: IntCounterVec,
    parked_total: IntCounterVec,
    duration: Histogram,
    queue_time: Histogram,
    phase_time: HistogramVec,
    copy_time: HistogramVec,
    turns_total: IntCounter,
    tool_calls_total: IntCounterVec,
}

/// What they cost.
struct Money {
    cost_total: CounterVec,
    one_at_a_time: Mutex<()>,
    tokens_total: IntCounterVec,
    budget_limit: GaugeVec,
    budget_spent: GaugeVec,
    budget_reserved: GaugeVec,
    job_cost: Histogram,
    cost_difference: GaugeVec,
    cost_difference_total: CounterVec,
}

/// Who and what was let through or turned away.
struct Doors {
    refused_total: IntCounterVec,
    not_listed_total: IntCounter,
    egress_total: IntCounterVec,
    egress_bytes_total: IntCounterVec,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Metrics").finish_non_exhaustive()
    }
}

impl Metrics {
    /// All series at 0. `models` are the names of the price list.
    ///
    /// # Errors
    /// When two metrics have the same name, which only a change of this file can cause.
    pub fn new(agent_version: &str, models: &[String]) -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let build = gauges(
            &registry,
            "hotcell_build_info",
            "Versions of the daemon and of its default agent; always 1.",
            &["version", "agent"],
        )?;
        build.with_label_values(&[env!("CARGO_PKG_VERSION"), agent_version]).set(1);
        let mut models = models.to_vec();
        models.push(OTHER_MODEL.to_owned());
        let metrics = Self {
            engine_up: gauge(&registry, "hotcell_engine_up", "1 while the container engine answers.")?,
            slots: gauge(&registry, "hotcell_slots", "Jobs that may run at once.")?,
            slots_used: gauge(&registry, "hotcell_slots_used", "Jobs that hold a slot.")?,
            cells_left: gauge(
                &registry,
                "hotcell_cells_left",
                "Cells of jobs that are over of which something is left; it is tried again.",
            )?,
            paused: gauge(&registry, "hotcell_paused", "1 while starts are paused by an admin.")?,
            provider_concurrency: gauge(
                &registry,
                "hotcell_provider_concurrency",
                "Requests that may go to the model provider at once; fewer after it was limited.",
            )?,
            provider_paused_s: float_gauge(
                &registry,
                "hotcell_provider_paused_seconds",
                "What is left of a pause that the model provider asked for.",
            )?,
            queue_age_s: float_gauge(
                &registry,
                "hotcell_queue_age_seconds",
                "Age of the oldest queued job.",
            )?,
            jobs: Jobs::new(&registry)?,
            money: Money::new(&registry)?,
            doors: Doors::new(&registry)?,
            cache: Cache::new(&registry)?,
            orphans_total: counters(
                &registry,
                "hotcell_orphans_reaped_total",
                "Left-overs removed.",
                &["kind"],
            )?,
            retired_total: counters(
                &registry,
                "hotcell_retention_removed_total",
                "Things that were removed because they were old or too many.",
                &["kind"],
            )?,
            notices_total: counters(
                &registry,
                "hotcell_notices_total",
                "Tries to tell somebody of what happened to a job: sent, failed, or given up.",
                &["result"],
            )?,
            retired_bytes_total: counters(
                &registry,
                "hotcell_retention_removed_bytes_total",
                "Bytes of the disk that this gave back.",
                &["kind"],
            )?,
            registry,
            models,
        };
        metrics.seed();
        Ok(metrics)
    }

    fn seed(&self) {
        self.jobs.seed();
        self.money.seed(&self.models);
        self.doors.seed();
        self.cache.seed();
        for kind in Orphan::ALL {
            self.orphans_total.with_label_values(&[kind.as_str()]);
        }
        for result in ["sent", "failed", "given_up"] {
            self.notices_total.with_label_values(&[result]);
        }
        for kind in Retired::ALL {
            self.retired_total.with_label_values(&[kind.as_str()]);
            self.retired_bytes_total.with_label_values(&[kind.as_str()]);
        }
        for scope in Scope::ALL.into_iter().filter(|scope| scope.resets()) {
            self.set_budget(scope, None, MicroUsd::ZERO, MicroUsd::ZERO);
        }
    }

    /// Sets the jobs-by-state gauges from counts of the store.
    pub fn set_jobs(&self, counts: &[(String, u64)]) {
        for state in State::NAMES {
            let count = counts.iter().find(|(name, _)| name == state).map_or(0, |(_, n)| *n);
            self.jobs.by_state.with_label_values(&[state]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
    }

    /// A job got its slot after this many seconds.
    pub fn started(&self, queued_s: f64) {
        self.jobs.queue_time.observe(queued_s);
    }

    /// A phase of a job took this many seconds.
    pub fn phase(&self, phase: Phase, seconds: f64) {
        self.jobs.phase_time.with_label_values(&[phase.as_str()]).observe(seconds);
    }

    /// A step of a workspace's copy took this long.
    pub fn copy_step(&self, step: CopyStep, took: Duration) {
        self.jobs.copy_time.with_label_values(&[step.as_str()]).observe(took.as_secs_f64());
    }

    /// A job is done.
    pub fn ended(
        &self,
        outcome: &Outcome,
        duration_s: Option<f64>,
        charged: MicroUsd,
        cli: Option<MicroUsd>,
    ) {
        self.jobs.ended_total.with_label_values(&[outcome.label()]).inc();
        match outcome {
            Outcome::Failed(Failure { phase, reason, .. }) => {
                self.jobs.failures_total.with_label_values(&[phase.as_str(), reason.as_str()]).inc();
            }
            Outcome::Stopped { reason } => self.jobs.stops_total.with_label_values(&[reason.as_str()]).inc(),
            Outcome::Succeeded | Outcome::Lost => {}
        }
        if let Some(seconds) = duration_s {
            self.jobs.duration.observe(seconds);
            self.money.job_cost.observe(charged.as_usd());
        }
        if let Some(cli) = cli {
            let difference = charged.as_usd() - cli.as_usd();
            let none: [&str; 0] = [];
            self.money.cost_difference.with_label_values(&none).set(difference);
            let direction = if difference >= 0.0 { "above" } else { "below" };
            self.money.cost_difference_total.with_label_values(&[direction]).inc_by(difference.abs());
        }
    }

    /// Sets the sums of cost and tokens to what the store has, by model: they count what nobody saw charged, too.
    /// A sum never goes down.
    pub fn set_costs(&self, costs: &[(String, Usage, MicroUsd)]) {
        // Two scrapes at a time must not both add the same.
        let _one_at_a_time = self.money.one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sums: BTreeMap<&str, (Usage, MicroUsd)> = BTreeMap::new();
        for (model, usage, charged) in costs {
            let label = self.models.iter().find(|m| *m == model).map_or(OTHER_MODEL, String::as_str);
            let (tokens, cost) = sums.entry(label).or_default();
            *cost = cost.plus(*charged);
            tokens.add(usage);
        }
        for (model, (usage, cost)) in sums {
            let counter = self.money.cost_total.with_label_values(&[model]);
            counter.inc_by((cost.as_usd() - counter.get()).max(0.0));
            let counts =
                [usage.input, usage.output, usage.cache_read, usage.cache_write_5m, usage.cache_write_1h];
            for (kind, count) in TOKEN_TYPES.into_iter().zip(counts) {
                let counter = self.money.tokens_total.with_label_values(&[model, kind]);
                counter.inc_by(count.saturating_sub(counter.get()));
            }
        }
    }

    /// Sets the gauges of one budget; no limit is shown as 0.
    pub fn set_budget(&self, scope: Scope, limit: Option<MicroUsd>, spent: MicroUsd, reserved: MicroUsd) {
        let label = [scope.as_str()];
        self.money.budget_limit.with_label_values(&label).set(limit.unwrap_or_default().as_usd());
        self.money.budget_spent.with_label_values(&label).set(spent.as_usd());
        self.money.budget_reserved.with_label_values(&label).set(reserved.as_usd());
    }

    /// The model said something.
    pub fn turn(&self) {
        self.jobs.turns_total.inc();
    }

    /// A tool call was judged.
    pub fn tool(&self, decision: Decision) {
        let label = match decision {
            Decision::Allow => "allow",
            Decision::Deny => "deny",
            Decision::Rewrite => "rewrite",
        };
        self.jobs.tool_calls_total.with_label_values(&[label]).inc();
    }

    /// The gateway turned a request away.
    pub fn refused(&self, why: Refusal) {
        self.doors.refused_total.with_label_values(&[why.as_str()]).inc();
    }

    /// A user asked whom no access entry names.
    pub fn not_listed(&self) {
        self.doors.not_listed_total.inc();
    }

    /// A cell reached a host, or was kept from it.
    pub fn egress(&self, decision: Decision, bytes_up: u64, bytes_down: u64) {
        let label = if decision == Decision::Deny { "deny" } else { "allow" };
        self.doors.egress_total.with_label_values(&[label]).inc();
        self.doors.egress_bytes_total.with_label_values(&["up"]).inc_by(bytes_up);
        self.doors.egress_bytes_total.with_label_values(&["down"]).inc_by(bytes_down);
    }

    /// A cell got bytes from the package cache.
    pub fn cache_served(&self, bytes: u64) {
        self.cache.served(bytes);
    }

    /// How the package cache stands.
    pub fn set_cache(&self, figures: CacheFigures) {
        self.cache.set(figures);
    }

    /// Something was left over and is removed.
    pub fn reaped(&self, orphan: Orphan, count: u64) {
        self.orphans_total.with_label_values(&[orphan.as_str()]).inc_by(count);
    }

    /// Something was old or too much, and is removed.
    pub fn retired(&self, kind: Retired, bytes: u64) {
        self.retired_total.with_label_values(&[kind.as_str()]).inc();
        self.retired_bytes_total.with_label_values(&[kind.as_str()]).inc_by(bytes);
    }

    /// Somebody was told, was not and will be, or will not be (`sent`, `failed`, `given_up`).
    pub fn notice(&self, result: &str) {
        self.notices_total.with_label_values(&[result]).inc();
    }

    /// A job was parked.
    pub fn parked(&self, why: ParkReason) {
        self.jobs.parked_total.with_label_values(&[why.as_str()]).inc();
    }

    /// The text format, version 0.0.4.
    ///
    /// # Errors
    /// When a metric cannot be encoded, which the seeding at start rules out.
    pub fn text(&self) -> Result<String, prometheus::Error> {
        let mut buffer = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut buffer)?;
        Ok(String::from_utf8_lossy(&buffer).into_owned())
    }
}

impl Jobs {
    fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let duration =
            vec![1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0, 3600.0, 10800.0, 36000.0];
        let queue = vec![0.01, 0.05, 0.25, 1.0, 5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0];
        let phase = vec![0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 30.0, 120.0, 600.0, 3600.0];
        let copy = vec![0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0];
        let counted = |name, help, labels: &[&str]| counters(registry, name, help, labels);
        Ok(Self {
            by_state: gauges(registry, "hotcell_jobs", "Jobs by state.", &["state"])?,
            ended_total: counted("hotcell_jobs_total", "Jobs that ended, by outcome.", &["outcome"])?,
            failures_total: counted(
                "hotcell_failures_total",
                "Failed jobs, by the phase they failed in and the reason.",
                &["phase", "reason"],
            )?,
            stops_total: counted("hotcell_stops_total", "Stopped jobs, by reason.", &["reason"])?,
            parked_total: counted(
                "hotcell_parked_total",
                "Jobs that were parked, by reason; each time counts.",
                &["why"],
            )?,
            duration: histogram(
                registry,
                "hotcell_job_duration_seconds",
                "From the slot to the end of a job.",
                duration,
            )?,
            queue_time: histogram(registry, "hotcell_job_queue_seconds", "From submit to the slot.", queue)?,
            phase_time: histograms(
                registry,
                "hotcell_job_phase_seconds",
                "Time of each phase of a job.",
                &["phase"],
                phase,
            )?,
            copy_time: histograms(
                registry,
                "hotcell_workspace_copy_seconds",
                "Time of each step of a workspace's private copy.",
                &["step"],
                copy,
            )?,
            turns_total: counter(
                registry,
                "hotcell_turns_total",
                "Messages of models, subagents not counted.",
            )?,
            tool_calls_total: counted("hotcell_tool_calls_total", "Tool calls judged.", &["decision"])?,
        })
    }

    fn seed(&self) {
        for state in State::NAMES {
            self.by_state.with_label_values(&[state]).set(0);
        }
        for outcome in Outcome::LABELS {
            self.ended_total.with_label_values(&[outcome]);
        }
        for phase in Phase::ALL {
            self.phase_time.with_label_values(&[phase.as_str()]);
            for reason in FailReason::ALL {
                self.failures_total.with_label_values(&[phase.as_str(), reason.as_str()]);
            }
        }
        for step in CopyStep::ALL {
            self.copy_time.with_label_values(&[step.as_str()]);
        }
        for why in ParkReason::ALL {
            self.parked_total.with_label_values(&[why.as_str()]);
        }
        for reason in StopReason::ALL {
            self.stops_total.with_label_values(&[reason.as_str()]);
        }
        for decision in ["allow", "deny", "rewrite"] {
            self.tool_calls_total.with_label_values(&[decision]);
        }
    }
}

impl Money {
    fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        let cost = vec![0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 100.0];
        let budget = |name, help| float_gauges(registry, name, help, &["scope"]);
        Ok(Self {
            cost_total: float_counters(registry, "hotcell_cost_usd_total", "Charged, by model.", &["model"])?,
            one_at_a_time: Mutex::new(()),
            tokens_total: counters(registry, "hotcell_tokens_total", "Tokens billed.", &["model", "type"])?,
            budget_limit: budget(
                "hotcell_budget_limit_usd",
                "Budgets of the day and the month; 0: no limit.",
            )?,
            budget_spent: budget(
                "hotcell_budget_spent_usd",
                "Charged in the day or the month that counts; for user_day, of the user with the most.",
            )?,
            budget_reserved: budget(
                "hotcell_budget_reserved_usd",
                "Set aside there for requests under way.",
            )?,
            job_cost: histogram(registry, "hotcell_job_cost_usd", "Cost of a job.", cost)?,
            cost_difference: float_gauges(
                registry,
                "hotcell_last_job_cost_difference_usd",
                "Last job: the ledger's cost minus the CLI's own figure.",
                &[],
            )?,
            cost_difference_total: float_counters(
                registry,
                "hotcell_cost_difference_usd_total",
                "Sum over jobs of what the ledger charged above or below the CLI's own figure.",
                &["direction"],
            )?,
        })
    }

    fn seed(&self, models: &[String]) {
        for model in models {
            self.cost_total.with_label_values(&[model]);
            for kind in TOKEN_TYPES {
                self.tokens_total.with_label_values(&[model.as_str(), kind]);
            }
        }
        for direction in ["above", "below"] {
            self.cost_difference_total.with_label_values(&[direction]);
        }
        let none: [&str; 0] = [];
        self.cost_difference.with_label_values(&none).set(0.0);
    }
}

impl Doors {
    fn new(registry: &Registry) -> Result<Self, prometheus::Error> {
        Ok(Self {
            refused_total: counters(
                registry,
                "hotcell_gateway_refused_total",
                "Requests the gateway turned away, by reason.",
                &["reason"],
            )?,
            not_listed_total: counter(
                registry,
                "hotcell_access_refused_total",
                "Requests of users that no access entry names.",
            )?,
            egress_total: counters(
                registry,
                "hotcell_egress_total",
                "Connections and requests to hosts beside the model.",
                &["decision"],
            )?,
            egress_bytes_total: counters(
                registry,
                "hotcell_egress_bytes_total",
                "Bytes exchanged with hosts beside the model.",
                &["direction"],
            )?,
        })
    }

    fn seed(&self) {
        for why in Refusal::ALL {
            self.refused_total.with_label_values(&[why.as_str()]);
        }
        for decision in ["allow", "deny"] {
            self.egress_total.with_label_values(&[decision]);
        }
        for direction in ["up", "down"] {
            self.egress_bytes_total.with_label_values(&[direction]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_series_is_there_from_the_start() {
        let metrics = Metrics::new("2.1.197", &["claude-sonnet-4-6".into()]).expect("metrics");
        let text = metrics.text().expect("text");
        for line in [
            "hotcell_jobs{state=\"queued\"} 0",
            "hotcell_jobs_total{outcome=\"lost\"} 0",
            "hotcell_failures_total{phase=\"boot\",reason=\"agent_start\"} 0",
            "hotcell_cost_usd_total{model=\"claude-sonnet-4-6\"} 0",
            "hotcell_tokens_total{model=\"other\",type=\"cache_read\"} 0",
            "hotcell_orphans_reaped_total{kind=\"container\"} 0",
            "hotcell_job_phase_seconds_count{phase=\"collect\"} 0",
            "hotcell_workspace_copy_seconds_count{step=\"set_up\"} 0",
            "hotcell_budget_spent_usd{scope=\"user_day\"} 0",
            "hotcell_budget_limit_usd{scope=\"month\"} 0",
            "hotcell_gateway_refused_total{reason=\"credential\"} 0",
        ] {
            assert!(text.contains(line), "missing {line}\n{text}");
        }
        let refusals = || text.lines().filter(|line| line.starts_with("hotcell_gateway_refused_total{"));
        assert_eq!(refusals().count(), Refusal::ALL.len());
        metrics.refused(Refusal::Budget);
        let text = metrics.text().expect("text");
        assert!(text.contains("hotcell_gateway_refused_total{reason=\"budget\"} 1"), "{text}");
    }

    #[test]
    fn costs_are_the_stores_and_unknown_models_count_as_other() {
        let metrics = Metrics::new("x", &["a".into()]).expect("metrics");
        let usage = Usage { input: 3, ..Usage::default() };
        let cost = |model: &str, usd: u64| (model.to_owned(), usage, MicroUsd(usd * 500_000));
        let mut all = vec![cost("a", 2), cost("from-the-agent\"} 1", 1), cost("b", 2)];
        for _ in 0..2 {
            metrics.set_costs(&all);
        }
        let text = metrics.text().expect("text");
        assert!(text.contains("hotcell_cost_usd_total{model=\"other\"} 1.5"), "{text}");
        assert!(text.contains("hotcell_tokens_total{model=\"other\",type=\"input\"} 6"), "{text}");
        all[0] = cost("a", 3);
        metrics.set_costs(&all);
        let text = metrics.text().expect("text");
        assert!(text.contains("hotcell_cost_usd_total{model=\"a\"} 1.5"), "{text}");
    }
}
