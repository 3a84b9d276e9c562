//! `hotcell policy explain`: what a policy would say to one question. Asks the functions that decide while a job
//! runs, so that what is explained is what happens.

use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::{Value, json};

use super::super::Context;
use super::super::args;
use super::super::fail::{CliError, ExitCode};
use super::super::render::{Style, Text};
use super::super::serve::{Concerns, ConfigFlags};
use crate::config::{Config, PolicyListing, read_policy_text};
use crate::job::JobSpec;
use crate::job::spec::BUILD_IMAGE;
use crate::money::MicroUsd;
use crate::policy::egress::{Terms, decide_url};
use crate::policy::judge::{Call, Findings, Judgement, Need, Step, judge_traced};
use crate::policy::{Ask, Defaults, Narrowing, Plan, Policy, decide, narrow};
use crate::workspace::View;

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("question").required(true).args(["tool", "url", "model", "image", "cost"]))]
pub(super) struct ExplainArgs {
    /// The policy [default: the daemon's]
    #[arg(short, long, value_name = "NAME", conflicts_with = "file")]
    policy: Option<String>,
    /// A policy file that the daemon does not have yet
    #[arg(long, value_name = "FILE")]
    file: Option<PathBuf>,
    /// A policy of your own that narrows it
    #[arg(long, value_name = "FILE")]
    narrow: Option<PathBuf>,
    /// May this tool be called?
    #[arg(long, value_name = "NAME")]
    tool: Option<String>,
    /// With --tool: its input
    #[arg(long, value_name = "JSON", requires = "tool", default_value = "{}")]
    input: String,
    /// May a cell reach this URL?
    #[arg(long, value_name = "URL")]
    url: Option<String>,
    /// With --url: the method, which counts for hosts that are looked into
    #[arg(long, value_name = "NAME", requires = "url", default_value = "GET")]
    method: String,
    /// With --url: for commands of this step, not for the agent
    #[arg(long, value_name = "STEP", requires = "url")]
    step: Option<StepName>,
    /// May this model be asked?
    #[arg(long, value_name = "NAME")]
    model: Option<String>,
    /// May a job have this image? (build: that of the workspace's own Dockerfile)
    #[arg(long, value_name = "NAME")]
    image: Option<String>,
    /// May a job spend this much?
    #[arg(long, value_name = "USD", value_parser = args::usd, allow_hyphen_values = true)]
    cost: Option<f64>,
    /// Print one JSON object
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    config: ConfigFlags<PolicyDefaults>,
}

/// A step around the agent.
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum StepName {
    /// Before it.
    Setup,
    /// After it.
    Verify,
}

/// Which settings say what policies there are, and what a job gets that names nothing.
#[derive(Debug, Clone)]
struct PolicyDefaults;

impl Concerns for PolicyDefaults {
    fn has(key: &str) -> bool {
        matches!(
            key,
            "policy_dirs" | "defaults.policy" | "defaults.model" | "defaults.image" | "defaults.provider"
        )
    }
}

/// Answers one question; exit code 0 for yes and 1 for no.
pub(super) fn explain(args: &ExplainArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let config = Config::load(&args.config.flags(), &context.machine)?;
    let policy = match &args.file {
        Some(path) => parse_file(path, |name, text| Policy::parse_with(name, text, &config.egress_sets))?,
        None => {
            let name = args.policy.as_deref().unwrap_or(&config.defaults.policy);
            let found = super::find(PolicyListing::read(&config.policy_dirs, &config.egress_sets), name)?;
            found.policy
        }
    };
    let narrowing = |name: &str, text: &str| Narrowing::parse_with(name, text, &config.egress_sets);
    let own = args.narrow.as_deref().map(|path| parse_file(path, narrowing)).transpose()?;
    let answer = answer(args, &policy, own.as_ref(), &config)?;
    if args.json {
        context.out.json(&json!({
            "policy": policy.name, "allowed": answer.allowed, "rule": answer.rule, "reason": answer.reason,
            "input": answer.input, "steps": answer.steps,
        }))?;
    } else {
        let mut out = Text::new(context.out.paint);
        for step in &answer.steps {
            out = out.add(Style::Dim, &format!("{}: {}: {}", step.layer, step.rule, step.said)).end();
        }
        let (style, word) = if answer.allowed { (Style::Good, "allowed") } else { (Style::Bad, "denied") };
        out = out.add(style, word).plain(&format!(" by {}", answer.rule)).end();
        if let Some(reason) = &answer.reason {
            out = out.plain(reason).end();
        }
        if let Some(input) = &answer.input {
            out = out.plain(&format!("it would run with {input}")).end();
        }
        context.out.print(&out)?;
    }
    Ok(if answer.allowed { ExitCode::Succeeded } else { ExitCode::Failed })
}

struct Answer {
    allowed: bool,
    rule: String,
    reason: Option<String>,
    input: Option<Value>,
    steps: Vec<Step>,
}

