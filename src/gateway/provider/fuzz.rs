//! A door for fuzz targets and nothing else: what the gateway does with a request before money and network are
//! involved, as one pure call. Path lists, header lists and translations are private to the gateway on purpose, and
//! a fuzz crate is another crate; so this is public, hidden from the docs, and takes and gives plain bytes and text.
//! It must do what `admit` and `outgoing` do, with their own functions, and never send, attach or reserve anything.

use std::collections::BTreeMap;
use std::task::{Context, Poll, Waker};

use bytes::Bytes;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use hyper::{Method, Uri};

use super::{Pacer, Provider, ProviderKind, ProviderSpec, Target};
use crate::gateway::Reach;
use crate::gateway::admit::inspect;
use crate::gateway::body::BodyFacts;
use crate::gateway::secret::Secret;
use crate::policy::{Ask, Plan, decide};

/// Where the requests would go. Nothing listens there and nothing is sent.
pub const BASE_URL: &str = "http://127.0.0.1:9";

/// A request as a cell sends it, taken apart as hyper does.
#[derive(Debug, Clone)]
pub struct Head {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
}

impl Head {
    /// Reads a request line and header lines; `None` where hyper would not hand them on.
    pub fn parse(text: &[u8]) -> Option<Self> {
        let mut lines =
            text.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
        let mut words = lines.next()?.split(|byte| *byte == b' ');
        let method = Method::from_bytes(words.next()?).ok()?;
        let uri = Uri::try_from(words.next()?).ok()?;
        let mut headers = HeaderMap::new();
        for line in lines.take_while(|line| !line.is_empty()).take(100) {
            let colon = line.iter().position(|byte| *byte == b':')?;
            let name = HeaderName::from_bytes(&line[..colon]).ok()?;
            headers.append(name, HeaderValue::from_bytes(line[colon + 1..].trim_ascii()).ok()?);
        }
        Some(Self { method, uri, headers })
    }
}

/// A request that would go upstream, once it is paid for.
#[derive(Debug, Clone)]
pub struct Passed {
    /// The kind of provider.
    pub kind: ProviderKind,
    /// Where to, without the credential.
    pub uri: String,
    /// Names of its headers.
    pub headers: Vec<String>,
    /// The body as it was judged.
    pub judged: Bytes,
    /// The body in the provider's form.
    pub sent: Bytes,
    /// The plain name of the model it was judged as.
    pub model: String,
}

/// What one provider of each kind would let through.
#[derive(Debug)]
pub struct Providers(Vec<Provider>);

impl Providers {
    /// One of each kind; `None` where that cannot be built.
    pub fn new() -> Option<Self> {
        let models = |kind| {
            match kind {
                ProviderKind::Foundry => {
                    [("claude-opus-4-8", "our-deployment"), ("claude-sonnet-4-6", "other")]
                }
                ProviderKind::Bedrock => {
                    [("claude-opus-4-8", "arn:aws:bedrock:a:1:p/q"), ("claude-a", "us.anthropic.claude-a")]
                }
                _ => return BTreeMap::new(),
            }
            .into_iter()
            .map(|(name, id)| (name.to_owned(), id.to_owned()))
            .collect()
        };
        let spec = |kind: ProviderKind| ProviderSpec {
            name: kind.as_str().to_owned(),
            kind,
            base_url: BASE_URL.to_owned(),
            credential: "none".to_owned(),
            region: Some("eu-central-1".to_owned()),
            project: Some("a-project".to_owned()),
            models: models(kind),
        };
        let open = |kind| Provider::open(spec(kind), Pacer::new(), &Reach::default()).ok();
        ProviderKind::ALL.into_iter().map(open).collect::<Option<Vec<_>>>().map(Self)
    }

    /// Each kind's answer to a request; whether the token is right does not matter here, only that asking for it
    /// is survived.
    pub fn answer(&self, plan: &Plan, head: &Head, body: &[u8]) -> Vec<Passed> {
        self.0.iter().filter_map(|provider| one(provider, plan, head, body)).collect()
    }
}

fn one(provider: &Provider, plan: &Plan, head: &Head, body: &[u8]) -> Option<Passed> {
    let Head { method, uri, headers } = head;
    let token = Secret::new("hotcell-token".to_owned());
    let _ = provider.authorise(headers, &token);
    let _ = provider.answered_here(method, uri, headers, &token);
    let route = provider.route(method, uri).ok()?;
    let mut headers = Provider::forwarded(headers);
    let (judged, way) = now(provider.inbound(route, &mut headers, Bytes::copy_from_slice(body)))?.ok()?;
    inspect(plan, &headers).ok()?;
    let facts = BodyFacts::read(&judged).ok()?;
    for wanted in &facts.wanted {
        decide(plan, Ask::Request { part: wanted.part() }).ok()?;
    }
    decide(plan, Ask::Model { name: &facts.model }).ok()?;
    if way.route.target == Target::Messages && facts.output_tokens_max.is_none_or(|tokens| tokens == 0) {
        return None;
    }
    let sent = now(provider.outbound(&way, &mut headers, judged.clone()))?.ok()?;
    let uri = provider.upstream.uri(&provider.path(&way))?.to_string();
    let headers = headers.keys().map(ToString::to_string).collect();
    Some(Passed { kind: provider.kind, uri, headers, judged, sent, model: facts.model })
}

/// The result of a future that does not wait; `None` where it does, as with bodies that go to another thread.
fn now<T>(future: impl Future<Output = T>) -> Option<T> {
    let mut future = std::pin::pin!(future);
    match future.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        Poll::Ready(done) => Some(done),
        Poll::Pending => None,
    }
}
