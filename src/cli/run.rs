//! `hotcell run`: makes a job spec from flags, submits it and follows it to its end. Reads the prompt and
//! the spec, nothing else; what the job may do is the daemon's to decide.

use std::io::Read;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};

mod ending;

use super::client::Client;
use super::fail::{CliError, ExitCode};
use super::follow::{Ended, Follow, Interrupts, OnInterrupt, Show};
use super::render::stream::StreamView;
use super::render::{Style, Text, one_line};
use super::{Connection, Context, args, wait};
use crate::api::wire::JobView;
use crate::job::Outcome;
use crate::job::source::looks_like_url;
use crate::job::spec::{JobSpec, NARROW_BYTES_MAX, PROMPT_BYTES_MAX, SPEC_BYTES_MAX, SpecError};
use crate::policy::{Narrowing, Sets};
use ending::Wish;

/// Most attempts to submit when the connection breaks before the answer came.
const SUBMIT_ATTEMPTS: u32 = 3;

/// Run one job and show what it does
#[derive(Debug, Args)]
#[command(after_help = "\
Ctrl-C cancels the job and waits for its end; a second Ctrl-C leaves at once.
A client that is closed or killed leaves its job running: `hotcell logs -f JOB` follows it again.
With --json every event is one line as it comes, and the last line is {\"job\":{…}}.
A limit that is not given is the policy's, which is also the most that can be asked for.")]
pub(super) struct RunArgs {
    /// What the agent shall do; `-` reads it from standard input
    #[arg(value_name = "PROMPT", required_unless_present = "spec")]
    prompt: Option<String>,
    /// Directory the agent works on, or a git repository to fetch: https://…, ssh://…, git@host:path
    /// [default: an empty one that is thrown away]
    #[arg(short, long, value_name = "DIR|URL")]
    workspace: Option<PathBuf>,
    /// Fetch this branch, tag or commit of the repository -w, which may be a bare one here
    #[arg(long = "ref", value_name = "REF", requires = "workspace")]
    name: Option<String>,
    /// How the directory is mounted [default: the policy's first mode]
    #[arg(long, value_enum, value_name = "MODE")]
    mode: Option<Mode>,
    /// Policy that bounds the job [default: the daemon's]
    #[arg(short, long, value_name = "NAME")]
    policy: Option<String>,
    /// A policy file of your own that narrows it
    #[arg(long, value_name = "FILE")]
    narrow: Option<PathBuf>,
    /// Start from a job spec in JSON; flags win over it; `-` reads it from standard input
    #[arg(long, value_name = "FILE")]
    spec: Option<PathBuf>,
    /// When the job has succeeded, apply what it changed (all but what is flagged or refused)
    #[arg(long, conflicts_with = "detach")]
    apply: bool,
    /// Go on with what this job of yours changed
    #[arg(long, value_name = "JOB")]
    from: Option<String>,
    /// Print the job's id and return at once
    #[arg(short, long)]
    detach: bool,
    /// Print events as JSON, one a line, and the job last
    #[arg(long)]
    pub(super) json: bool,
    /// Let terminal escapes of the agent through
    #[arg(long, conflicts_with = "json")]
    raw: bool,
    #[command(flatten)]
    steps: StepFlags,
    #[command(flatten)]
    agent: AgentFlags,
    #[command(flatten)]
    limits: LimitFlags,
    #[command(flatten)]
    job: JobFlags,
    #[command(flatten)]
    connection: Connection,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Mode {
    /// A private copy: the directory itself stays as it is until you apply what was changed
    Copy,
    /// In place: what the agent writes is written to the directory itself
    Bind,
    /// The agent can read it and write nothing
    ReadOnly,
    /// An empty directory that is thrown away
    None,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Agent")]
struct AgentFlags {
    /// Model
    #[arg(short, long, value_name = "NAME")]
    model: Option<String>,
    /// Model to go on with while the first one is overloaded
    #[arg(long, value_name = "NAME")]
    fallback_model: Option<String>,
    /// How hard the model thinks
    #[arg(long, value_name = "LEVEL", value_parser = ["low", "medium", "high", "xhigh", "max"])]
    effort: Option<String>,
    /// Image of the cell: a name, auto (by the files there), or build (their own Dockerfile)
    #[arg(long, value_name = "REF")]
    image: Option<String>,
    /// Version of the agent
    #[arg(long, value_name = "VERSION")]
    agent: Option<String>,
    /// What isolates the cell: runc, or runsc for gVisor; no other one will do then
    #[arg(long, value_name = "NAME", value_parser = ["runc", "runsc"])]
    runtime: Option<String>,
    /// Model provider, by its name in the daemon's configuration
    #[arg(long, value_name = "NAME")]
    provider: Option<String>,
    /// The agent's permission mode
    #[arg(long, value_name = "MODE", value_parser = ["bypassPermissions", "default", "acceptEdits", "plan", "dontAsk"])]
    permission_mode: Option<String>,
    /// Built-in tools that exist at all, e.g. Read,Bash; "" for none
    #[arg(long, value_name = "A,B")]
    tools: Vec<String>,
    /// Tools that need no further asking in the modes that ask
    #[arg(long, value_name = "A,B")]
    allowed_tools: Vec<String>,
    /// Tools that are refused
    #[arg(long, value_name = "A,B")]
    disallowed_tools: Vec<String>,
    /// Replace the agent's system prompt
    #[arg(long, value_name = "TEXT")]
    system_prompt: Option<String>,
    /// Add to the agent's system prompt
    #[arg(long, value_name = "TEXT")]
    append_system_prompt: Option<String>,
    /// Environment variable of the agent; without a value, this command's own
    #[arg(short, long, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Steps")]
struct StepFlags {
    /// Command line that runs in the cell before the agent; can be given several times
    #[arg(long, value_name = "COMMAND")]
    setup: Vec<String>,
    /// Command line that judges the result, in a fresh cell without a model; can be given several times
    #[arg(long, value_name = "COMMAND")]
    verify: Vec<String>,
    /// How often the agent gets the output of a failed verification and another try
    #[arg(long, value_name = "N", requires = "verify")]
    repair: Option<u32>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Limits")]
pub(super) struct LimitFlags {
    /// Turns of the model
    #[arg(long, value_name = "N", value_parser = args::count, allow_hyphen_values = true)]
    max_turns: Option<u32>,
    /// Money in USD: a bound, not a target
    #[arg(long, value_name = "USD", value_parser = args::usd, allow_hyphen_values = true)]
    cost: Option<f64>,
    /// Time from the start of the cell, e.g. 30m
    #[arg(long, value_name = "DURATION", value_parser = args::seconds, allow_hyphen_values = true)]
    time: Option<u32>,
    /// Time without any output of the agent, e.g. 10m
    #[arg(long, value_name = "DURATION", value_parser = args::seconds, allow_hyphen_values = true)]
    silence: Option<u32>,
    /// Processor cores, e.g. 1.5
    #[arg(long, value_name = "N", value_parser = args::cores, allow_hyphen_values = true)]
    cpus: Option<f64>,
    /// Memory of all processes together, e.g. 4g
    #[arg(long, value_name = "SIZE", value_parser = args::mib, allow_hyphen_values = true)]
    memory: Option<u32>,
    /// Processes and threads
    #[arg(long, value_name = "N", value_parser = args::count, allow_hyphen_values = true)]
    pids: Option<u32>,
    /// Disk space for HOME and /tmp, e.g. 4g
    #[arg(long, value_name = "SIZE", value_parser = args::mib, allow_hyphen_values = true)]
    disk: Option<u32>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Job")]
struct JobFlags {
    /// Note to find the job by; can be given several times
    #[arg(short, long, value_name = "KEY=VALUE", value_parser = args::pair)]
    label: Vec<(String, String)>,
    /// From -100 to 100; higher goes first among your jobs
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    priority: Option<i8>,
    /// Batch it belongs to: jobs of yours that share a budget
    #[arg(long, value_name = "NAME")]
    batch: Option<String>,
    /// Money in USD for all jobs of the batch together; the batch's first job decides
    #[arg(long, value_name = "USD", value_parser = args::usd, allow_hyphen_values = true, requires = "batch")]
    batch_cost_usd: Option<f64>,
    /// Submitting again with the same key gives the same job
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<String>,
}

pub(super) fn run(args: RunArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    context.out.paint.raw = args.raw;
    let client = args.connection.client(&context.machine)?;
    let spec = job_spec(&args, context)?;
    wait(async {
        let mut interrupts = Interrupts::listen()?;
        submit_and_follow(&args, spec, &client, context, &mut interrupts).await
    })
}

pub(super) async fn submit_and_follow(
    args: &RunArgs,
    spec: Bytes,
    client: &Client,
    context: &mut Context,
    interrupts: &mut Interrupts,
) -> Result<ExitCode, CliError> {
    let key = args.job.idempotency_key.clone().map_or_else(random_key, Ok)?;
    let mut interrupted = false;
    let fetched = JobSpec::parse(&spec).ok().and_then(|spec| spec.workspace?.git);
    if let Some(git) = fetched.filter(|_| !args.json) {
        let name = git.name.map(|name| format!(" ({name})")).unwrap_or_default();
        context.out.notice(&one_line(&format!("hotcell: fetching {}{name} …", git.url), 300))?;
    }
    let job = {
        let mut submitting = std::pin::pin!(submit(client, spec, &key));
        loop {
            tokio::select! {
                job = &mut submitting => break job?,
                () = interrupts.next() => {
                    // Whether the job exists is known only with the answer.
                    if interrupted {
                        context.out.notice("hotcell: left; `hotcell ls` shows whether the job was accepted")?;
                        return Ok(ExitCode::Cancelled);
                    }
                    interrupted = true;
                    context.out.notice("hotcell: the job will be cancelled as soon as the daemon answers")?;
                }
            }
        }
    };
    for warning in &job.warnings {
        context.out.notice(&format!("hotcell: warning: {warning}"))?;
    }
    if args.detach && !interrupted {
        return detached(&job, args.json, context);
    }
    let show = if args.json {
        Show::Json
    } else {
        context.out.print(&headline(&job, context))?;
        Show::Readable(Box::new(StreamView::new(&job, context.out.paint, !context.out.is_live())))
    };
    let mut follow = Follow {
        client,
        job: job.id,
        last_seq: 0,
        follow: true,
        on_interrupt: OnInterrupt::Cancel,
        cancel_wanted: interrupted,
        show,
    };
    match follow.run(&mut context.out, interrupts).await? {
        Ended::Left => {
            context.out.end_status();
            let words = format!("hotcell: left; `hotcell logs -f {}` follows the job", follow.job);
            context.out.notice(&words)?;
            Ok(ExitCode::Cancelled)
        }
        Ended::End => finish(follow, args, context).await,
    }
}

/// The end: the job itself for programs, what it changed, and the exit code.
async fn finish(follow: Follow<'_>, args: &RunArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let job = follow.client.job(&follow.job).await?;
    if args.json {
        context.out.json(&json!({ "job": &job }))?;
    }
    let Some(outcome) = job.outcome() else {
        return Err(CliError::Protocol {
            what: format!("the job's events ended while it is {}", job.state.name()),
        });
    };
    context.out.end_status();
    let wish = if args.apply && *outcome == Outcome::Succeeded { Wish::Apply } else { Wish::Ask };
    ending::end(follow.client, &job, wish, args.json, context).await?;
    Ok(ExitCode::of(outcome))
}

/// Submits, and again with the same key when the answer got lost.
pub(super) async fn submit(client: &Client, spec: Bytes, key: &str) -> Result<JobView, CliError> {
    let mut attempt = 1;
    loop {
        match client.submit(spec.clone(), key).await {
            Err(CliError::ConnectionLost { .. }) if attempt < SUBMIT_ATTEMPTS => attempt += 1,
            other => return other,
        }
    }
}

pub(super) fn random_key() -> Result<String, CliError> {
    let random = || getrandom::u64().map_err(|e| CliError::Local(anyhow::anyhow!("no random number: {e}")));
    Ok(format!("run-{:016x}{:016x}", random()?, random()?))
}

fn detached(job: &JobView, json: bool, context: &mut Context) -> Result<ExitCode, CliError> {
    if json {
        context.out.json(job)?;
    } else {
        let text = Text::new(context.out.paint).plain(job.id.as_str()).end();
        context.out.print(&text)?;
    }
    Ok(ExitCode::Succeeded)
}

fn headline(job: &JobView, context: &Context) -> Text {
    let place = match (&job.source, &job.workspace) {
        (Some(source), _) => format!("{} ({})", source.url, job.workspace_mode.as_str()),
        (None, Some(path)) => format!("{path} ({})", job.workspace_mode.as_str()),
        (None, None) => "no workspace".to_owned(),
    };
    let rest = format!("{} · {} · {} · {place}", job.policy, job.model, job.image);
    Text::new(context.out.paint)
        .add(Style::Bold, job.id.as_str())
        .add(Style::Dim, &format!("  {}", one_line(&rest, 300)))
        .end()
}

/// The spec as JSON: the file's keys with the flags put over them, checked as the daemon will check it.
fn job_spec(args: &RunArgs, context: &Context) -> Result<Bytes, CliError> {
    let from_stdin = |text: Option<&str>| text == Some("-");
    if from_stdin(args.prompt.as_deref()) && args.spec.as_deref() == Some(Path::new("-")) {
        return Err(CliError::usage("the prompt and the spec cannot both come from standard input"));
    }
    let mut spec = match &args.spec {
        Some(path) => read_spec(path, args.prompt.is_some())?,
        None => Map::new(),
    };
    match args.prompt.as_deref() {
        Some("-") => {
            put(&mut spec, "prompt", Some(read_text("the prompt", Path::new("-"), PROMPT_BYTES_MAX)?))
        }
        prompt => put(&mut spec, "prompt", prompt),
    }
    workspace(args.workspace.as_deref(), args.name.as_ref(), args.mode, &mut spec)?;
    steps(&args.steps, &mut spec);
    put(&mut spec, "from", args.from.as_ref());
    put(&mut spec, "policy", args.policy.as_ref());
    if let Some(path) = &args.narrow {
        let text = read_text("the narrowing policy", path, NARROW_BYTES_MAX)?;
        // Checked here, where the file has its name. Which sets of hosts there are, the daemon knows.
        Narrowing::parse_with(&path.display().to_string(), &text, &Sets::of_another_daemon())
            .map_err(|e| CliError::usage(e.to_string()))?;
        put(&mut spec, "narrow", Some(text));
    }
    agent(&args.agent, context, &mut spec)?;
    limits(&args.limits, &mut spec);
    for (key, value) in &args.job.label {
        put(object(&mut spec, "labels"), key, Some(value));
    }
    put(&mut spec, "priority", args.job.priority);
    if let Some(name) = &args.job.batch {
        let mut batch = Map::new();
        put(&mut batch, "name", Some(name));
        put(&mut batch, "cost_usd", args.job.batch_cost_usd);
        put(&mut spec, "batch", Some(batch));
    }
    let bytes = serde_json::to_vec(&spec).map_err(|e| CliError::usage(e.to_string()))?;
    let checked = JobSpec::parse(&bytes).map_err(spec_error)?;
    if args.apply && checked.workspace.is_some_and(|workspace| workspace.git.is_some()) {
        let hint =
            "without it, `hotcell apply JOB --to DIR [--branch NAME]` says which clone of yours it is for";
        return Err(CliError::usage_hint(
            "--apply is for a directory of yours, and this one is fetched",
            hint,
        ));
    }
    Ok(bytes.into())
}

fn read_spec(path: &Path, has_prompt: bool) -> Result<Map<String, Value>, CliError> {
    let text = read_text("the job spec", path, SPEC_BYTES_MAX)?;
    let at = |detail: String| CliError::usage(format!("{}: {detail}", path.display()));
    let value: Value =
        serde_json::from_str(&text).map_err(|e| at(format!("the job spec is not valid: {e}")))?;
    let Value::Object(spec) = value else {
        return Err(at("the job spec is not a JSON object".into()));
    };
    // Checked before flags are put over it, so that line and column are those of the file.
    if spec.contains_key("prompt") || !has_prompt {
        JobSpec::parse(text.as_bytes()).map_err(|e| at(e.to_string()))?;
    } else {
        let mut whole = spec.clone();
        put(&mut whole, "prompt", Some("x"));
        JobSpec::parse(Value::Object(whole).to_string().as_bytes()).map_err(|e| at(e.to_string()))?;
    }
    Ok(spec)
}

pub(super) fn spec_error(error: SpecError) -> CliError {
    CliError::usage_hint(error.to_string(), "`hotcell schema` prints what a job spec may hold")
}

fn read_text(what: &str, path: &Path, bytes_max: usize) -> Result<String, CliError> {
    let fail =
        |e: std::io::Error| CliError::usage(format!("cannot read {what} from {}: {e}", path.display()));
    let input: Box<dyn Read> = match path.to_str() {
        Some("-") => Box::new(std::io::stdin()),
        _ => Box::new(std::fs::File::open(path).map_err(fail)?),
    };
    let mut bytes = Vec::new();
    input.take(bytes_max as u64 + 1).read_to_end(&mut bytes).map_err(fail)?;
    if bytes.len() > bytes_max {
        return Err(CliError::usage(format!("{what} has more than {bytes_max} bytes")));
    }
    String::from_utf8(bytes).map_err(|_| CliError::usage(format!("{what} is not UTF-8")))
}

/// Where the job works: `given` is a directory or an address, `name` what of it is fetched.
pub(super) fn workspace(
    given: Option<&Path>,
    name: Option<&String>,
    mode: Option<Mode>,
    spec: &mut Map<String, Value>,
) -> Result<(), CliError> {
    let source = given.and_then(|given| source(given, name.is_some()));
    if let Some(url) = source {
        let mut git = Map::new();
        put(&mut git, "url", Some(url));
        put(&mut git, "ref", name);
        object(spec, "workspace").remove("path");
        put(object(spec, "workspace"), "git", Some(git));
    } else if let Some(dir) = given {
        object(spec, "workspace").remove("git");
        let path = dir.canonicalize().map_err(|e| {
            CliError::usage_hint(
                format!("the workspace {} cannot be used: {e}", dir.display()),
                "-w takes a directory that exists, or the address of a git repository",
            )
        })?;
        if !path.is_dir() {
            return Err(CliError::usage(format!("the workspace {} is not a directory", dir.display())));
        }
        let text = path.to_str().ok_or_else(|| CliError::usage("the workspace's path is not UTF-8"))?;
        put(object(spec, "workspace"), "path", Some(text));
    }
    let mode = mode.and_then(|mode| mode.to_possible_value());
    match mode {
        Some(mode) if spec.contains_key("workspace") => {
            put(object(spec, "workspace"), "mode", Some(mode.get_name()));
        }
        Some(mode) if mode.get_name() != "none" => {
            return Err(CliError::usage("--mode says how a workspace is mounted, and none is given (-w)"));
        }
        Some(_) | None => {}
    }
    Ok(())
}

/// The address of a repository to fetch, where `given` is one: with a name of what to fetch, a directory is one too.
fn source(given: &Path, named: bool) -> Option<String> {
    let text = given.to_str()?;
    match given.canonicalize() {
        Ok(path) if path.is_dir() => path.to_str().filter(|_| named).map(str::to_owned),
        _ => (named || looks_like_url(text)).then(|| text.to_owned()),
    }
}

fn agent(flags: &AgentFlags, context: &Context, spec: &mut Map<String, Value>) -> Result<(), CliError> {
    put(spec, "model", flags.model.as_ref());
    put(spec, "fallback_model", flags.fallback_model.as_ref());
    put(spec, "effort", flags.effort.as_ref());
    put(spec, "image", flags.image.as_ref());
    put(spec, "agent", flags.agent.as_ref());
    put(spec, "runtime", flags.runtime.as_ref());
    put(spec, "provider", flags.provider.as_ref());
    put(spec, "permission_mode", flags.permission_mode.as_ref());
    put(spec, "system_prompt", flags.system_prompt.as_ref());
    put(spec, "append_system_prompt", flags.append_system_prompt.as_ref());
    for (key, lists) in [
        ("tools", &flags.tools),
        ("allowed_tools", &flags.allowed_tools),
        ("disallowed_tools", &flags.disallowed_tools),
    ] {
        put(spec, key, Some(args::tools(lists)).filter(|_| !lists.is_empty()));
    }
    environment(&flags.env, context, spec)
}

/// Variables, each `NAME=VALUE` or the name of one of this command's own.
pub(super) fn environment(
    given: &[String],
    context: &Context,
    spec: &mut Map<String, Value>,
) -> Result<(), CliError> {
    for entry in given {
        let (name, value) = match entry.split_once('=') {
            Some((name, value)) => (name, value),
            None => {
                let own = context.machine.vars.get(entry);
                let own = own.ok_or_else(|| CliError::usage(format!("--env {entry}: it is not set here")))?;
                (entry.as_str(), own.as_str())
            }
        };
        put(object(spec, "env"), name, Some(value));
    }
    Ok(())
}

fn steps(flags: &StepFlags, spec: &mut Map<String, Value>) {
    for (key, lines) in [("setup", &flags.setup), ("verify", &flags.verify)] {
        put(object(spec, key), "commands", Some(lines).filter(|lines| !lines.is_empty()));
        if object(spec, key).is_empty() {
            spec.remove(key);
        }
    }
    if let Some(tries) = flags.repair {
        put(object(spec, "verify"), "repair_attempts", Some(tries));
    }
}

pub(super) fn limits(flags: &LimitFlags, spec: &mut Map<String, Value>) {
    let mut given = Map::new();
    put(&mut given, "cost_usd", flags.cost);
    put(&mut given, "max_turns", flags.max_turns);
    put(&mut given, "wall_s", flags.time);
    put(&mut given, "silence_s", flags.silence);
    put(&mut given, "cpus", flags.cpus);
    put(&mut given, "memory_mib", flags.memory);
    put(&mut given, "pids", flags.pids);
    put(&mut given, "disk_mib", flags.disk);
    if !given.is_empty() {
        object(spec, "limits").extend(given);
    }
}

pub(super) fn put<T: serde::Serialize>(spec: &mut Map<String, Value>, key: &str, value: Option<T>) {
    if let Some(value) = value {
        spec.insert(key.to_owned(), json!(value));
    }
}

/// The object under `key`, made where it is not there.
pub(super) fn object<'a>(spec: &'a mut Map<String, Value>, key: &str) -> &'a mut Map<String, Value> {
    let entry = spec.entry(key).or_insert_with(|| json!({}));
    if !entry.is_object() {
        *entry = json!({});
    }
    match entry {
        Value::Object(map) => map,
        // Made an object just above.
        _ => unreachable!("not an object"),
    }
}

#[cfg(test)]
mod tests;
