//! Providers and credentials: `[[provider]]`, `[[credential]]`, and the provider `anthropic`, which is there by
//! itself and is set by `[provider.anthropic]`, its flags and its variables. Names what is wrong with file, line and
//! key; never reads a credential, only where one is to be found, and never repeats what may be one.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::time::Duration;

use serde::de::value::{MapAccessDeserializer, SeqAccessDeserializer};
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use toml::Spanned;

use super::raw::{Layers, Opt, RawAnthropic};
use super::{ApiKeySource, ConfigError, absolute, parse_base_url};
use crate::agent::provider::ProviderKind;
use crate::gateway::{
    CredentialKind, CredentialSource, CredentialSpec, GatewayConfig, Principal, ProviderSpec, credentials,
};

/// The name of the provider, and of the credential, that are there by themselves.
pub const BUILT_IN: &str = "anthropic";
/// Most providers, and most credentials.
const ENTRIES_MAX: usize = 256;
/// Longest time after which a file or command is read again.
const REFRESH_S_MAX: u64 = 86_400;

/// The key `provider`: a table with the built-in one, or a list.
#[derive(Debug, Default)]
pub(super) struct RawProviders {
    pub(super) anthropic: RawAnthropic,
    list: Vec<Spanned<RawProvider>>,
}

impl<'de> Deserialize<'de> for RawProviders {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        struct Either;
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields, default)]
        #[derive(Default)]
        struct Table {
            anthropic: RawAnthropic,
        }
        impl<'de> Visitor<'de> for Either {
            type Value = RawProviders;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("[provider.anthropic], or [[provider]] entries")
            }
            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<RawProviders, A::Error> {
                let table = Table::deserialize(MapAccessDeserializer::new(map))?;
                Ok(RawProviders { anthropic: table.anthropic, list: Vec::new() })
            }
            fn visit_seq<A: SeqAccess<'de>>(self, seq: A) -> Result<RawProviders, A::Error> {
                let list = Vec::deserialize(SeqAccessDeserializer::new(seq))?;
                Ok(RawProviders { anthropic: RawAnthropic::default(), list })
            }
        }
        from.deserialize_any(Either)
    }
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProvider {
    name: Spanned<String>,
    kind: Spanned<ProviderKind>,
    base_url: Opt<String>,
    credential: Opt<String>,
    region: Opt<String>,
    project: Opt<String>,
    #[serde(default)]
    models: BTreeMap<String, String>,
}

#[derive(Debug, Clone, Copy, Deserialize)]
#[serde(rename_all = "snake_case")]
enum RawKind {
    ApiKey,
    Bearer,
    Aws,
    Basic,
    Header,
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum OneOrMore {
    Shell(String),
    Program(Vec<String>),
}

#[derive(Debug, Clone, Deserialize)]
#[serde(untagged)]
enum RawPrincipal {
    Id(u32),
    Name(String),
}

/// One `[[credential]]`.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawCredential {
    name: Spanned<String>,
    kind: Spanned<RawKind>,
    env: Opt<String>,
    file: Opt<String>,
    command: Opt<OneOrMore>,
    refresh_s: Opt<u64>,
    username: Opt<String>,
    header: Opt<String>,
    prefix: Opt<String>,
    users: Opt<Vec<RawPrincipal>>,
    groups: Opt<Vec<RawPrincipal>>,
}

/// Where a mistake is, and what it is.
struct Wrong<'l, 'a>(&'l Layers<'a>, String);

impl Wrong<'_, '_> {
    fn at<T>(&self, value: &Spanned<T>, key: &str, problem: impl Into<String>) -> ConfigError {
        let key = if key.is_empty() { self.1.clone() } else { format!("{}: {key}", self.1) };
        ConfigError::Entry { key, problem: problem.into(), origin: self.0.place(value) }
    }
}

