//! `hotcell policy`: the policies that a daemon with this configuration has. Reads files only; a job's own
//! copy of its policy is in its row.

mod check;
mod explain;

use clap::{Args, Subcommand};
use serde_json::json;

use super::Context;
use super::fail::{CliError, ExitCode};
use super::render::{Style, Text, tables};
use super::serve::{Concerns, ConfigFlags};
use crate::config::{BrokenPolicy, Config, PolicyListing, PolicyOrigin, PolicySource, egress_sets};
use crate::policy::Policy;

/// Show, check and explain policies
#[derive(Debug, Args)]
#[command(after_help = "\
The daemon looks at the files again at each submit. Jobs that were accepted keep the policy that
they were accepted under; a file that cannot be used any more changes nothing until it can.")]
pub(super) struct PolicyArgs {
    #[command(subcommand)]
    command: PolicyCommand,
}

#[derive(Debug, Subcommand)]
enum PolicyCommand {
    /// List them, and the files that cannot be used
    Ls {
        /// Print a JSON array
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFlags<PolicyDirs>,
    },
    /// Print one
    Show {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
        /// Print it as JSON
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFlags<PolicyDirs>,
    },
    /// List the sets of hosts that `sets` under [egress] may name
    Sets {
        /// Print a JSON array
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        config: ConfigFlags<OnlyFile>,
    },
    /// Check a policy file: errors name file, line and key
    Check(check::CheckArgs),
    /// Say which rule decides a question, and why; exit code 0 for yes, 1 for no
    Explain(Box<explain::ExplainArgs>),
}

/// Which settings say what policies there are.
#[derive(Debug, Clone)]
struct PolicyDirs;

impl Concerns for PolicyDirs {
    fn has(key: &str) -> bool {
        key == "policy_dirs"
    }
}

/// No setting but the configuration itself, whose sets of hosts a policy may name.
#[derive(Debug, Clone)]
struct OnlyFile;

impl Concerns for OnlyFile {
    fn has(_: &str) -> bool {
        false
    }
}

impl PolicyArgs {
    pub(super) fn json(&self) -> bool {
        match &self.command {
            PolicyCommand::Ls { json, .. }
            | PolicyCommand::Show { json, .. }
            | PolicyCommand::Sets { json, .. } => *json,
            PolicyCommand::Check(args) => args.json,
            PolicyCommand::Explain(args) => args.json,
        }
    }
}

pub(super) fn policy(args: &PolicyArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let (json, config) = match &args.command {
        PolicyCommand::Check(args) => return check::check(args, context),
        PolicyCommand::Explain(args) => return explain::explain(args, context),
        PolicyCommand::Sets { json, config } => return sets(*json, config, context),
        PolicyCommand::Ls { json, config } | PolicyCommand::Show { json, config, .. } => (*json, config),
    };
    let config = Config::load(&config.flags(), &context.machine)?;
    let PolicyCommand::Show { name, .. } = &args.command else {
        return list(json, PolicyListing::read(&config.policy_dirs, &config.egress_sets), context);
    };
    let source = &find(PolicyListing::read(&config.policy_dirs, &config.egress_sets), name)?;
    if json {
        context.out.json(&as_json(name, source))?;
    } else {
        let opened = opened(&source.policy).into_iter();
        let text = Text::new(context.out.paint).plain(&source.text);
        context.out.print(&opened.fold(text, |text, line| text.add(Style::Dim, &line).end()))?;
    }
    Ok(ExitCode::Succeeded)
}

/// Those that can be used, and the files that cannot: a running daemon keeps what it last read of them.
fn list(json: bool, listing: PolicyListing, context: &mut Context) -> Result<ExitCode, CliError> {
    let code = if listing.broken.is_empty() { ExitCode::Succeeded } else { ExitCode::Usage };
    if json {
        let good = listing.all.iter().map(|(name, source)| as_json(name, source));
        let bad = listing.broken.iter().map(|b| json!({ "file": b.path, "error": b.error.to_string() }));
        context.out.json(&good.chain(bad).collect::<Vec<_>>())?;
        return Ok(code);
    }
    context.out.print(&tables::policies(context.out.paint, listing.all.iter()))?;
    for broken in &listing.broken {
        let words = format!("not usable, so that the daemon keeps what it last read there: {}", broken.error);
        context.out.notice(&words)?;
    }
    Ok(code)
}

/// What the sets of a policy are at this moment, as comments below its text.
fn opened(policy: &Policy) -> Vec<String> {
    let tables = [Some(&policy.egress), policy.setup.egress.as_ref(), policy.verify.egress.as_ref()];
    let mut names: Vec<&String> = tables.into_iter().flatten().flat_map(|egress| &egress.sets).collect();
    names.sort();
    names.dedup();
    let hosts = names.into_iter().filter_map(|name| Some((name, policy.known_sets.get(name)?)));
    hosts.map(|(name, hosts)| format!("# set {name}: {}", hosts.join(", "))).collect()
}

