//! A model provider: which requests of a cell are calls of its, how they become the request that is judged, and how
//! that goes upstream with a credential. What is not on the list of its kind is refused, with nothing sent; a
//! credential of the cell's own never goes along.

mod anthropic;
mod bedrock;
mod foundry;
#[doc(hidden)]
pub mod fuzz;
mod names;
mod segment;
mod translate;
mod vertex;

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use hyper::body::Incoming;
use hyper::header::{self, HeaderMap, HeaderValue};
use hyper::{Method, Response, StatusCode, Uri};
use subtle::ConstantTimeEq;

use super::admit::Refused;
use super::credentials::{Attachment, CredentialError, Credentials};
use super::estimate::Estimates;
use super::pace::pacer::Pacer;
use super::relay::{Body, whole};
use super::secret::{Secret, Secrets};
use super::sigv4::{self, Keys, Scope, Signed};
use super::upstream::Upstream;
use super::{GatewayError, Reach, Refusal};
use crate::agent::provider::{ProviderKind, ProviderView, TOKEN_HEADER};
use crate::clock;
use crate::job::Identity;
use crate::policy::Permit;
use names::Names;
use translate::{Said, TranslateError};

/// Bodies above this are translated and hashed on a thread of their own.
const BODY_BYTES_INLINE: usize = 512 << 10;
/// Headers that carry somebody's credential. Exactly one of them may come, with the cell's token.
const CREDENTIAL_HEADERS: [&str; 7] = [
    "x-api-key",
    "authorization",
    TOKEN_HEADER,
    "api-key",
    "x-goog-api-key",
    "x-amz-security-token",
    "proxy-authorization",
];
/// Request headers that go upstream, besides those that begin with one of [`REQUEST_PREFIXES`].
const REQUEST_HEADERS: [header::HeaderName; 2] = [header::ACCEPT, header::USER_AGENT];
/// What the API and its clients call their own.
const REQUEST_PREFIXES: [&str; 4] = ["anthropic-", "x-stainless-", "x-claude-", "x-app"];
/// The header of beta features.
const BETA_HEADER: &str = "anthropic-beta";

/// A provider as configured. Never holds a credential, only its name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProviderSpec {
    /// Its name: what specs and policies say.
    pub name: String,
    /// How it is spoken to.
    pub kind: ProviderKind,
    /// `https://…`, or `http://` to a loopback address (the scripted model); may have a path. Empty: the usual one
    /// of its kind.
    pub base_url: String,
    /// The credential's name.
    pub credential: String,
    /// Amazon's or Google's region.
    pub region: Option<String>,
    /// Google's project.
    pub project: Option<String>,
    /// Plain names of models → this provider's ids.
    pub models: BTreeMap<String, String>,
}

/// What is asked of a provider.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// A message.
    Messages,
    /// The number of tokens of one, which costs nothing.
    CountTokens,
}

/// A request whose method and path are on the list.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) target: Target,
    /// Whether it came with `?beta=true`.
    pub(super) beta: bool,
    /// The model's id, where the path says it.
    pub(super) model: Option<String>,
    /// Whether the path asks for a stream, where it says so.
    pub(super) stream: Option<bool>,
}

/// What the way out needs of the way in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Way {
    pub(super) route: Route,
    /// The model's id as it goes upstream.
    id: Option<String>,
    /// Names of beta features that stood in the body.
    body_betas: Vec<String>,
}

/// A provider, ready.
#[derive(Debug)]
pub(super) struct Provider {
    pub(super) name: String,
    pub(super) kind: ProviderKind,
    pub(super) credential: String,
    region: String,
    project: String,
    names: Names,
    upstream: Upstream,
    /// What is known of the size of requests.
    pub(super) estimates: Estimates,
    /// How fast its credential may be used, by class; shared with other providers of the same credential.
    pub(super) pacer: Arc<Pacer>,
}

