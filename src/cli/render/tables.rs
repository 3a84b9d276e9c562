//! Jobs, health and policies as tables and lists for people. Pure.

use super::stream::{explain, spent, tokens, verdict};
use super::{Paint, Style, Text, one_line, words};
use crate::agent_bundle::{Bundle, Qualification, Version};
use crate::api::wire::{Attacked, Check, CheckVerdict, Doctor, Health, JobView};
use crate::cell_image::{Listed, Standing};
use crate::config::{PolicyOrigin, PolicySource};
use crate::event::EgressBytes;
use crate::job::{Outcome, State};
use crate::money::MicroUsd;

/// Milliseconds since 1970 of an RFC 3339 time.
pub(crate) fn parse_ms(rfc3339: &str) -> Option<u64> {
    let stamp: jiff::Timestamp = rfc3339.parse().ok()?;
    u64::try_from(stamp.as_millisecond()).ok()
}

/// Columns padded to their widest cell; the last one is not padded. Cells must be one line each.
pub(crate) fn table(paint: Paint, head: &[&str], rows: &[Vec<(Style, String)>]) -> Text {
    let mut text = Text::new(paint);
    let width = |column: usize| {
        let cells = rows.iter().map(|row| row.get(column).map_or(0, |(_, cell)| cell.chars().count()));
        cells.chain([head[column].len()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let pad = |column: usize, cell: &str| {
        let gap = widths[column].saturating_sub(cell.chars().count()) + 2;
        if column + 1 == head.len() { String::new() } else { " ".repeat(gap) }
    };
    for (column, cell) in head.iter().enumerate() {
        text = text.add(Style::Dim, cell).plain(&pad(column, cell));
    }
    text = text.end();
    for row in rows {
        for (column, (style, cell)) in row.iter().enumerate() {
            text = text.add(*style, cell).plain(&pad(column, cell));
        }
        text = text.end();
    }
    text
}

/// The state, and for a job that is done its outcome, in one or two words.
fn standing(state: &State) -> (Style, String) {
    match state {
        State::Queued => (Style::Dim, "queued".into()),
        State::Preparing | State::Collecting { .. } | State::Verifying => (Style::Plain, state.name().into()),
        State::Running => (Style::Bold, "running".into()),
        State::Parking { parked } => (Style::Warn, format!("parking ({})", parked.why.as_str())),
        State::Parked { parked } => (Style::Warn, format!("parked ({})", parked.why.as_str())),
        State::Stopping { reason } => (Style::Warn, format!("stopping ({})", reason.as_str())),
        State::Done(Outcome::Succeeded) => (Style::Good, "succeeded".into()),
        State::Done(Outcome::Failed(f)) => (Style::Bad, format!("failed ({})", f.reason.as_str())),
        State::Done(Outcome::Stopped { reason }) => (Style::Warn, format!("stopped ({})", reason.as_str())),
        State::Done(Outcome::Lost) => (Style::Bad, "lost".into()),
    }
}

/// From the slot to the end, or to `now_ms`.
fn run_ms(job: &JobView, now_ms: u64) -> Option<u64> {
    let started = parse_ms(job.started_at.as_deref()?)?;
    let ended = job.ended_at.as_deref().and_then(parse_ms).unwrap_or(now_ms);
    Some(ended.saturating_sub(started))
}

/// `hotcell ls`; `users` adds a column of user ids.
pub(crate) fn jobs(paint: Paint, jobs: &[JobView], now_ms: u64, users: bool) -> Text {
    if jobs.is_empty() {
        return Text::new(paint).add(Style::Dim, "no jobs").end();
    }
    let mut head = vec!["JOB", "STATE", "AGE", "TIME", "COST", "POLICY", "TITLE"];
    if users {
        head.insert(1, "UID");
    }
    let rows: Vec<Vec<(Style, String)>> = jobs
        .iter()
        .map(|job| {
            let plain = |text: String| (Style::Plain, text);
            let age = parse_ms(&job.created_at).map(|ms| words::age(now_ms.saturating_sub(ms)));
            let mut row = vec![
                plain(job.id.to_string()),
                standing(&job.state),
                plain(age.unwrap_or_else(|| "?".into())),
                plain(run_ms(job, now_ms).map_or("-".into(), words::clock)),
                plain(words::dollars(job.cost_usd)),
                plain(one_line(&job.policy, 20)),
                plain(one_line(&job.title, 60)),
            ];
            if users {
                row.insert(1, plain(job.uid.to_string()));
            }
            row
        })
        .collect();
    table(paint, &head, &rows)
}

/// `hotcell show`.
pub(crate) fn job(paint: Paint, job: &JobView, now_ms: u64) -> Text {
    let mut text = Text::new(paint).add(Style::Bold, job.id.as_str()).plain("  ");
    text = text.plain(&one_line(&job.title, 80)).end();
    let mut row = |label: &str, value: &str| {
        let line =
            Text::new(paint).add(Style::Dim, &format!("  {label:<12}")).plain(&one_line(value, 400)).end();
        text.safe.push_str(line.as_str());
    };
    row("state", &standing(&job.state).1);
    if let State::Parking { parked } | State::Parked { parked } = &job.state {
        row("", &format!("{}; hotcell unpark lets it go on now", words::parked(parked)));
    }
    row("policy", &job.policy);
    row("model", &job.model);
    row("image", &job.image);
    let mode = job.workspace_mode.as_str();
    row("workspace", &job.workspace.as_ref().map_or(mode.to_owned(), |path| format!("{path} ({mode})")));
    if let Some(source) = &job.source {
        let name = source
            .name
            .as_ref()
            .or(source.branch.as_ref())
            .map(|name| format!(", {name}"))
            .unwrap_or_default();
        row("fetched from", &format!("{}{name}, commit {}", source.url, source.commit));
    }
    if !job.labels.is_empty() {
        let labels: Vec<String> = job.labels.iter().map(|(k, v)| format!("{k}={v}")).collect();
        row("labels", &labels.join(" "));
    }
    if let Some(batch) = &job.batch {
        row("batch", batch);
    }
    if job.priority != 0 {
        row("priority", &job.priority.to_string());
    }
    row("user", &job.uid.to_string());
    if let Some(runtime) = job.runtime {
        row("runtime", words::runtime(runtime));
    }
    if let Some(cell) = &job.cell {
        row("cell", cell);
    }
    row("created", &job.created_at);
    if let Some(at) = &job.started_at {
        row("started", at);
    }
    if let Some(at) = &job.ended_at {
        row("ended", at);
    }
    row("spent", &spent(&job.totals, run_ms(job, now_ms), job.cost_limit_usd));
    row("tokens", &tokens(&job.totals));
    if let Some(own) = job.totals.cli_micro_usd.filter(|own| differs(*own, job.totals.charged_micro_usd)) {
        row("CLI's cost", &format!("{} (the ledger's figure above is the truth)", words::usd(own)));
    }
    if job.totals.peak_memory_bytes > 0 {
        let (memory, cpu) = (words::bytes(job.totals.peak_memory_bytes), job.totals.cpu_us / 1000);
        row("used", &format!("{memory} of memory at most · {} of CPU", words::duration(cpu)));
    }
    let egress = job.totals.egress;
    if egress != EgressBytes::default() {
        let [up, down, cached] = [egress.bytes_up, egress.bytes_down, egress.cached_bytes].map(words::size);
        row("egress", &format!("{up} up · {down} down · {cached} from the package cache"));
    }
    if let Some(bytes) = job.report_bytes {
        row("report", &format!("{bytes} bytes: hotcell report {}", job.id));
    }
    for one in &job.totals.quarantined {
        let now = one.moved_to.as_ref().map_or_else(
            || format!("is still there: {}", one.why.as_deref().unwrap_or("it could not be renamed")),
            |name| format!("is now {name}"),
        );
        row("quarantined", &format!("{} appeared during the job and {now}", one.path));
    }
    row("events", &job.last_seq.to_string());
    ending(text, job)
}

fn ending(mut text: Text, job: &JobView) -> Text {
    if let Some(outcome) = job.outcome() {
        text = explain(verdict(text, outcome), outcome, job.id.as_str());
    }
    if let Some(result) = job.result.as_deref().map(str::trim).filter(|r| !r.is_empty()) {
        text = text.end();
        for line in result.lines() {
            text = text.agent(line).end();
        }
    }
    text
}

/// The CLI rounds; a difference below a hundredth of a cent is none.
fn differs(a: MicroUsd, b: MicroUsd) -> bool {
    a.minus(b).plus(b.minus(a)) >= MicroUsd(100)
}

/// `hotcell health`.
pub(crate) fn health(paint: Paint, health: &Health) -> Text {
    let style = if health.status == "ok" { Style::Good } else { Style::Bad };
    let mut text = Text::new(paint).add(style, &health.status).plain(&format!(
        "  hotcell {}, instance {}, engine {}",
        health.version, health.instance, health.engine
    ));
    text = text.end();
    for problem in &health.problems {
        text = text.plain("  ").add(Style::Warn, problem).end();
    }
    for note in &health.notes {
        text = text.plain("  ").add(Style::Dim, note).end();
    }
    text
}

fn promise(check: &Check) -> String {
    check.promise.as_ref().map(|promise| format!("{promise}: ")).unwrap_or_default()
}

/// `hotcell doctor`.
pub(crate) fn doctor(paint: Paint, doctor: &Doctor) -> Text {
    let mut text = Text::new(paint);
    let mut attack = doctor.attack.as_ref();
    for check in &doctor.checks {
        if check.promise.is_some()
            && let Some(Attacked { jobs, policy, runtime, image }) = attack.take()
        {
            let runtime = runtime.unwrap_or_default().as_str();
            let jobs = jobs.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
            let words =
                format!("what a cell promised under {policy} ({runtime}, {image}), attacked by {jobs}:");
            text = text.add(Style::Dim, &words).end();
        }
        let (style, verdict) = match check.verdict {
            CheckVerdict::Pass => (Style::Good, "ok"),
            CheckVerdict::Note => (Style::Warn, "note"),
            CheckVerdict::Fail => (Style::Bad, "fails"),
        };
        text = text
            .add(style, &format!("{verdict:<6}"))
            .plain(&format!("{:<11}{}{}", check.name, promise(check), check.words))
            .end();
        if let Some(hint) = &check.hint {
            text = text.add(Style::Dim, &format!("{:17}{hint}", "")).end();
        }
    }
    text
}

/// `hotcell agent ls`.
pub(crate) fn agents(paint: Paint, bundles: &[Bundle], active: &Version) -> Text {
    let mut text = Text::new(paint);
    if bundles.is_empty() {
        return text.plain("no agent is installed; `hotcell agent install VERSION` fetches one").end();
    }
    for bundle in bundles {
        let (style, state) = match &bundle.state {
            Qualification::Installed => (Style::Dim, "not tested".to_owned()),
            Qualification::Qualified { report } => {
                (Style::Good, words::plural(report.checks.len() as u64, "check") + " passed")
            }
            Qualification::Failed { why, .. } => (Style::Bad, format!("failed: {}", one_line(why, 100))),
        };
        let mark = if bundle.version == *active { "*" } else { " " };
        let name = format!(
            "{mark} {} {}  {:.0} MB  ",
            bundle.version,
            bundle.platform,
            bundle.size_bytes as f64 / 1e6
        );
        text = text.plain(&name).add(style, &state).end();
    }
    text
}

/// `hotcell image ls`.
pub(crate) fn images(paint: Paint, all: &[Listed]) -> Text {
    let rows: Vec<Vec<(Style, String)>> = all
        .iter()
        .map(|listed| {
            let (style, state) = match listed.state {
                Standing::Built => (Style::Good, "built".to_owned()),
                Standing::Outdated => {
                    (Style::Warn, format!("outdated: `hotcell image build {}`", listed.name))
                }
                Standing::NotBuilt => (Style::Dim, format!("`hotcell image build {}`", listed.name)),
                // The next job that wants it builds it.
                Standing::Gone if listed.name == "build" => (Style::Dim, "gone".to_owned()),
                Standing::Gone => (Style::Bad, format!("gone: `hotcell image build {}`", listed.name)),
            };
            let size = listed.built.as_ref().and_then(|found| found.size_bytes);
            let size = size.map_or_else(String::new, |bytes| format!("{} MB", bytes / 1_000_000));
            let versions = listed.built.iter().flat_map(|found| &found.versions);
            let versions =
                versions.map(|(name, version)| format!("{name} {version}")).collect::<Vec<_>>().join(", ");
            vec![
                (Style::Plain, listed.image.clone()),
                (style, state),
                (Style::Plain, size),
                (Style::Plain, versions),
            ]
        })
        .collect();
    table(paint, &["IMAGE", "STATE", "SIZE", "WITH"], &rows)
}

/// `hotcell policy ls`.
pub(crate) fn policies<'a>(paint: Paint, all: impl Iterator<Item = (&'a String, &'a PolicySource)>) -> Text {
    let rows: Vec<Vec<(Style, String)>> = all
        .map(|(name, source)| {
            let origin = match &source.origin {
                PolicyOrigin::BuiltIn => "built in".to_owned(),
                PolicyOrigin::File(path) => path.display().to_string(),
            };
            let cells = [
                name.clone(),
                words::dollars_limit(source.policy.limits.cost_usd),
                origin,
                one_line(&source.policy.description, 100),
            ];
            cells.into_iter().map(|cell| (Style::Plain, cell)).collect()
        })
        .collect();
    table(paint, &["POLICY", "COST", "FROM", "DESCRIPTION"], &rows)
}
