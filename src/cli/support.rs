//! `hotcell support`: what the daemon knows of a job, as an archive to be given to somebody who helps. It is the
//! daemon that redacts; the file appears whole or not at all, for its owner only, and never in the place of another.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::json;

use super::fail::{CliError, ExitCode};
use super::render::Text;
use super::{Connection, Context, find_job};
use crate::api::support::{MANIFEST, Manifest};

/// Largest manifest that is read, in bytes.
const MANIFEST_BYTES_MAX: u64 = 4 << 20;

/// Pack what helps to find out what went wrong with a job, without secrets
#[derive(Debug, Args)]
#[command(after_help = "\
The archive (tar.gz) has versions, health and doctor, the job, its spec, plan, events, audit, costs, names of what it
changed, and what the daemon logged about it; for admins also the end of the daemon's log. Credentials are taken out of
all of it. Prompts, what agent and tools said, and contents of files are not in it unless asked for.
MANIFEST.json in it says what it holds. Read it before you give it away.")]
pub(super) struct SupportArgs {
    /// The job's id, or the beginning of it
    #[arg(value_name = "JOB")]
    job: String,
    /// Write it to this file, which must not be there; - is standard output [default: hotcell-support-JOB.tar.gz]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// With prompts, system prompts and what the agent said
    #[arg(long)]
    with_prompt: bool,
    /// With inputs and results of tools, output of commands and contents of changed files
    #[arg(long)]
    with_contents: bool,
    /// Print where it is and what was taken out as JSON
    #[arg(long)]
    pub(super) json: bool,
    #[command(flatten)]
    connection: Connection,
}

pub(super) async fn support(args: &SupportArgs, context: &mut Context) -> Result<ExitCode, CliError> {
    let to_stdout = args.output.as_deref() == Some(Path::new("-"));
    if to_stdout && (args.json || context.out.is_terminal()) {
        let what =
            if args.json { "--json has no place beside the archive" } else { "this is not for a terminal" };
        return Err(CliError::usage_hint(what, "name a file with -o"));
    }
    let client = args.connection.client(&context.machine)?;
    let id = find_job(&client, &args.job).await?;
    let file = args.output.clone().unwrap_or_else(|| PathBuf::from(format!("hotcell-support-{id}.tar.gz")));
    if !to_stdout && file.symlink_metadata().is_ok() {
        return Err(there(&file));
    }
    let bytes = client.support(&id, args.with_prompt, args.with_contents).await?;
    let manifest = manifest(&bytes)?;
    if to_stdout {
        context.out.bytes(&bytes)?;
        return Ok(ExitCode::Succeeded);
    }
    write(&file, &bytes)?;
    let mut redactions: BTreeMap<&str, u64> = BTreeMap::new();
    for (kind, n) in manifest.entries.iter().flat_map(|entry| &entry.redactions) {
        *redactions.entry(kind).or_default() += n;
    }
    let entries = manifest.entries.len() + 1;
    if args.json {
        context.out.json(&json!({
            "file": file, "bytes": bytes.len(), "entries": entries, "redactions": redactions,
            "left_out": manifest.left_out,
        }))?;
        return Ok(ExitCode::Succeeded);
    }
    let secrets: u64 = redactions.values().sum();
    let words = format!("{}: {entries} files, {} bytes, {secrets} redacted", file.display(), bytes.len());
    context.out.print(&Text::new(context.out.paint).plain(&words).end())?;
    context.out.notice("read it before you give it away: names of files and hosts are in it")?;
    Ok(ExitCode::Succeeded)
}

fn there(file: &Path) -> CliError {
    CliError::usage_hint(
        format!("{} is already there", file.display()),
        "name another file with -o, or remove it",
    )
}

/// What the archive says of itself; an archive that cannot be read to its end is none.
fn manifest(bytes: &[u8]) -> Result<Manifest, CliError> {
    let broken = |what: String| CliError::Protocol { what: format!("the archive cannot be read: {what}") };
    let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(bytes));
    let mut found = None;
    for entry in archive.entries().map_err(|error| broken(error.to_string()))? {
        let entry = entry.map_err(|error| broken(error.to_string()))?;
        let path = entry.path().map_err(|error| broken(error.to_string()))?.into_owned();
        if path.file_name().is_some_and(|name| name == MANIFEST) {
            let mut text = Vec::new();
            entry
                .take(MANIFEST_BYTES_MAX)
                .read_to_end(&mut text)
                .map_err(|error| broken(error.to_string()))?;
            found = Some(serde_json::from_slice(&text).map_err(|error| broken(error.to_string()))?);
        }
    }
    found.ok_or_else(|| broken("it has no manifest".to_owned()))
}

fn write(file: &Path, bytes: &[u8]) -> Result<(), CliError> {
    let cannot = |error: std::io::Error| {
        CliError::usage_hint(format!("cannot write {}: {error}", file.display()), "name another file with -o")
    };
    let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // Made by tempfile for its owner alone.
    let mut whole = tempfile::Builder::new().prefix(".hotcell-support-").tempfile_in(dir).map_err(cannot)?;
    whole.write_all(bytes).map_err(cannot)?;
    whole.as_file().sync_all().map_err(cannot)?;
    match whole.persist_noclobber(file) {
        Ok(_) => Ok(()),
        Err(error) if error.error.kind() == std::io::ErrorKind::AlreadyExists => Err(there(file)),
        Err(error) => Err(cannot(error.error)),
    }
}