impl Provider {
    pub(super) fn open(spec: ProviderSpec, pacer: Arc<Pacer>, reach: &Reach) -> Result<Self, GatewayError> {
        let bad = |why| GatewayError::Provider { provider: spec.name.clone(), why };
        let region = spec.region.clone().unwrap_or_default();
        let project = spec.project.clone().unwrap_or_default();
        let word = |text: &str| text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.:".contains(&b));
        if !word(&region) || !word(&project) {
            return Err(bad("region and project are single words"));
        }
        let mut ids: Vec<&String> = spec.models.values().collect();
        ids.sort_unstable();
        if ids.windows(2).any(|pair| pair[0] == pair[1]) {
            return Err(bad("models: two names have the same id, so its price is not known"));
        }
        let base_url = match (spec.base_url.as_str(), spec.kind) {
            ("", ProviderKind::Anthropic) => "https://api.anthropic.com".to_owned(),
            ("", ProviderKind::Bedrock) if !region.is_empty() => {
                format!("https://bedrock-runtime.{region}.amazonaws.com")
            }
            ("", ProviderKind::Vertex) if !region.is_empty() => vertex::base_url(&region),
            ("", ProviderKind::Bedrock | ProviderKind::Vertex) => return Err(bad("needs a region")),
            ("", ProviderKind::Foundry | ProviderKind::Compatible) => return Err(bad("needs a base_url")),
            (url, _) => url.to_owned(),
        };
        if spec.kind == ProviderKind::Bedrock && region.is_empty() {
            return Err(bad("needs a region"));
        }
        if spec.kind == ProviderKind::Vertex && (project.is_empty() || region.is_empty()) {
            return Err(bad("needs a project and a region"));
        }
        let upstream = Upstream::new(&spec.name, &base_url, reach)?;
        let names = Names::new(spec.kind, spec.models);
        let (name, kind, credential) = (spec.name, spec.kind, spec.credential);
        let estimates = Estimates::default();
        Ok(Self { name, kind, credential, region, project, names, upstream, estimates, pacer })
    }

    /// What the CLI of a cell is told.
    pub(super) fn view(&self) -> ProviderView {
        let region = (!self.region.is_empty()).then(|| self.region.clone());
        ProviderView { kind: self.kind, region }
    }

    /// The way of a request that is only to be counted; none where there is no call that costs nothing.
    pub(super) fn counting(&self, way: &Way) -> Option<Way> {
        let route = Route { target: Target::CountTokens, ..way.route.clone() };
        match self.kind {
            ProviderKind::Bedrock => None,
            ProviderKind::Anthropic
            | ProviderKind::Vertex
            | ProviderKind::Foundry
            | ProviderKind::Compatible => Some(Way { route, ..way.clone() }),
        }
    }

    /// Whether it has an id for a model.
    pub(super) fn serves(&self, model: &str) -> bool {
        self.names.id(model).is_some()
    }

    /// The plain name of a model.
    pub(super) fn plain(&self, model: &str) -> String {
        self.names.plain(model)
    }

    /// Exactly one credential, and it is the lease's. Another one would be somebody's key on its way out.
    pub(super) fn authorise(&self, headers: &HeaderMap, token: &Secret) -> Result<(), Refused> {
        let all = CREDENTIAL_HEADERS.iter().flat_map(|name| {
            headers.get_all(*name).iter().map(move |value| match (*name, value.as_bytes()) {
                ("authorization", value) => match value.split_at_checked(7) {
                    Some((scheme, token)) if scheme.eq_ignore_ascii_case(b"bearer ") => token,
                    _ => b"",
                },
                ("x-api-key" | TOKEN_HEADER, value) => value,
                _ => b"",
            })
        });
        let offered: Vec<&[u8]> = all.take(2).collect();
        match offered[..] {
            [one] if !one.is_empty() && bool::from(one.ct_eq(token.bytes())) => Ok(()),
            _ => Err(Refused::new(Refusal::Credential, "this is not the credential of this job")),
        }
    }

