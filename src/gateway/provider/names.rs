//! A provider's ids of models and the plain names that policies, prices and the ledger know. Pure. An id that is
//! priced as one model must never reach another one.

use std::collections::BTreeMap;

use super::{bedrock, vertex};
use crate::agent::provider::ProviderKind;
use crate::pricing::names_model;

/// Plain names → ids, as configured, and the rules of the kind for the rest.
#[derive(Debug, Clone)]
pub(super) struct Names {
    kind: ProviderKind,
    ids: BTreeMap<String, String>,
}

impl Names {
    pub(super) fn new(kind: ProviderKind, ids: BTreeMap<String, String>) -> Self {
        Self { kind, ids }
    }

    /// Whether every name is its own id.
    pub(super) fn are_plain(&self) -> bool {
        let renames = matches!(self.kind, ProviderKind::Bedrock | ProviderKind::Vertex);
        self.ids.is_empty() && !renames
    }

    /// The plain name of what a client asked for. A configured id comes first: whatever its text says, it is the
    /// model that the configuration says it is.
    pub(super) fn plain(&self, asked: &str) -> String {
        if let Some((plain, _)) = self.ids.iter().find(|(_, id)| *id == asked) {
            return plain.clone();
        }
        match self.kind {
            ProviderKind::Bedrock => bedrock::plain(asked).unwrap_or(asked).to_owned(),
            ProviderKind::Vertex => vertex::plain(asked),
            ProviderKind::Anthropic | ProviderKind::Foundry | ProviderKind::Compatible => asked.to_owned(),
        }
    }

    /// The id to send for what a client asked for; `None` where the provider has none that is known.
    pub(super) fn id(&self, asked: &str) -> Option<String> {
        if self.ids.values().any(|id| id == asked) {
            return Some(asked.to_owned());
        }
        let plain = self.plain(asked);
        let named = self.ids.iter().filter(|(name, _)| names_model(name, &plain));
        if let Some((_, id)) = named.max_by_key(|(name, _)| name.len()) {
            return Some(id.clone());
        }
        match self.kind {
            // A plain name says neither the place nor the version, which an id must have.
            ProviderKind::Bedrock => bedrock::plain(asked).map(|_| asked.to_owned()),
            ProviderKind::Vertex => Some(vertex::id(&plain)),
            ProviderKind::Anthropic | ProviderKind::Foundry | ProviderKind::Compatible => {
                Some(asked.to_owned())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn names(kind: ProviderKind, ids: &[(&str, &str)]) -> Names {
        Names::new(kind, ids.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect())
    }

    #[test]
    fn ids_become_plain_names() {
        let bedrock = names(ProviderKind::Bedrock, &[("claude-opus-4-8", "arn:aws:bedrock:us-east-1:1:p/x")]);
        for (id, plain) in [
            ("us.anthropic.claude-sonnet-4-6-v1:0", "claude-sonnet-4-6"),
            ("us.anthropic.claude-sonnet-4-6", "claude-sonnet-4-6"),
            ("anthropic.claude-opus-4-6-v1", "claude-opus-4-6"),
            ("global.anthropic.claude-haiku-4-5-20251001-v1:0", "claude-haiku-4-5-20251001"),
            ("arn:aws:bedrock:us-east-1:1:p/x", "claude-opus-4-8"),
        ] {
            assert_eq!(bedrock.plain(id), plain);
            assert_eq!(bedrock.id(id).as_deref(), Some(id), "what a client names outright stays");
        }
        assert_eq!(bedrock.id("claude-opus-4-8").as_deref(), Some("arn:aws:bedrock:us-east-1:1:p/x"));
        for unknown in [
            "claude-sonnet-4-6",
            "arn:aws:bedrock:us-east-1:2:p/x",
            "amazon.nova-pro-v1:0",
            "us.anthropic.claude-x-v1:0:200k",
        ] {
            assert_eq!(bedrock.id(unknown), None, "{unknown}");
        }
        let vertex = names(ProviderKind::Vertex, &[]);
        assert_eq!(vertex.plain("claude-haiku-4-5@20251001"), "claude-haiku-4-5-20251001");
        assert_eq!(vertex.id("claude-haiku-4-5-20251001").as_deref(), Some("claude-haiku-4-5@20251001"));
        assert_eq!(vertex.id("claude-sonnet-4-6").as_deref(), Some("claude-sonnet-4-6"));
    }

    #[test]
    fn a_deployment_that_is_called_like_another_model_is_priced_as_what_it_is() {
        let foundry = names(ProviderKind::Foundry, &[("claude-opus-4-8", "claude-haiku-4-5")]);
        assert_eq!(foundry.plain("claude-haiku-4-5"), "claude-opus-4-8");
        assert_eq!(foundry.id("claude-opus-4-8").as_deref(), Some("claude-haiku-4-5"));
        assert!(!foundry.are_plain() && names(ProviderKind::Foundry, &[]).are_plain());
    }

    proptest! {
        #[test]
        fn what_is_sent_is_what_was_priced(
            asked in "(us\\.)?(anthropic\\.)?claude-[a-c]-[1-3](-20251001)?(-v1:0)?",
            kind in prop::sample::select(ProviderKind::ALL.to_vec()),
            key in "claude-[a-c]-[1-3]", id in "claude-[a-c]-[1-3]"
        ) {
            let names = names(kind, &[(&key, &id)]);
            let plain = names.plain(&asked);
            if let Some(sent) = names.id(&asked) {
                let back = names.plain(&sent);
                prop_assert!(back == plain || names_model(&back, &plain), "{asked}: {plain}, {sent} is {back}");
            }
        }
    }
}
