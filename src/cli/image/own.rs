//! `hotcell image plan` and `hotcell image rm`, and the part of `hotcell image ls` that is about images which were built
//! from a repository's own Dockerfile. Planning reads and builds nothing.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::Path;

use serde_json::json;

use super::super::Context;
use super::super::fail::{CliError, ExitCode};
use super::super::render::Text;
use crate::cell::build;
use crate::cell_image::{Found, Listed, Standing};
use crate::config::Config;
use crate::dockerfile;
use crate::engine::docker::Docker;
use crate::engine::{Engine, EngineError, find_address};

/// Lists what a build of `dir` would run.
pub(super) fn plan(dir: &Path, json: bool, context: &mut Context) -> Result<ExitCode, CliError> {
    let opened = std::fs::File::open(dir);
    let opened =
        opened.map_err(|e| CliError::Local(anyhow::anyhow!("cannot open {}: {e}", dir.display())))?;
    let planned = dockerfile::find_in(opened.as_fd(), &|_| false)
        .and_then(|recipe| recipe.parsed().map(|parsed| (recipe, parsed)));
    let (recipe, parsed) = planned.map_err(|e| CliError::Local(e.into()))?;
    let list = dockerfile::list(&recipe, &parsed);
    if json {
        let bases: Vec<&str> = parsed.bases().into_keys().collect();
        let setup: Vec<String> = recipe.setup.iter().map(|command| command.words()).collect();
        context.out.json(&json!({
            "source": recipe.source, "dockerfile": recipe.dockerfile, "sha256": recipe.text_hash(), "context": recipe.context,
            "from": bases, "run": parsed.runs().map(|line| &line.rest).collect::<Vec<_>>(), "setup": setup, "list": list,
        }))?;
    } else {
        let text = list.iter().fold(Text::new(context.out.paint), |text, line| text.plain(line).end());
        context.out.print(&text)?;
    }
    Ok(ExitCode::Succeeded)
}

/// Images that were built for jobs, as far as the engine still has them.
pub(super) async fn listed(config: &Config) -> Result<Vec<Listed>, CliError> {
    let engine = engine(config).await?;
    let mut all = Vec::new();
    for kept in build::kept(&config.state_dir) {
        let info = engine.image(&kept.name).await.map_err(|e| CliError::Away(e.into()))?;
        let built = info.map(|info| Found {
            id: info.id,
            size_bytes: Some(info.size_bytes),
            built_at_ms: kept.built_at_ms,
            versions: BTreeMap::from([
                ("from".to_owned(), kept.source.clone()),
                ("uid".to_owned(), kept.uid.to_string()),
            ]),
        });
        let state = if built.is_some() { Standing::Built } else { Standing::Gone };
        all.push(Listed { name: "build".to_owned(), image: kept.name, state, built });
    }
    Ok(all)
}

/// Removes one of them.
pub(super) async fn remove(name: &str, config: &Config, context: &mut Context) -> Result<ExitCode, CliError> {
    if !build::kept(&config.state_dir).iter().any(|kept| kept.name == name) {
        let words = format!("{name:?} is no image that was built from a repository's own Dockerfile");
        return Err(CliError::usage_hint(words, "`hotcell image ls` lists them".to_owned()));
    }
    match engine(config).await?.remove_image(name).await {
        Ok(()) => {}
        Err(error @ EngineError::Conflict { .. }) => return Err(CliError::Local(error.into())),
        Err(error) => return Err(CliError::Away(error.into())),
    }
    build::forget(&config.state_dir, name).map_err(|e| CliError::Local(e.into()))?;
    context.out.notice(&format!("{name} is gone"))?;
    Ok(ExitCode::Succeeded)
}

async fn engine(config: &Config) -> Result<Docker, CliError> {
    let address = find_address(config.engine.as_deref()).map_err(|e| CliError::Away(e.into()))?;
    Docker::connect(&address).await.map_err(|e| CliError::Away(e.into()))
}