fn sets(json: bool, config: &ConfigFlags<OnlyFile>, context: &mut Context) -> Result<ExitCode, CliError> {
    let sets = egress_sets(&config.flags(), &context.machine)?;
    if json {
        let all = sets.iter().map(|(name, set)| {
            json!({ "name": name, "description": set.description, "hosts": set.hosts, "env": set.env })
        });
        context.out.json(&all.collect::<Vec<_>>())?;
        return Ok(ExitCode::Succeeded);
    }
    let mut out = Text::new(context.out.paint);
    for (name, set) in sets.iter() {
        out = out.add(Style::Good, name).plain(&format!(": {}", set.description)).end();
        for rule in &set.hosts {
            let list =
                |what: &Option<Vec<String>>| what.as_ref().map(|all| all.join(" ")).unwrap_or_default();
            let ports = rule.ports.iter().map(u16::to_string).collect::<Vec<_>>().join(" ");
            let words =
                [rule.name.clone(), ports, list(&rule.methods), list(&rule.paths), list(&rule.queries)];
            let words: Vec<&str> = words.iter().map(String::as_str).filter(|word| !word.is_empty()).collect();
            out = out.plain(&format!("  {}", words.join("  "))).end();
        }
    }
    context.out.print(&out)?;
    Ok(ExitCode::Succeeded)
}

/// The policy of that name; where its file cannot be used, what is wrong with it.
fn find(mut listing: PolicyListing, name: &str) -> Result<PolicySource, CliError> {
    let named = |broken: &BrokenPolicy| broken.path.file_stem().is_some_and(|stem| stem == name);
    if let Some(at) = listing.broken.iter().position(named) {
        return Err(listing.broken.swap_remove(at).error.into());
    }
    let names = listing.all.keys().cloned().collect::<Vec<_>>().join(", ");
    listing.all.remove(name).ok_or_else(|| {
        CliError::usage_hint(format!("there is no policy {name}"), format!("there are: {names}"))
    })
}

fn as_json(name: &str, source: &PolicySource) -> serde_json::Value {
    let file = match &source.origin {
        PolicyOrigin::BuiltIn => None,
        PolicyOrigin::File(path) => Some(path),
    };
    json!({ "name": name, "hash": source.policy.hash, "file": file, "policy": source.policy })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::super::{Cli, fake, run_args};
    use super::*;

    #[test]
    fn help_names_the_settings_that_a_command_reads_and_no_others() {
        let mut command = Cli::command();
        let policy = command.find_subcommand_mut("policy").expect("policy");
        for (name, flags) in [
            ("ls", &["config", "policy-dirs"][..]),
            ("show", &["config", "policy-dirs"]),
            ("sets", &["config"]),
            ("check", &["config"]),
            (
                "explain",
                &[
                    "config",
                    "policy-dirs",
                    "defaults-policy",
                    "defaults-model",
                    "defaults-image",
                    "defaults-provider",
                ],
            ),
        ] {
            let sub = policy.find_subcommand_mut(name).expect(name);
            let help = sub.render_long_help().to_string();
            let settings = help.split_once("Settings:").map_or("", |(_, rest)| rest);
            let named: Vec<&str> = settings
                .lines()
                .filter_map(|line| line.trim().strip_prefix("--")?.split_whitespace().next())
                .collect();
            assert_eq!(named, flags, "{name}: {help}");
        }
    }

    #[test]
    fn a_finding_has_fields_of_its_own_and_an_exit_code() {
        let dir = tempfile::tempdir().expect("dir");
        let check = |text: &str, flags: &[&str]| {
            let file = dir.path().join("mine.toml");
            std::fs::write(&file, text).expect("write");
            let file = file.to_str().expect("UTF-8").to_owned();
            let args = ["hotcell", "policy", "check", "--narrow", &file];
            let args: Vec<_> = args.iter().chain(flags).map(Into::into).collect();
            let (mut context, stdout, stderr) = fake::context();
            let code = run_args(&args, &mut context);
            (code, stdout.text().replace(&file, "F"), stderr.text().replace(&file, "F"))
        };
        let broken = "[tools]\nallow = ['A*b']";
        let (code, out, err) = check(broken, &[]);
        assert_eq!((code, out.as_str()), (ExitCode::Usage, ""));
        assert!(err.contains("F:2: tools.allow[0]: \"A*b\"") && err.matches('F').count() == 1, "{err}");
        let (code, out, err) = check(broken, &["--json"]);
        let found: serde_json::Value = serde_json::from_str(&out).expect("JSON");
        assert_eq!((code, err.as_str()), (ExitCode::Usage, ""));
        assert_eq!((&found[0]["file"], &found[0]["key"]), (&json!("F"), &json!("tools.allow[0]")));
        assert_eq!((&found[0]["line"], &found[0]["column"]), (&json!(2), &json!(10)));
        assert_eq!(found[0]["severity"], "error");
        let odd = "[tools]\ndeny = ['bash']";
        let (code, out, _) = check(odd, &[]);
        assert_eq!(code, ExitCode::Succeeded);
        assert!(
            out.starts_with("warning: F:2: tools.deny[0]: bash can never match") && out.contains("valid: F")
        );
        let (code, out, _) = check(odd, &["--json"]);
        let found: serde_json::Value = serde_json::from_str(&out).expect("JSON");
        assert_eq!((code, &found[0]["severity"]), (ExitCode::Succeeded, &json!("warning")));
        assert_eq!(check("", &["--json"]), (ExitCode::Succeeded, "[]\n".into(), String::new()));
    }
}
