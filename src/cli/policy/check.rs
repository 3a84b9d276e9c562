//! `hotcell policy check`: what is wrong with a policy file and what in it can have no effect, each with its place.

use std::path::PathBuf;

use clap::Args;
use serde::Serialize;

use super::super::Context;
use super::super::fail::{CliError, ExitCode};
use super::super::render::{Style, Text};
use super::super::serve::ConfigFlags;
use super::OnlyFile;
use crate::config::{egress_sets, read_policy_text};
use crate::policy::{Narrowing, Policy, PolicyError};

#[derive(Debug, Args)]
#[command(after_help = "\
Each finding is told as FILE:LINE: KEY: REASON. The exit code is 2 where the file cannot be
used, and 0 where it can, with warnings or without.")]
pub(super) struct CheckArgs {
    /// The file
    #[arg(value_name = "FILE")]
    file: PathBuf,
    /// It is a user's own file, which only narrows a policy
    #[arg(long)]
    narrow: bool,
    /// Print a JSON array of {file, line, column, key, severity, reason}, severity "error" or "warning"
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    config: ConfigFlags<OnlyFile>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Severity {
    Error,
    Warning,
}

#[derive(Debug, Serialize)]
struct Finding<'a> {
    #[serde(flatten)]
    what: &'a PolicyError,
    severity: Severity,
}

pub(super) fn check(args: &CheckArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let text = read_policy_text(&args.file)?;
    let name = args.file.file_stem().and_then(|s| s.to_str()).unwrap_or("policy").to_owned();
    let shown = args.file.display().to_string();
    let sets = &egress_sets(&args.config.flags(), &context.machine)?;
    let warnings = if args.narrow {
        Narrowing::parse_with(&name, &text, sets).map(|own| own.warnings())
    } else {
        Policy::parse_with(&name, &text, sets).map(|policy| policy.warnings())
    };
    let error = |error: PolicyError| error.in_file(&shown);
    let warnings: Result<Vec<PolicyError>, PolicyError> = match warnings {
        Ok(all) => {
            Ok(all.into_iter().map(|(key, reason)| PolicyError::at(&shown, &text, key, reason)).collect())
        }
        Err(wrong) => Err(error(wrong)),
    };
    let code = if warnings.is_ok() { ExitCode::Succeeded } else { ExitCode::Usage };
    if args.json {
        let (found, severity) = match &warnings {
            Ok(all) => (all.as_slice(), Severity::Warning),
            Err(error) => (std::slice::from_ref(error), Severity::Error),
        };
        let found: Vec<Finding<'_>> = found.iter().map(|what| Finding { what, severity }).collect();
        context.out.json(&found)?;
        return Ok(code);
    }
    let mut out = Text::new(context.out.paint);
    for warning in warnings.map_err(|error| CliError::usage(error.to_string()))? {
        out = out.add(Style::Warn, "warning").plain(&format!(": {warning}")).end();
    }
    context.out.print(&out.add(Style::Good, "valid").plain(&format!(": {shown}")).end())?;
    Ok(code)
}
