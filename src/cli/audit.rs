//! `hotcell audit`: what was decided, of one job or of all that we may see, as NDJSON for programs and as lines
//! for people. A lost connection is made again; nothing is shown twice.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use bytes::Bytes;
use clap::Args;

use super::client::Client;
use super::fail::{CliError, ExitCode};
use super::follow::Interrupts;
use super::render::audit as view;
use super::{Connection, Context, args, find_job};
use crate::api::wire::ErrorCode;
use crate::audit::{Kind, Record, What};
use crate::clock;
use crate::job::JobId;

/// How long the daemon may be away before a follower gives up.
const AWAY_MAX: Duration = Duration::from_secs(120);
/// First and longest pause between attempts to reconnect.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(2));

/// Show what was decided: tool calls, hosts, requests, credentials, limits
#[derive(Debug, Args)]
#[command(after_help = "\
Without JOB the decisions of all your jobs are shown, for admins those of all users. Output is
one JSON object a line, but for a terminal, which gets lines to read. A record's origin is set
by the daemon: what an agent prints never is one. With -f and a JOB it ends with the job;
Ctrl-C leaves.

--kind takes tool, egress, request, charge, refused, budget, stop, limit, end, credential
(whatever used one), several with commas. --since takes how long ago (90s, 2h, 7d) or a time
(2026-01-31T08:00:00Z).")]
pub(super) struct AuditArgs {
    /// The job's id, or the beginning of it; all jobs where absent
    #[arg(value_name = "JOB")]
    job: Option<String>,
    /// Wait for more
    #[arg(short, long)]
    follow: bool,
    /// Only these kinds
    #[arg(short, long, value_name = "KIND[,KIND…]", value_delimiter = ',')]
    kind: Vec<Kind>,
    /// Only what was denied or refused
    #[arg(long)]
    denied: bool,
    /// Only from then on
    #[arg(long, value_name = "AGO|TIME", value_parser = since)]
    since: Option<Since>,
    /// Print JSON to a terminal too
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

/// A moment, as people name it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Since {
    AgoS(u32),
    AtMs(u64),
}

fn since(text: &str) -> Result<Since, String> {
    if let Some(ms) = super::render::tables::parse_ms(text) {
        return Ok(Since::AtMs(ms));
    }
    args::seconds(text).map(Since::AgoS).map_err(|e| format!("{e}, nor a time such as 2026-01-31T08:00:00Z"))
}

pub(super) async fn audit(args: &AuditArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let client = args.connection.client(&context.machine)?;
    let job = match &args.job {
        Some(text) => Some(find_job(&client, text).await?),
        None => None,
    };
    let since_ms = match args.since {
        None => 0,
        Some(Since::AtMs(ms)) => ms,
        Some(Since::AgoS(s)) => clock::wall_ms().saturating_sub(u64::from(s) * 1000),
    };
    let mut query = Vec::new();
    if !args.kind.is_empty() {
        let kinds: Vec<&str> = args.kind.iter().map(|kind| kind.as_str()).collect();
        query.push(("kind", kinds.join(",")));
    }
    if args.denied {
        query.push(("denied", "1".to_owned()));
    }
    if args.follow {
        query.push(("follow", "1".to_owned()));
    }
    let readable = !args.json && context.out.is_terminal();
    let mut audit = Audit { job, query, since_ms, readable, last: HashMap::new() };
    let mut interrupts = Interrupts::listen()?;
    audit.run(&client, args.follow, context, &mut interrupts).await
}