/// All providers and credentials, the built-in ones among them.
pub(super) fn gateway(
    layers: &Layers<'_>,
    providers: RawProviders,
    credentials: Vec<Spanned<RawCredential>>,
    default_provider: Option<String>,
) -> Result<GatewayConfig, ConfigError> {
    let RawProviders { anthropic, list } = providers;
    let mut config = built_in(layers, &anthropic)?;
    if list.len() > ENTRIES_MAX || credentials.len() > ENTRIES_MAX {
        let problem = format!("there are more than {ENTRIES_MAX} entries");
        let origin = "the file".to_owned();
        return Err(ConfigError::Entry { key: "provider, credential".into(), problem, origin });
    }
    let mut seen = BTreeSet::new();
    for raw in credentials {
        let spec = credential(layers, raw.get_ref())?;
        if !seen.insert(spec.name.clone()) {
            let wrong = Wrong(layers, format!("[[credential]] {:?}", spec.name));
            return Err(wrong.at(&raw.get_ref().name, "name", "stands twice"));
        }
        // One of the built-in one's name takes its place.
        config.credentials.retain(|other| other.name != spec.name);
        config.credentials.push(spec);
    }
    let kinds: BTreeMap<String, CredentialKind> =
        config.credentials.iter().map(|spec| (spec.name.clone(), spec.kind.clone())).collect();
    let mut seen = BTreeSet::new();
    for raw in &list {
        let spec = provider(layers, raw.get_ref(), &kinds)?;
        if !seen.insert(spec.name.clone()) {
            let wrong = Wrong(layers, format!("[[provider]] {:?}", spec.name));
            return Err(wrong.at(&raw.get_ref().name, "name", "stands twice"));
        }
        config.providers.retain(|other| other.name != spec.name);
        config.providers.push(spec);
    }
    // With one provider in the file, that is the one that is meant.
    let only = (list.len() == 1).then(|| list[0].get_ref().name.get_ref().clone());
    config.default_provider = default_provider.or(only).unwrap_or_else(|| BUILT_IN.to_owned());
    if !config.providers.iter().any(|spec| spec.name == config.default_provider) {
        let known: Vec<&str> = config.providers.iter().map(|spec| spec.name.as_str()).collect();
        let problem =
            format!("there is no provider {:?} (there are: {})", config.default_provider, known.join(", "));
        return Err(layers.missing("defaults.provider", &problem));
    }
    // The built-in one may lack its key as long as nobody chose it.
    let chosen = config.providers.iter().find(|spec| spec.name == config.default_provider);
    let chosen = chosen.map(|spec| spec.credential.clone());
    for spec in config.credentials.iter_mut().filter(|spec| spec.name == BUILT_IN) {
        spec.required |= chosen.as_deref() == Some(BUILT_IN);
    }
    Ok(config)
}

fn built_in(layers: &Layers<'_>, raw: &RawAnthropic) -> Result<GatewayConfig, ConfigError> {
    let base_url = layers
        .checked("provider.anthropic.base_url", &raw.base_url, parse_base_url)?
        .unwrap_or_else(|| "https://api.anthropic.com".to_owned());
    Ok(anthropic(base_url, layers.api_key(raw)?))
}

/// The configuration with the built-in provider alone.
pub fn anthropic(base_url: String, key: ApiKeySource) -> GatewayConfig {
    let source = match key {
        ApiKeySource::Env(name) => CredentialSource::Env(name),
        ApiKeySource::File(path) => CredentialSource::File(path),
        ApiKeySource::Command(command) => shell(command),
    };
    GatewayConfig {
        providers: vec![ProviderSpec {
            name: BUILT_IN.to_owned(),
            kind: ProviderKind::Anthropic,
            base_url,
            credential: BUILT_IN.to_owned(),
            region: None,
            project: None,
            models: BTreeMap::new(),
        }],
        default_provider: BUILT_IN.to_owned(),
        credentials: vec![CredentialSpec {
            name: BUILT_IN.to_owned(),
            kind: CredentialKind::ApiKey,
            // What was named outright must be there; the usual variable need not.
            required: source != CredentialSource::Env("ANTHROPIC_API_KEY".to_owned()),
            source,
            refresh: credentials::REFRESH,
            users: Vec::new(),
            groups: Vec::new(),
        }],
    }
}

fn shell(command: String) -> CredentialSource {
    CredentialSource::Command(vec!["/bin/sh".to_owned(), "-c".to_owned(), command])
}