    /// Method, path and query against the list of this kind, compared as they are.
    pub(super) fn route(&self, method: &Method, uri: &Uri) -> Result<Route, Refused> {
        let (path, query) = (uri.path(), uri.query());
        let bare = uri.scheme().is_none() && uri.authority().is_none();
        let (route, served) = match self.kind {
            ProviderKind::Anthropic | ProviderKind::Compatible => {
                (anthropic::route(method, path, query), anthropic::SERVED)
            }
            ProviderKind::Bedrock => (bedrock::route(method, path, query), bedrock::SERVED),
            ProviderKind::Vertex => (vertex::route(method, path, query), vertex::SERVED),
            ProviderKind::Foundry => (foundry::route(method, path, query), foundry::SERVED),
        };
        route.filter(|_| bare).ok_or_else(|| Refused::new(Refusal::Path, served))
    }

    /// What is answered without asking the provider.
    pub(super) fn answered_here(
        &self,
        method: &Method,
        uri: &Uri,
        headers: &HeaderMap,
        token: &Secret,
    ) -> Option<Result<Response<Body>, Refused>> {
        if method == Method::HEAD && matches!(uri.path(), "/" | "/v1" | "/anthropic") {
            // The CLI's warm-up. It tells nothing, so it needs no token.
            return Some(Ok(Response::new(whole(Bytes::new()))));
        }
        let profiles = self.kind == ProviderKind::Bedrock
            && uri.authority().is_none()
            && bedrock::is_profiles(method, uri.path(), uri.query());
        profiles.then(|| {
            self.authorise(headers, token)?;
            let mut response = Response::new(whole(Bytes::from_static(bedrock::NO_PROFILES.as_bytes())));
            *response.status_mut() = StatusCode::OK;
            let json = HeaderValue::from_static("application/json");
            response.headers_mut().insert(header::CONTENT_TYPE, json);
            Ok(response)
        })
    }

    /// The headers that may go upstream. `accept-encoding` may not: a compressed answer could not be metered.
    pub(super) fn forwarded(headers: &HeaderMap) -> HeaderMap {
        let mut out = HeaderMap::with_capacity(headers.len() + 4);
        for (name, value) in headers {
            let known = REQUEST_HEADERS.contains(name)
                || REQUEST_PREFIXES.iter().any(|prefix| name.as_str().starts_with(prefix));
            if known {
                out.append(name.clone(), value.clone());
            }
        }
        out.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        out
    }

    /// The request in the form in which it is judged: model in the body under its plain name, betas in the header.
    pub(super) async fn inbound(
        &self,
        route: Route,
        headers: &mut HeaderMap,
        body: Bytes,
    ) -> Result<(Bytes, Way), Refused> {
        // Bedrock's path alone says whether the answer is a stream; elsewhere the body does.
        let (version, stream) = match self.kind {
            ProviderKind::Bedrock => (bedrock::VERSION, route.stream),
            ProviderKind::Vertex
            | ProviderKind::Anthropic
            | ProviderKind::Foundry
            | ProviderKind::Compatible => (vertex::VERSION, None),
        };
        let refused = |error: TranslateError| Refused::new(Refusal::Malformed, error.to_string());
        let Some(asked) = route.model.clone() else {
            return self.inbound_by_body(route, body).await;
        };
        let Some(id) = self.names.id(&asked) else { return Err(self.no_id(&asked)) };
        let model = self.names.plain(&asked);
        let judged =
            apart(body, move |body| translate::inbound(body, Said { model: &model, stream, version }))
                .await
                .map_err(refused)?;
        for beta in &judged.betas {
            if let Ok(value) = HeaderValue::from_str(beta) {
                headers.append(BETA_HEADER, value);
            }
        }
        Ok((judged.body, Way { route, id: Some(id), body_betas: judged.betas }))
    }

