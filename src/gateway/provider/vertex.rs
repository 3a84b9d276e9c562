//! Google Vertex: the model in the path, `…/models/{id}:rawPredict` and `:streamRawPredict`, below a project and a
//! location. A cell knows neither: it uses the names of [`crate::agent::provider`], and the real ones are put in here.

use hyper::Method;

use super::{Route, Target, segment};
use crate::agent::provider::{VERTEX_LOCATION, VERTEX_PROJECT};

/// What a refused request is told.
pub(super) const SERVED: &str = "only POST of models/ID:rawPredict, models/ID:streamRawPredict and models/count-tokens:rawPredict is served";
/// The version of the API that a body names.
pub(super) const VERSION: &str = "vertex-2023-10-16";
/// The model that counts tokens of another one, which the body names.
const COUNT_TOKENS: &str = "count-tokens";

/// The routes.
pub(super) fn route(method: &Method, path: &str, query: Option<&str>) -> Option<Route> {
    let models = models(VERTEX_PROJECT, VERTEX_LOCATION);
    let (id, action) = path.strip_prefix("/v1")?.strip_prefix(&models)?.rsplit_once(':')?;
    let stream = match action {
        "rawPredict" => false,
        "streamRawPredict" => true,
        _ => return None,
    };
    let id = segment::decoded(id)?;
    let (target, model) = match (id.as_str(), stream) {
        (COUNT_TOKENS, false) => (Target::CountTokens, None),
        (COUNT_TOKENS, true) => return None,
        _ => (Target::Messages, Some(id)),
    };
    let call = Route { target, beta: false, model, stream: Some(stream) };
    (method == Method::POST && query.is_none()).then_some(call)
}

/// The path upstream, below the base URL (which ends in `/v1`).
pub(super) fn path(target: Target, project: &str, region: &str, id: &str, stream: bool) -> String {
    let models = models(project, region);
    match target {
        Target::CountTokens => format!("{models}{COUNT_TOKENS}:rawPredict"),
        Target::Messages => {
            let action = if stream { "streamRawPredict" } else { "rawPredict" };
            format!("{models}{}:{action}", segment::encoded(id))
        }
    }
}

/// The base URL of a region.
pub(super) fn base_url(region: &str) -> String {
    match region {
        "global" => "https://aiplatform.googleapis.com/v1".to_owned(),
        "us" | "eu" => format!("https://aiplatform.{region}.rep.googleapis.com/v1"),
        _ => format!("https://{region}-aiplatform.googleapis.com/v1"),
    }
}

/// The plain name of an id: `claude-haiku-4-5@20251001` → `claude-haiku-4-5-20251001`.
pub(super) fn plain(id: &str) -> String {
    match id.split_once('@') {
        Some((name, "default" | "latest")) => name.to_owned(),
        Some((name, date)) => format!("{name}-{date}"),
        None => id.to_owned(),
    }
}

/// The id of a plain name: a date stands behind an `@`.
pub(super) fn id(plain: &str) -> String {
    match plain.rsplit_once('-') {
        Some((name, date)) if date.len() == 8 && date.bytes().all(|byte| byte.is_ascii_digit()) => {
            format!("{name}@{date}")
        }
        _ => plain.to_owned(),
    }
}

fn models(project: &str, region: &str) -> String {
    format!("/projects/{project}/locations/{region}/publishers/anthropic/models/")
}
