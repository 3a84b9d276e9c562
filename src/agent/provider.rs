//! The kinds of provider that the CLI can speak to, and what it is told of each: its whole way out leads to the
//! gateway, with the cell's token in place of a credential. Nothing real may stand here: no key, no account, no
//! project.
//!
//! *Decision*: no kind comes without a token. The CLI sends it as `x-api-key` (`anthropic`, `compatible`,
//! `foundry`), as a bearer token (`bedrock`), or, where it sends no credential at all (`vertex`), in a header of
//! our own, [`TOKEN_HEADER`], which the gateway takes off.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::options::MODEL_PORT;

/// The header that carries the cell's token where the CLI sends no credential.
pub const TOKEN_HEADER: &str = "x-hotcell-token";
/// What a cell takes for its project at Google; the gateway puts the real one into the path.
pub const VERTEX_PROJECT: &str = "hotcell";
/// What a cell takes for its location at Google; the same.
pub const VERTEX_LOCATION: &str = "global";

/// How a provider is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProviderKind {
    /// The vendor's own API.
    Anthropic,
    /// Amazon Bedrock: the model in the path, answers as an event stream of its own.
    Bedrock,
    /// Google Vertex: the model in the path.
    Vertex,
    /// Microsoft Foundry: the vendor's API under another name, models under the names of deployments.
    Foundry,
    /// Any other URL that speaks the vendor's API.
    Compatible,
}

impl ProviderKind {
    /// All kinds.
    pub const ALL: [Self; 5] =
        [Self::Anthropic, Self::Bedrock, Self::Vertex, Self::Foundry, Self::Compatible];

    /// The word in the configuration.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Anthropic => "anthropic",
            Self::Bedrock => "bedrock",
            Self::Vertex => "vertex",
            Self::Foundry => "foundry",
            Self::Compatible => "compatible",
        }
    }
}

/// What the CLI of a cell must know of its provider.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProviderView {
    /// How it is spoken to.
    pub kind: ProviderKind,
    /// The region that the CLI chooses model names by (`bedrock`).
    pub region: Option<String>,
}

impl ProviderView {
    /// The variables that lead the CLI to the gateway. `token` opens this cell's socket and nothing else.
    pub fn environment(&self, token: &str) -> Vec<(&'static str, String)> {
        let gateway = format!("http://127.0.0.1:{MODEL_PORT}");
        let on = || "1".to_owned();
        match self.kind {
            ProviderKind::Anthropic | ProviderKind::Compatible => {
                vec![("ANTHROPIC_BASE_URL", gateway), ("ANTHROPIC_API_KEY", token.to_owned())]
            }
            ProviderKind::Bedrock => vec![
                ("CLAUDE_CODE_USE_BEDROCK", on()),
                ("ANTHROPIC_BEDROCK_BASE_URL", gateway),
                ("AWS_REGION", self.region.clone().unwrap_or_else(|| "us-east-1".to_owned())),
                ("AWS_BEARER_TOKEN_BEDROCK", token.to_owned()),
                // Nothing else is asked for credentials: there is no network for it.
                ("AWS_EC2_METADATA_DISABLED", "true".to_owned()),
            ],
            ProviderKind::Vertex => vec![
                ("CLAUDE_CODE_USE_VERTEX", on()),
                ("CLAUDE_CODE_SKIP_VERTEX_AUTH", on()),
                ("ANTHROPIC_VERTEX_BASE_URL", format!("{gateway}/v1")),
                ("ANTHROPIC_VERTEX_PROJECT_ID", VERTEX_PROJECT.to_owned()),
                ("CLOUD_ML_REGION", VERTEX_LOCATION.to_owned()),
                ("ANTHROPIC_CUSTOM_HEADERS", format!("{TOKEN_HEADER}: {token}")),
            ],
            ProviderKind::Foundry => vec![
                ("CLAUDE_CODE_USE_FOUNDRY", on()),
                ("ANTHROPIC_FOUNDRY_BASE_URL", format!("{gateway}/anthropic")),
                ("ANTHROPIC_FOUNDRY_API_KEY", token.to_owned()),
            ],
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_led_to_the_gateway_with_the_token_and_nothing_else() {
        for kind in ProviderKind::ALL {
            let view = ProviderView { kind, region: Some("eu-central-1".into()) };
            let env = view.environment("hotcell-token");
            let with = |needle: &str| env.iter().filter(|(_, value)| value.contains(needle)).count();
            assert_eq!((with("hotcell-token"), with("http://127.0.0.1:3129")), (1, 1), "{kind:?}");
            assert_eq!(with("https://"), 0, "{kind:?}");
        }
    }
}
