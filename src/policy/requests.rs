//! What a request for the model may hold beside text: tools that the provider runs, remote sources, beta
//! features. Pure: the keys of a policy's `[requests]`, what the CLI sends by itself, and the one function that
//! answers whether a part of a request is allowed. It must never allow what no key and no default names.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::decide::{Denial, Permit, permit};
use super::matches;
use super::narrow::Layer;

/// Values of `anthropic-beta` that need no policy: none of them stores, fetches or runs anything, nor costs
/// anything beside the tokens. Seen in requests of the CLI 2.1.197 (print mode, with and without subagents, JSON
/// schema, `[1m]` models, WebSearch), or, below the line, named by it for cases that are as harmless.
pub const BETAS: [&str; 15] = [
    "claude-code-20250219",
    "context-1m-2025-08-07",
    "context-management-2025-06-27",
    "effort-2025-11-24",
    "interleaved-thinking-2025-05-14",
    "mid-conversation-system-2026-04-07",
    "prompt-caching-scope-2026-01-05",
    "thinking-token-count-2026-05-13",
    // Seen with Vertex and Foundry, with and without that tool. Alone it lets nobody search: see `server_tools`.
    "web-search-2025-03-05",
    // Named, not seen.
    "advanced-tool-use-2025-11-20",
    "extended-cache-ttl-2025-04-11",
    "redact-thinking-2026-02-12",
    "structured-outputs-2025-12-15",
    "token-counting-2024-11-01",
    "tool-search-tool-2025-10-19",
];

/// Most searches that a policy may allow in one request.
const WEB_SEARCH_USES_CEILING: u32 = 20;

/// What requests may hold. Empty: what the CLI itself sends.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Requests {
    /// Values of the `anthropic-beta` header allowed beside those that the CLI sends, or beginnings with a final
    /// `*`. What the other keys here allow brings its own.
    #[serde(default)]
    pub betas: Vec<String>,
    /// Tools that the provider runs. `web_search` keeps the CLI's WebSearch tool, which leaves the tool list
    /// otherwise. What is searched for leaves the cell.
    #[serde(default)]
    pub server_tools: Vec<ServerTool>,
    /// Most searches in one request; their price is set aside before it is sent. A request that asks for more, or
    /// names no number, is lowered to this.
    #[serde(default = "three")]
    pub web_search_uses_max: u32,
    /// URLs of MCP servers that the provider may connect to, or beginnings with a final `*`. What they return is
    /// billed as input that nothing bounds beforehand.
    #[serde(default)]
    pub mcp_servers: Vec<String>,
    /// URLs of images and documents that the provider may fetch, or beginnings with a final `*`.
    #[serde(default)]
    pub url_sources: Vec<String>,
    /// Ids of files stored at the provider that may be named, or beginnings with a final `*`.
    #[serde(default)]
    pub file_ids: Vec<String>,
}

impl Default for Requests {
    fn default() -> Self {
        Self {
            betas: Vec::new(),
            server_tools: Vec::new(),
            web_search_uses_max: three(),
            mcp_servers: Vec::new(),
            url_sources: Vec::new(),
            file_ids: Vec::new(),
        }
    }
}

/// A tool that the provider runs and whose price is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ServerTool {
    /// Web search, charged per use.
    WebSearch,
}

impl ServerTool {
    /// The versions that are understood; another one may do more, or cost more.
    pub const WEB_SEARCH_TYPES: [&str; 1] = ["web_search_20250305"];

    /// What a request means by a `type`.
    fn of(kind: &str) -> Option<Self> {
        Self::WEB_SEARCH_TYPES.contains(&kind).then_some(Self::WebSearch)
    }

    fn as_str(self) -> &'static str {
        match self {
            Self::WebSearch => "web_search",
        }
    }
}

