//! Amazon Bedrock: the model in the path, `POST /model/{id}/invoke` and `…/invoke-with-response-stream`. The CLI's
//! probes are such calls and cost money like any other. The list of inference profiles is answered here, empty:
//! it would tell the cell about the account.

use hyper::Method;

use super::{Route, Target, segment};

/// What a refused request is told.
pub(super) const SERVED: &str = "only POST /model/ID/invoke, /model/ID/invoke-with-response-stream and GET /inference-profiles are served";
/// The version of the API that a body names.
pub(super) const VERSION: &str = "bedrock-2023-05-31";
/// The body of the list of profiles.
pub(super) const NO_PROFILES: &str = r#"{"inferenceProfileSummaries":[]}"#;
/// What may stand before the vendor's name in an id: where the model runs.
const PLACES: [&str; 8] = ["us.", "eu.", "apac.", "jp.", "au.", "ca.", "us-gov.", "global."];

/// The routes that are calls.
pub(super) fn route(method: &Method, path: &str, query: Option<&str>) -> Option<Route> {
    let (id, action) = path.strip_prefix("/model/")?.split_once('/')?;
    let stream = match action {
        "invoke" => false,
        "invoke-with-response-stream" => true,
        _ => return None,
    };
    let model = segment::decoded(id)?;
    let call = Route { target: Target::Messages, beta: false, model: Some(model), stream: Some(stream) };
    (method == Method::POST && query.is_none()).then_some(call)
}

/// The list of profiles, as the CLI asks for it at its start.
pub(super) fn is_profiles(method: &Method, path: &str, query: Option<&str>) -> bool {
    let known = matches!(query, None | Some("type=SYSTEM_DEFINED" | "type=APPLICATION"));
    method == Method::GET && path == "/inference-profiles" && known
}

/// The path upstream, below the base URL.
pub(super) fn path(id: &str, stream: bool) -> String {
    let action = if stream { "invoke-with-response-stream" } else { "invoke" };
    format!("/model/{}/{action}", segment::encoded(id))
}

/// The plain name within an id: `us.anthropic.claude-sonnet-4-5-20250929-v1:0` → `claude-sonnet-4-5-20250929`.
/// `None` where the id is not of that form: a plain name, or an ARN, which only the configuration can explain.
pub(super) fn plain(id: &str) -> Option<&str> {
    let id = PLACES.iter().find_map(|place| id.strip_prefix(place)).unwrap_or(id);
    let name = id.strip_prefix("anthropic.")?;
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    let plain = match name.rsplit_once("-v") {
        Some((plain, version)) => match version.split_once(':') {
            Some((major, minor)) if digits(major) && digits(minor) => plain,
            None if digits(version) => plain,
            _ => return None,
        },
        None => name,
    };
    plain.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-.".contains(&byte)).then_some(plain)
}