/// A name that reaches policies, events and messages.
fn name(wrong: &Wrong<'_, '_>, value: &Spanned<String>, key: &str) -> Result<String, ConfigError> {
    let text = value.get_ref();
    let good = |b: u8| b.is_ascii_alphanumeric() || b"-_.".contains(&b);
    if text.is_empty() || text.len() > 64 || !text.bytes().all(good) {
        return Err(wrong.at(value, key, "must have 1 to 64 letters, digits, '-', '_' or '.'"));
    }
    Ok(text.clone())
}

fn provider(
    layers: &Layers<'_>,
    raw: &RawProvider,
    kinds: &BTreeMap<String, CredentialKind>,
) -> Result<ProviderSpec, ConfigError> {
    let wrong = Wrong(layers, format!("[[provider]] {:?}", shown(raw.name.get_ref())));
    let name = name(&wrong, &raw.name, "name")?;
    let kind = *raw.kind.get_ref();
    let base_url = match &raw.base_url {
        Some(url) => parse_base_url(url.get_ref()).map_err(|problem| wrong.at(url, "base_url", problem))?,
        None => String::new(),
    };
    check_place(&wrong, raw, kind)?;
    check_models(&wrong, raw)?;
    let credential = credential_of(&wrong, raw, kind, &name, kinds)?;
    let text = |value: &Opt<String>| value.as_ref().map(|v| v.get_ref().clone());
    Ok(ProviderSpec {
        name,
        kind,
        base_url,
        credential,
        region: text(&raw.region),
        project: text(&raw.project),
        models: raw.models.clone(),
    })
}

/// Each kind is reached in its own way: what it needs is there, what it does not take is not.
fn check_place(wrong: &Wrong<'_, '_>, raw: &RawProvider, kind: ProviderKind) -> Result<(), ConfigError> {
    let needed: &[(&str, bool)] = match kind {
        ProviderKind::Anthropic => &[],
        ProviderKind::Bedrock => &[("region", raw.region.is_some())],
        ProviderKind::Vertex => &[("region", raw.region.is_some()), ("project", raw.project.is_some())],
        ProviderKind::Foundry | ProviderKind::Compatible => &[("base_url", raw.base_url.is_some())],
    };
    if let Some((key, _)) = needed.iter().find(|(_, given)| !given) {
        return Err(wrong.at(&raw.kind, key, format!("is missing: kind {} needs it", kind.as_str())));
    }
    for (key, value) in [("region", &raw.region), ("project", &raw.project)] {
        let Some(value) = value else { continue };
        let good = |b: u8| b.is_ascii_alphanumeric() || b"-_.:".contains(&b);
        if !needed.iter().any(|(needed, _)| *needed == key) {
            return Err(wrong.at(value, key, format!("kind {} does not take it", kind.as_str())));
        }
        if value.get_ref().is_empty() || !value.get_ref().bytes().all(good) {
            let problem = "must be one word of letters, digits, '-', '_', '.' or ':'";
            return Err(wrong.at(value, key, problem));
        }
    }
    Ok(())
}

fn check_models(wrong: &Wrong<'_, '_>, raw: &RawProvider) -> Result<(), ConfigError> {
    let mut ids: Vec<&String> = raw.models.values().collect();
    ids.sort_unstable();
    if let Some(pair) = ids.windows(2).find(|pair| pair[0] == pair[1]) {
        let problem = format!("{:?} is the id of two models, so its price is not known", pair[0]);
        return Err(wrong.at(&raw.name, "models", problem));
    }
    let bad = |(name, id): &(&String, &String)| name.is_empty() || id.is_empty() || id.len() > 512;
    match raw.models.iter().find(bad) {
        Some((name, _)) => {
            let problem = format!("{name:?} and its id must not be empty or over-long");
            Err(wrong.at(&raw.name, "models", problem))
        }
        None => Ok(()),
    }
}