/// A part of a request that needs the policy's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part<'a> {
    /// A value of the `anthropic-beta` header.
    Beta(&'a str),
    /// The `type` of a tool that the provider runs.
    ServerTool(&'a str),
    /// The URL of an MCP server that the provider connects to.
    McpServer(&'a str),
    /// The URL of an image or a document that the provider fetches.
    UrlSource(&'a str),
    /// The id of a file stored at the provider.
    FileId(&'a str),
}

fn three() -> u32 {
    3
}

impl Requests {
    /// Key and problem of the first thing that cannot be.
    pub(super) fn check(&self) -> Result<(), (String, String)> {
        for (key, list) in [
            ("requests.betas", &self.betas),
            ("requests.mcp_servers", &self.mcp_servers),
            ("requests.url_sources", &self.url_sources),
            ("requests.file_ids", &self.file_ids),
        ] {
            super::file::check_bounds(key, list)?;
            if let Some(bad) = list.iter().find(|p| !super::is_pattern(p)) {
                return Err((key.into(), format!("{bad:?}: a '*' may stand only at the end")));
            }
        }
        for (key, list) in
            [("requests.mcp_servers", &self.mcp_servers), ("requests.url_sources", &self.url_sources)]
        {
            for pattern in list.iter().filter(|p| *p != "*") {
                let rest = pattern.strip_prefix("https://").unwrap_or_default();
                // A '*' within the host would also mean hosts that only begin alike.
                if rest.split_once('/').is_none_or(|(host, _)| host.is_empty() || host.contains(['*', '@'])) {
                    let problem = "expected https://HOST/…, or \"*\" for every URL";
                    return Err((key.into(), format!("{pattern:?}: {problem}")));
                }
            }
        }
        if !(1..=WEB_SEARCH_USES_CEILING).contains(&self.web_search_uses_max) {
            let problem = format!("must be between 1 and {WEB_SEARCH_USES_CEILING}");
            return Err(("requests.web_search_uses_max".into(), problem));
        }
        Ok(())
    }

    fn beta(&self, value: &str) -> Option<String> {
        if BETAS.contains(&value) {
            return Some(format!("the CLI's own beta {value}"));
        }
        let implied = [
            (!self.server_tools.is_empty(), "web-search-", "requests.server_tools"),
            (!self.mcp_servers.is_empty(), "mcp-client-", "requests.mcp_servers"),
            (!self.file_ids.is_empty(), "files-api-", "requests.file_ids"),
        ];
        let named = self.betas.iter().find(|p| matches(p, value)).map(|p| format!("requests.betas {p}"));
        named.or_else(|| {
            let by = implied.iter().find(|(on, prefix, _)| *on && value.starts_with(prefix));
            by.map(|(_, _, key)| (*key).to_owned())
        })
    }
}

/// Answers for one layer.
pub(super) fn decide(layer: &Layer, part: Part<'_>) -> Result<Permit, Denial> {
    let requests = &layer.requests;
    let listed = |key: &str, patterns: &[String], value: &str| {
        patterns.iter().find(|p| matches(p, value)).map(|p| format!("{key} {p}"))
    };
    let (key, what, value, rule) = match part {
        Part::Beta(value) => ("requests.betas", "the beta feature", value, requests.beta(value)),
        Part::ServerTool(kind) => {
            let tool = ServerTool::of(kind).filter(|tool| requests.server_tools.contains(tool));
            let rule = tool.map(|tool| format!("requests.server_tools {}", tool.as_str()));
            ("requests.server_tools", "a tool that the provider runs,", kind, rule)
        }
        Part::McpServer(url) => {
            let rule = listed("requests.mcp_servers", &requests.mcp_servers, url);
            ("requests.mcp_servers", "an MCP server of the provider,", url, rule)
        }
        Part::UrlSource(url) => {
            let rule = listed("requests.url_sources", &requests.url_sources, url);
            ("requests.url_sources", "a source that the provider fetches,", url, rule)
        }
        Part::FileId(id) => {
            let rule = listed("requests.file_ids", &requests.file_ids, id);
            ("requests.file_ids", "a file stored at the provider,", id, rule)
        }
    };
    rule.map(permit).ok_or_else(|| {
        let shown: String = value.chars().take(80).collect();
        let reason = format!("{what} {shown:?} is not allowed (policy {}, rule {key})", layer.name);
        Denial { rule: key.to_owned(), reason }
    })
}

/// Most searches in one request: what every layer allows. `None`: WebSearch is not allowed.
pub fn web_search_uses_max(layers: &[Layer]) -> Option<u32> {
    let all = layers.iter().map(|layer| {
        let allowed = layer.requests.server_tools.contains(&ServerTool::WebSearch);
        allowed.then_some(layer.requests.web_search_uses_max)
    });
    all.reduce(|a, b| Some(a?.min(b?))).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::job::JobSpec;
    use crate::policy::{self, Ask, Defaults, Plan, Policy, narrow};

    fn parse(section: &str) -> Result<Policy, crate::policy::PolicyError> {
        let text = include_str!("../../policies/default.toml");
        Policy::parse("test", &format!("{text}\n[requests]\n{section}\n"))
    }

    fn plan(sections: &[&str]) -> Plan {
        let spec = JobSpec::parse(br#"{"prompt":"x"}"#).unwrap();
        let defaults =
            Defaults { model: "claude-sonnet-4-6".into(), image: "x".into(), provider: "anthropic".into() };
        let plans: Vec<Plan> =
            sections.iter().map(|s| narrow(&spec, &parse(s).unwrap(), None, &defaults).unwrap()).collect();
        let mut plan = plans[0].clone();
        plan.layers = plans.into_iter().flat_map(|plan| plan.layers).collect();
        plan
    }

    fn allowed(plan: &Plan, part: Part<'_>) -> bool {
        policy::decide(plan, Ask::Request { part }).is_ok()
    }

    const PARTS: [Part<'static>; 5] = [
        Part::Beta("fast-mode-2026-02-01"),
        Part::ServerTool("web_search_20250305"),
        Part::McpServer("https://mcp.example.com/sse"),
        Part::UrlSource("https://img.example.com/a.png"),
        Part::FileId("file_1"),
    ];

    #[test]
    fn nothing_but_what_the_cli_sends_is_allowed_unless_named() {
        let plan = plan(&[""]);
        for beta in BETAS {
            assert!(allowed(&plan, Part::Beta(beta)), "{beta}");
        }
        for part in PARTS.into_iter().chain([
            Part::Beta(""),
            Part::Beta("CLAUDE-CODE-20250219"),
            Part::Beta("files-api-2025-04-14"),
            Part::Beta("mcp-client-2025-11-20"),
        ]) {
            let denial = policy::decide(&plan, Ask::Request { part }).unwrap_err();
            assert!(denial.reason.contains("policy test, rule requests."), "{denial}");
        }
        assert_eq!(web_search_uses_max(&plan.layers), None);
    }

    #[test]
    fn every_layer_must_allow_it() {
        let open = "betas=['fast-*']\nserver_tools=['web_search']\nweb_search_uses_max=5\n\
                    mcp_servers=['https://mcp.example.com/*']\nurl_sources=['https://img.example.com/*']\nfile_ids=['file_*']";
        let both = plan(&[open, &open.replace("=5", "=2")]);
        let narrowed = plan(&[open, ""]);
        for part in PARTS {
            assert!(allowed(&both, part), "{part:?}");
            assert!(!allowed(&narrowed, part), "{part:?}");
        }
        assert_eq!(web_search_uses_max(&both.layers), Some(2));
        assert_eq!(web_search_uses_max(&narrowed.layers), None);
        for part in [
            Part::ServerTool("web_search_20260209"),
            Part::ServerTool("web_fetch_20250910"),
            Part::ServerTool("code_execution_20250825"),
            Part::McpServer("https://mcp.example.com.evil/"),
            Part::UrlSource("http://img.example.com/a.png"),
        ] {
            assert!(!allowed(&both, part), "{part:?}");
        }
        assert!(allowed(&both, Part::Beta("mcp-client-2025-11-20")), "what is named brings its beta");
    }

    #[test]
    fn keys_that_cannot_be_are_named() {
        for (section, key) in [
            ("betas=['a*b']", "requests.betas"),
            ("mcp_servers=['https://a*']", "requests.mcp_servers"),
            ("mcp_servers=['http://a/']", "requests.mcp_servers"),
            ("url_sources=['https://u@a/*']", "requests.url_sources"),
            ("web_search_uses_max=0", "requests.web_search_uses_max"),
            ("web_search_uses_max=21", "requests.web_search_uses_max"),
            ("server_tools=['code_execution']", "code_execution"),
            ("speed=true", "speed"),
        ] {
            let error = parse(section).unwrap_err().to_string();
            assert!(error.contains(key), "{section}: {error}");
        }
    }
}