struct Audit {
    job: Option<JobId>,
    query: Vec<(&'static str, String)>,
    since_ms: u64,
    readable: bool,
    last: HashMap<JobId, Last>,
}

/// The last record of a job that was shown.
#[derive(Debug, Clone, Copy)]
struct Last {
    seq: u64,
    at_ms: u64,
    /// It told of the job's end.
    over: bool,
}

/// From so many jobs on, those that are over and cannot come again are forgotten.
const REMEMBERED_JOBS: usize = 4096;

impl Audit {
    async fn run(
        &mut self,
        client: &Client,
        follow: bool,
        context: &mut Context,
        interrupts: &mut Interrupts,
    ) -> Result<ExitCode, CliError> {
        let (mut pause, mut away_since) = (PAUSE.0, None::<Instant>);
        loop {
            let lost = tokio::select! {
                ended = self.stream(client, context, &mut away_since) => ended,
                () = interrupts.next() => return Ok(ExitCode::Cancelled),
            };
            let lost = match lost {
                Ok(()) if !follow => return Ok(ExitCode::Succeeded),
                Ok(()) => match self.over(client).await {
                    Ok(true) => return Ok(ExitCode::Succeeded),
                    Ok(false) => CliError::ConnectionLost { what: "the stream of records was cut".into() },
                    Err(error) => error,
                },
                Err(error) => error,
            };
            let again = follow && matches!(lost, CliError::ConnectionLost { .. } | CliError::NoDaemon { .. });
            if !again {
                return Err(lost);
            }
            if away_since.is_none() {
                context.out.notice(&format!("hotcell: {lost}; trying again"))?;
                pause = PAUSE.0;
            }
            if away_since.get_or_insert_with(Instant::now).elapsed() > AWAY_MAX {
                return Err(lost);
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(PAUSE.1),
                () = interrupts.next() => return Ok(ExitCode::Cancelled),
            }
        }
    }

    /// True when the one job that was asked for is over, so that nothing more comes.
    async fn over(&self, client: &Client) -> Result<bool, CliError> {
        match &self.job {
            Some(id) => match client.job(id).await {
                Ok(job) => Ok(job.state.is_done()),
                // Removed: its audit is all there is.
                Err(CliError::Api(error)) if error.code == Some(ErrorCode::NotFound) => Ok(true),
                Err(error) => Err(error),
            },
            None => Ok(false),
        }
    }

    /// One connection's worth of records.
    async fn stream(
        &mut self,
        client: &Client,
        context: &mut Context,
        away_since: &mut Option<Instant>,
    ) -> Result<(), CliError> {
        let mut query = self.query.clone();
        query.push(("since_ms", self.resume_ms().to_string()));
        let mut records = client.audit(self.job.as_ref(), &query).await?;
        let mut lines = Vec::new();
        loop {
            lines.clear();
            let more = records.next(&mut lines).await?;
            *away_since = None;
            for line in &lines {
                self.one(line, context)?;
            }
            context.out.flush()?;
            if !more {
                return Ok(());
            }
        }
    }

    /// From when to ask again: nothing of an open job is left out, and what was shown is skipped by its number.
    fn resume_ms(&self) -> u64 {
        let open = self.last.values().filter(|last| !last.over).map(|last| last.at_ms).min();
        let latest = || self.last.values().map(|last| last.at_ms).max();
        open.or_else(latest).unwrap_or(0).max(self.since_ms)
    }

    fn one(&mut self, line: &Bytes, context: &mut Context) -> Result<(), CliError> {
        let wrong = |e: serde_json::Error| CliError::Protocol { what: format!("a record: {e}") };
        let record: Record = serde_json::from_slice(line).map_err(wrong)?;
        if self.last.get(&record.job).is_some_and(|last| record.seq <= last.seq) {
            return Ok(());
        }
        if self.last.len() >= REMEMBERED_JOBS {
            let resume_ms = self.resume_ms();
            self.last.retain(|_, last| !last.over || last.at_ms >= resume_ms);
        }
        let over = matches!(record.what, What::End { .. });
        self.last.insert(record.job.clone(), Last { seq: record.seq, at_ms: record.at_ms, over });
        if self.readable {
            let text = view::record(context.out.paint, &record, self.job.is_none());
            return context.out.print(&text);
        }
        context.out.json_line(line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn since_is_how_long_ago_or_a_time() {
        assert_eq!(since("2h"), Ok(Since::AgoS(7200)));
        assert_eq!(since("1970-01-01T00:00:01Z"), Ok(Since::AtMs(1000)));
        assert!(since("yesterday").is_err());
    }
}