    /// The same where the model is in the body already; which id it gets is known once it was read.
    async fn inbound_by_body(&self, route: Route, body: Bytes) -> Result<(Bytes, Way), Refused> {
        let mut way = Way { route, id: None, body_betas: Vec::new() };
        if self.names.are_plain() {
            return Ok((body, way));
        }
        let names = self.names.clone();
        let kept = body.clone();
        let (asked, renamed) = apart(body, move |body| {
            let mut asked = None;
            let renamed = translate::with_model(body, |model| {
                asked = Some(model.to_owned());
                Some(names.plain(model))
            });
            renamed.map(|renamed| (asked, renamed))
        })
        .await
        .map_err(|error| Refused::new(Refusal::Malformed, error.to_string()))?;
        if let Some(asked) = asked {
            way.id = Some(self.names.id(&asked).ok_or_else(|| self.no_id(&asked))?);
        }
        Ok((renamed.unwrap_or(kept), way))
    }

    fn no_id(&self, asked: &str) -> Refused {
        let asked: String = asked.chars().take(80).collect();
        let message = format!(
            "the provider {} has no id for the model {asked:?}: its models map does not name it",
            self.name
        );
        Refused::new(Refusal::Model, message)
    }
}

/// A request that is ready to go.
#[derive(Debug)]
pub(super) struct Outgoing {
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
    /// What its answer must not repeat.
    pub(super) secrets: Secrets,
}