/// The credential that a provider names, else the one of its own name; of a kind that it takes.
fn credential_of(
    wrong: &Wrong<'_, '_>,
    raw: &RawProvider,
    kind: ProviderKind,
    name: &str,
    kinds: &BTreeMap<String, CredentialKind>,
) -> Result<String, ConfigError> {
    let credential = raw.credential.as_ref().map_or(name, |credential| credential.get_ref()).to_owned();
    let at = raw.credential.as_ref().unwrap_or(&raw.name);
    let Some(given) = kinds.get(&credential) else {
        let problem = format!("there is no [[credential]] {credential:?}");
        return Err(wrong.at(at, "credential", problem));
    };
    if !fits(kind, given) {
        let problem = format!("kind {} cannot use a credential of kind {}", kind.as_str(), given.as_str());
        return Err(wrong.at(at, "credential", problem));
    }
    Ok(credential)
}

/// Which credentials a kind of provider takes.
fn fits(provider: ProviderKind, credential: &CredentialKind) -> bool {
    use CredentialKind::{ApiKey, Aws, Bearer, Header};
    match provider {
        ProviderKind::Anthropic | ProviderKind::Foundry => matches!(credential, ApiKey | Bearer),
        ProviderKind::Bedrock => matches!(credential, Bearer | Aws),
        ProviderKind::Vertex => matches!(credential, Bearer),
        ProviderKind::Compatible => matches!(credential, ApiKey | Bearer | Header { .. }),
    }
}

fn credential(layers: &Layers<'_>, raw: &RawCredential) -> Result<CredentialSpec, ConfigError> {
    let wrong = Wrong(layers, format!("[[credential]] {:?}", shown(raw.name.get_ref())));
    let name = name(&wrong, &raw.name, "name")?;
    let refresh = match &raw.refresh_s {
        None => credentials::REFRESH,
        Some(s) if (1..=REFRESH_S_MAX).contains(s.get_ref()) => Duration::from_secs(*s.get_ref()),
        Some(s) => return Err(wrong.at(s, "refresh_s", format!("must be from 1 to {REFRESH_S_MAX}"))),
    };
    let principals = |list: &Opt<Vec<RawPrincipal>>, key: &str| match list {
        None => Ok(Vec::new()),
        Some(list) if list.get_ref().is_empty() => {
            Err(wrong.at(list, key, "is empty: nobody could use it; leave it out to let everybody"))
        }
        Some(list) => Ok(list.get_ref().iter().cloned().map(principal).collect::<Vec<_>>()),
    };
    Ok(CredentialSpec {
        kind: credential_kind(&wrong, raw)?,
        source: credential_source(&wrong, raw)?,
        refresh,
        users: principals(&raw.users, "users")?,
        groups: principals(&raw.groups, "groups")?,
        required: true,
        name,
    })
}

fn principal(raw: RawPrincipal) -> Principal {
    match raw {
        RawPrincipal::Id(id) => Principal::Id(id),
        RawPrincipal::Name(name) => Principal::Name(name),
    }
}

fn credential_kind(wrong: &Wrong<'_, '_>, raw: &RawCredential) -> Result<CredentialKind, ConfigError> {
    let extras = [("username", &raw.username), ("header", &raw.header), ("prefix", &raw.prefix)];
    let takes: &[&str] = match raw.kind.get_ref() {
        RawKind::ApiKey | RawKind::Bearer | RawKind::Aws => &[],
        RawKind::Basic => &["username"],
        RawKind::Header => &["header", "prefix"],
    };
    for (key, value) in extras {
        if let Some(value) = value.as_ref().filter(|_| !takes.contains(&key)) {
            return Err(wrong.at(value, key, "this kind does not take it"));
        }
        let bad = |text: &str| text.len() > 200 || text.bytes().any(|b| !(b' '..=b'~').contains(&b));
        if let Some(value) = value.as_ref().filter(|value| bad(value.get_ref())) {
            return Err(wrong.at(value, key, "must be visible ASCII, at most 200 bytes"));
        }
    }
    Ok(match raw.kind.get_ref() {
        RawKind::ApiKey => CredentialKind::ApiKey,
        RawKind::Bearer => CredentialKind::Bearer,
        RawKind::Aws => CredentialKind::Aws,
        RawKind::Basic => {
            let username = raw.username.as_ref().map_or("x-access-token", |value| value.get_ref());
            if username.contains(':') {
                return Err(wrong.at(&raw.name, "username", "must not hold a colon"));
            }
            CredentialKind::Basic { username: username.to_owned() }
        }
        RawKind::Header => {
            let Some(header) = &raw.header else {
                return Err(wrong.at(&raw.kind, "header", "is missing: the name of the header it goes into"));
            };
            let name = header.get_ref().to_ascii_lowercase();
            let token = |b: u8| b.is_ascii_alphanumeric() || b"-_".contains(&b);
            let hop = ["host", "connection", "content-length", "transfer-encoding"];
            if name.is_empty() || !name.bytes().all(token) || hop.contains(&&*name) {
                return Err(wrong.at(header, "header", "is no name of a header that can carry a credential"));
            }
            let prefix = raw.prefix.as_ref().map_or(String::new(), |value| value.get_ref().clone());
            CredentialKind::Header { name, prefix }
        }
    })
}

