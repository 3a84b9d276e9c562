//! `hotcell schema`: the JSON Schema of the job spec.

use clap::Args;

use super::Context;
use super::fail::{CliError, ExitCode};
use crate::job::JobSpec;

/// Print the JSON Schema of the job spec
#[derive(Debug, Args)]
pub(super) struct SchemaArgs {}

pub(super) fn schema(context: &mut Context) -> Result<ExitCode, CliError> {
    let schema = schemars::schema_for!(JobSpec);
    let mut text = serde_json::to_string_pretty(&schema).map_err(|e| CliError::Local(e.into()))?;
    text.push('\n');
    context.out.bytes(text.as_bytes())?;
    Ok(ExitCode::Succeeded)
}