/// Why a judged request cannot go out.
#[derive(Debug, thiserror::Error)]
pub(super) enum OutgoingError {
    /// No credential.
    #[error(transparent)]
    Credential(#[from] CredentialError),
    /// The body cannot be put into the provider's form. It was read before, so this is a fault of ours.
    #[error("{0}")]
    Translate(#[from] TranslateError),
    /// The path or a header cannot be built.
    #[error("the request cannot be built")]
    Build,
}

impl Provider {
    /// Puts a judged request into the provider's form and adds the credential, last and once. Only against a permit
    /// of the policy, for this very request.
    pub(super) async fn outgoing(
        &self,
        way: &Way,
        body: Bytes,
        mut headers: HeaderMap,
        credentials: &Credentials,
        permit: &Permit,
        who: &Identity,
    ) -> Result<Outgoing, OutgoingError> {
        let body = self.outbound(way, &mut headers, body).await?;
        let uri = self.upstream.uri(&self.path(way)).ok_or(OutgoingError::Build)?;
        let secrets = match credentials.attachment(&self.credential, permit, who).await? {
            Attachment::Header(injected) => {
                headers.insert(injected.name, injected.value);
                injected.secrets
            }
            Attachment::Sign(keys) => self.sign(&keys, &uri, &mut headers, &body).await?,
        };
        Ok(Outgoing { uri, headers, body, secrets })
    }

    /// Sends it; returns at the answer's head.
    pub(super) async fn send(
        &self,
        outgoing: Outgoing,
    ) -> Result<Response<Incoming>, hyper_util::client::legacy::Error> {
        self.upstream.send(outgoing.uri, outgoing.headers, outgoing.body).await
    }

    fn path(&self, way: &Way) -> String {
        let Route { target, beta, stream, .. } = way.route;
        let id = way.id.as_deref().unwrap_or_default();
        match self.kind {
            ProviderKind::Anthropic | ProviderKind::Compatible => anthropic::path(target, beta),
            ProviderKind::Foundry => foundry::path(target, beta),
            ProviderKind::Bedrock => bedrock::path(id, stream.unwrap_or(false)),
            ProviderKind::Vertex => {
                vertex::path(target, &self.project, &self.region, id, stream.unwrap_or(false))
            }
        }
    }

    async fn outbound(
        &self,
        way: &Way,
        headers: &mut HeaderMap,
        body: Bytes,
    ) -> Result<Bytes, TranslateError> {
        let (without, version): (&'static [&'static str], _) = match self.kind {
            ProviderKind::Bedrock => (&["model", "stream"], bedrock::VERSION),
            ProviderKind::Vertex if way.route.target == Target::Messages => (&["model"], vertex::VERSION),
            ProviderKind::Vertex
            | ProviderKind::Anthropic
            | ProviderKind::Foundry
            | ProviderKind::Compatible => {
                let Some(id) = way.id.clone() else { return Ok(body) };
                let kept = body.clone();
                let renamed = apart(body, move |body| translate::with_model(body, |_| Some(id))).await?;
                return Ok(renamed.unwrap_or(kept));
            }
        };
        let betas = split_betas(headers, &way.body_betas);
        apart(body, move |body| translate::outbound(body, without, version, &betas)).await
    }

    /// Signs as AWS wants it. The keys stay here; their signature goes.
    async fn sign(
        &self,
        keys: &Keys,
        uri: &Uri,
        headers: &mut HeaderMap,
        body: &Bytes,
    ) -> Result<Secrets, OutgoingError> {
        let body_sha256 = apart(body.clone(), sigv4::sha256_hex).await;
        let amz_date = sigv4::amz_date(clock::wall_ms());
        let host = uri.authority().map(ToString::to_string).unwrap_or_default();
        let token = keys.session_token.as_ref().map(Secret::expose);
        let mut signed =
            vec![("content-type", "application/json"), ("host", &*host), ("x-amz-date", &*amz_date)];
        signed.extend(token.map(|token| ("x-amz-security-token", token)));
        let scope = Scope { region: &self.region, service: "bedrock", amz_date: &amz_date };
        let request = Signed {
            method: "POST",
            path: uri.path(),
            query: "",
            headers: &signed,
            body_sha256: &body_sha256,
        };
        let authorization = sigv4::authorization(keys, scope, request);
        let signature = authorization.rsplit_once('=').map_or("", |(_, signature)| signature);
        let signature = Secret::new(signature.to_owned());
        for (name, text) in signed.iter().copied().chain([("authorization", &*authorization)]) {
            let mut value = HeaderValue::from_str(text).map_err(|_| OutgoingError::Build)?;
            value.set_sensitive(matches!(name, "authorization" | "x-amz-security-token"));
            headers.insert(header::HeaderName::from_static(name_of(name)), value);
        }
        let all = [&keys.secret_access_key, &signature];
        Ok(Secrets::of(all.into_iter().chain(&keys.session_token)))
    }
}

/// Header names that a signature covers, as hyper wants them.
fn name_of(name: &str) -> &'static str {
    match name {
        "host" => "host",
        "content-type" => "content-type",
        "x-amz-date" => "x-amz-date",
        "x-amz-security-token" => "x-amz-security-token",
        _ => "authorization",
    }
}

/// Takes the betas that stood in the body out of the header again, those that were judged harmless; the others
/// stay there.
fn split_betas(headers: &mut HeaderMap, body_betas: &[String]) -> Vec<String> {
    let values: Vec<String> = headers
        .get_all(BETA_HEADER)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(|beta| beta.trim().to_owned())
        .filter(|beta| !beta.is_empty())
        .collect();
    let (in_body, in_header): (Vec<String>, Vec<String>) =
        values.into_iter().partition(|beta| body_betas.contains(beta));
    headers.remove(BETA_HEADER);
    if let Ok(value) = HeaderValue::from_str(&in_header.join(","))
        && !in_header.is_empty()
    {
        headers.insert(BETA_HEADER, value);
    }
    in_body
}

/// Runs `work` over a body: on the spot where it is small, else on a thread of its own.
async fn apart<T: Send + 'static>(body: Bytes, work: impl FnOnce(&[u8]) -> T + Send + 'static) -> T {
    if body.len() <= BODY_BYTES_INLINE {
        return work(&body);
    }
    match tokio::task::spawn_blocking(move || work(&body)).await {
        Ok(done) => done,
        Err(error) => std::panic::resume_unwind(error.into_panic()),
    }
}

#[cfg(test)]
mod tests;