fn credential_source(wrong: &Wrong<'_, '_>, raw: &RawCredential) -> Result<CredentialSource, ConfigError> {
    let given =
        usize::from(raw.env.is_some()) + usize::from(raw.file.is_some()) + usize::from(raw.command.is_some());
    if given != 1 {
        return Err(wrong.at(&raw.name, "", "needs exactly one of env, file and command"));
    }
    if let Some(env) = &raw.env {
        let text = env.get_ref();
        // The text may be the credential itself, put into the wrong place: it is not repeated.
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_') {
            return Err(wrong.at(env, "env", "is not the name of a variable"));
        }
        return Ok(CredentialSource::Env(text.clone()));
    }
    if let Some(file) = &raw.file {
        let path: PathBuf =
            absolute(file.get_ref()).map_err(|_| wrong.at(file, "file", "is not an absolute path"))?;
        return Ok(CredentialSource::File(path));
    }
    let Some(command) = &raw.command else {
        return Err(wrong.at(&raw.name, "", "needs exactly one of env, file and command"));
    };
    match command.get_ref() {
        OneOrMore::Shell(text) if !text.trim().is_empty() => Ok(shell(text.clone())),
        OneOrMore::Program(argv) if argv.first().is_some_and(|program| program.starts_with('/')) => {
            Ok(CredentialSource::Command(argv.clone()))
        }
        OneOrMore::Shell(_) | OneOrMore::Program(_) => Err(wrong.at(
            command,
            "command",
            "must be a shell command, or a list that begins with an absolute path",
        )),
    }
}

