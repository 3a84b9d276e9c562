//! The vendor's API and whatever else speaks it: `POST /v1/messages` and `POST /v1/messages/count_tokens`, the model
//! in the body.

use hyper::Method;

use super::{Route, Target};

/// What a refused request is told.
pub(super) const SERVED: &str = "only POST /v1/messages and /v1/messages/count_tokens are served";

/// The routes, compared as they are: nothing is decoded, so nothing can mean something else later.
pub(super) fn route(method: &Method, path: &str, query: Option<&str>) -> Option<Route> {
    let target = match path {
        "/v1/messages" => Target::Messages,
        "/v1/messages/count_tokens" => Target::CountTokens,
        _ => return None,
    };
    let beta = match query {
        None => false,
        Some("beta=true") => true,
        Some(_) => return None,
    };
    (method == Method::POST).then_some(Route { target, beta, model: None, stream: None })
}

/// The path and query upstream, below the base URL.
pub(super) fn path(target: Target, beta: bool) -> String {
    let query = if beta { "?beta=true" } else { "" };
    match target {
        Target::Messages => format!("/v1/messages{query}"),
        Target::CountTokens => format!("/v1/messages/count_tokens{query}"),
    }
}
