//! Microsoft Foundry: the vendor's API below `/anthropic`, models under the names of deployments.

use hyper::Method;

use super::{Route, Target, anthropic};

/// What a refused request is told.
pub(super) const SERVED: &str =
    "only POST /anthropic/v1/messages and /anthropic/v1/messages/count_tokens are served";

/// The routes, compared as they are.
pub(super) fn route(method: &Method, path: &str, query: Option<&str>) -> Option<Route> {
    anthropic::route(method, path.strip_prefix("/anthropic")?, query)
}

/// The path and query upstream, below the base URL (which ends in `/anthropic`).
pub(super) fn path(target: Target, beta: bool) -> String {
    anthropic::path(target, beta)
}