fn shown(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests {
    use super::super::{Config, Flags, Machine};
    use super::*;

    fn load(text: &str) -> Result<GatewayConfig, String> {
        let dir = tempfile::tempdir().expect("dir");
        let path = dir.path().join("config.toml");
        std::fs::write(&path, text).expect("write");
        let vars = [("HOME".to_owned(), "/home/ann".to_owned())].into();
        let machine = Machine { vars, root: false, cores: 2, exe_dir: Some("/opt".into()) };
        let flags = Flags { config: Some(path), ..Flags::default() };
        let config = Config::load(&flags, &machine);
        config.map(|c| c.gateway).map_err(|e| e.to_string().replace(&*dir.path().to_string_lossy(), "DIR"))
    }

    const TWO: &str = r#"
[[credential]]
name = "aws"
kind = "aws"
command = ["/usr/bin/print-keys", "--work"]
refresh_s = 60
users = ["ann", 1000]
groups = ["dev"]

[[credential]]
name = "git"
kind = "header"
header = "Authorization"
prefix = "token "
file = "/etc/hotcell/git"

[[provider]]
name = "bedrock"
kind = "bedrock"
region = "us-east-1"
credential = "aws"
models = { "claude-sonnet-4-6" = "us.anthropic.claude-sonnet-4-6" }

[[provider]]
name = "local"
kind = "compatible"
base_url = "http://127.0.0.1:8080/v"
credential = "anthropic"

[defaults]
provider = "bedrock"
"#;

    #[test]
    fn several_providers_stand_beside_the_built_in_one() {
        let config = load(TWO).expect("config");
        let names: Vec<&str> = config.providers.iter().map(|p| p.name.as_str()).collect();
        assert_eq!(
            (names, config.default_provider.as_str()),
            (vec!["anthropic", "bedrock", "local"], "bedrock")
        );
        let aws = &config.credentials[1];
        assert_eq!((aws.kind.clone(), aws.refresh), (CredentialKind::Aws, Duration::from_secs(60)));
        assert_eq!(aws.users, [Principal::Name("ann".into()), Principal::Id(1000)]);
        let prefix = "token ".to_owned();
        assert_eq!(
            config.credentials[2].kind,
            CredentialKind::Header { name: "authorization".into(), prefix }
        );
        assert!(!config.credentials[0].required, "nobody chose the built-in one");
        let old = load("[provider.anthropic]\nbase_url = \"http://127.0.0.1:1\"\napi_key_file = \"/k\"")
            .expect("old");
        assert_eq!(old.credentials[0].source, CredentialSource::File("/k".into()));
        assert!(old.credentials[0].required && old.default_provider == "anthropic");
        assert!(load("").expect("empty").credentials[0].required);
    }

    #[test]
    fn a_mistake_is_named_with_file_line_and_key() {
        let cred = "[[credential]]\nname = \"c\"\nkind = \"api_key\"\nenv = \"K\"\n";
        for (text, wanted) in [
            ("[[provider]]\nname = \"b\"\nkind = \"bedrok\"\n", "line 3"),
            ("[[provider]]\nname = \"b\"\nkind = \"bedrock\"\nregions = \"x\"\n", "regions"),
            ("[provider.bedrock]\nregion = \"x\"\n", "bedrock"),
            (
                &format!("{cred}[[provider]]\nname = \"b\"\nkind = \"bedrock\"\ncredential = \"c\"\n"),
                "[[provider]] \"b\": region: is missing: kind bedrock needs it",
            ),
            (
                &format!(
                    "{cred}[[provider]]\nname = \"b\"\nkind = \"bedrock\"\nregion = \"x\"\ncredential = \"c\"\n"
                ),
                "credential: kind bedrock cannot use a credential of kind api_key",
            ),
            (
                "[[provider]]\nname = \"f\"\nkind = \"anthropic\"\ncredential = \"zz\"\n",
                "there is no [[credential]] \"zz\"",
            ),
            (
                "[[provider]]\nname = \"f\"\nkind = \"foundry\"\ncredential = \"anthropic\"\n",
                "base_url: is missing",
            ),
            (
                "[[provider]]\nname = \"f\"\nkind = \"anthropic\"\nregion = \"x\"\ncredential = \"anthropic\"\n",
                "region: kind anthropic does not take it",
            ),
            ("[[provider]]\nname = \"a b\"\nkind = \"anthropic\"\n", "name: must have"),
            (&format!("{cred}{cred}"), "[[credential]] \"c\": name: stands twice"),
            (&format!("{cred}file = \"/x\"\n"), "exactly one of env, file and command"),
            (&format!("{cred}users = []\n"), "users: is empty"),
            (&format!("{cred}refresh_s = 0\n"), "refresh_s: must be"),
            (&format!("{cred}username = \"x\"\n"), "username: this kind does not take it"),
            ("[[credential]]\nname = \"c\"\nkind = \"header\"\nenv = \"K\"\n", "header: is missing"),
            (
                "[[credential]]\nname = \"c\"\nkind = \"api_key\"\ncommand = [\"relative\"]\n",
                "command: must be",
            ),
            ("[defaults]\nprovider = \"nope\"\n", "defaults.provider: there is no provider \"nope\""),
        ] {
            let error = load(text).expect_err(text);
            assert!(error.contains(wanted) && error.contains("config.toml"), "{text}: {error}");
            assert!(!text.starts_with("[[") || error.contains("line "), "{text}: {error}");
        }
        let error = load("[[credential]]\nname = \"c\"\nkind = \"api_key\"\nenv = \"sk-ant-0123\"\n")
            .expect_err("key");
        assert!(error.contains("env") && !error.contains("0123"), "{error}");
    }
}