fn answer(
    args: &ExplainArgs,
    policy: &Policy,
    own: Option<&Narrowing>,
    config: &Config,
) -> Result<Answer, CliError> {
    let defaults = Defaults {
        model: config.defaults.model.clone(),
        image: config.defaults.image.clone(),
        provider: config.gateway.default_provider.clone(),
    };
    let planned = |spec: Value| {
        let spec = JobSpec::parse(spec.to_string().as_bytes()).map_err(|e| CliError::usage(e.to_string()))?;
        Ok::<_, CliError>(narrow(&spec, policy, own, &defaults))
    };
    let plain =
        |allowed, rule: String, reason| Answer { allowed, rule, reason, input: None, steps: Vec::new() };
    if let Some(usd) = args.cost {
        return Ok(match planned(json!({ "prompt": "?", "limits": { "cost_usd": usd } }))? {
            Ok(plan) => {
                let limit = plan.limits.cost_micro_usd.max(MicroUsd::ZERO);
                plain(true, "limits.cost_usd".into(), Some(format!("a job may be given {limit} USD")))
            }
            Err(error) => plain(false, error.key.clone(), Some(error.to_string())),
        });
    }
    if let Some(image) = &args.image {
        return Ok(match planned(json!({ "prompt": "?", "image": image }))? {
            Ok(plan) if plan.image == BUILD_IMAGE => {
                let words = "what it is built on has to be among images.allow; `hotcell image plan` lists what it runs";
                plain(true, "images.build".into(), Some(words.to_owned()))
            }
            Ok(_) => plain(true, "images.allow".into(), None),
            Err(error) => plain(false, error.key.clone(), Some(error.to_string())),
        });
    }
    let plan = planned(json!({ "prompt": "?" }))?.map_err(|e| CliError::usage(e.to_string()))?;
    if let Some(name) = &args.model {
        return Ok(match decide(&plan, Ask::Model { name }) {
            Ok(permit) => plain(true, permit.rule().to_owned(), None),
            Err(denial) => plain(false, denial.rule, Some(denial.reason)),
        });
    }
    if let Some(url) = &args.url {
        let plan = match args.step {
            None => plan,
            Some(StepName::Setup) => plan.for_setup(None),
            Some(StepName::Verify) => plan.for_verify(None),
        };
        let decided = decide_url(&plan.layers, &args.method, url).map_err(CliError::usage)?;
        return Ok(match decided {
            Ok(terms) => plain(true, terms.permit.rule().to_owned(), Some(terms_in_words(&terms))),
            Err(denial) => plain(false, denial.rule, Some(denial.reason)),
        });
    }
    let tool = args.tool.as_deref().unwrap_or_default();
    let input: Value = serde_json::from_str(&args.input).ok().filter(Value::is_object).ok_or_else(|| {
        CliError::usage("--input is no JSON object such as '{\"command\":\"ls\"}'".to_owned())
    })?;
    Ok(tool_answer(&plan, tool, &input))
}

fn terms_in_words(terms: &Terms) -> String {
    let looked_into =
        if terms.inspect { "its requests are looked into" } else { "TLS passes through as it is" };
    let credential = terms.credential.as_ref().map(|name| format!(", with the credential {name}"));
    let kept = match (terms.cache, terms.immutable) {
        (true, true) => ", answers are kept for other jobs and never asked for again",
        (true, false) => ", answers are kept for other jobs",
        (false, _) => "",
    };
    format!(
        "{looked_into}{}{kept}; at most {} bytes up, {} bytes down and {} connections",
        credential.unwrap_or_default(),
        terms.bytes_up_max,
        terms.bytes_down_max,
        terms.connections_max
    )
}

/// Judges a tool call with what can be known without a cell: paths as they are written, no hook is run.
fn tool_answer(plan: &Plan, tool: &str, input: &Value) -> Answer {
    let (view, mut found) = (View::new(&[]), Findings::default());
    loop {
        let mut steps = Vec::new();
        let judgement = judge_traced(plan, Call { tool, input }, &found, &mut |step| steps.push(step));
        return match judgement {
            Judgement::Need(Need::Paths(paths)) => {
                found.paths.extend(paths.into_iter().map(|path| (path.clone(), view.follow(&path))));
                continue;
            }
            Judgement::Need(Need::Hook(hook)) => {
                let program = hook.run.first().map(|p| p.display().to_string()).unwrap_or_default();
                let reason = Some(format!("{program} decides; it is not run here"));
                Answer { allowed: false, rule: hook.name, reason, input: None, steps }
            }
            Judgement::Allow { permit, input } => {
                Answer { allowed: true, rule: permit.rule().to_owned(), reason: None, input, steps }
            }
            Judgement::Deny(denial) => {
                Answer { allowed: false, rule: denial.rule, reason: Some(denial.reason), input: None, steps }
            }
        };
    }
}

fn parse_file<T>(
    path: &Path,
    parse: impl Fn(&str, &str) -> Result<T, crate::policy::PolicyError>,
) -> Result<T, CliError> {
    let text = read_policy_text(path)?;
    let name = path.file_stem().and_then(|s| s.to_str()).unwrap_or("policy");
    parse(name, &text).map_err(|error| CliError::usage(error.in_file(path.display()).to_string()))
}
