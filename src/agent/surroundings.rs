//! What surrounds the tools in a cell: where they keep what they fetch and build, what the image says of itself, how
//! Java and git find the way out, and the agent's own words about all of it. The root of a cell is read-only and its
//! user is nobody's, so everything that a tool writes lies below HOME, on the cell's scratch disk. It must never set
//! what steers the CLI, nor let an image do it.

use std::collections::BTreeMap;

use super::options::HOME;
use super::{trust_store, way_out};
use crate::policy::egress::is_upgraded;
use crate::policy::{Host, Plan, is_reserved_variable};

/// Most variables that an image brings along; more are left out.
const IMAGE_VARIABLES_MAX: usize = 128;
/// Most bytes of one of them, name and value.
const IMAGE_VARIABLE_BYTES_MAX: usize = 8 << 10;
/// Most hosts whose ssh addresses are rewritten.
const GIT_HOSTS_MAX: usize = 64;
/// Most sets and hosts that the agent is told by name.
const NAMES_TOLD_MAX: usize = 24;

/// Variables of images that would be wrong in a cell. The image of Maven points its wrapper's arguments at root's HOME.
const IMAGE_LEFT_OUT: [&str; 14] = [
    "HOME",
    "USER",
    "LOGNAME",
    "HOSTNAME",
    "SHELL",
    "TERM",
    "BASH_ENV",
    "ENV",
    "PWD",
    "OLDPWD",
    "SHLVL",
    "TMPDIR",
    "MAVEN_CONFIG",
    "DOCKER_HOST",
];

/// Where tools write, below HOME.
const BELOW_HOME: [(&str, &str); 17] = [
    ("XDG_CACHE_HOME", ".cache"),
    ("CARGO_HOME", ".cargo"),
    ("CARGO_INSTALL_ROOT", ".local"),
    ("GOPATH", "go"),
    ("GOMODCACHE", "go/pkg/mod"),
    ("GOCACHE", ".cache/go-build"),
    ("GOBIN", ".local/bin"),
    ("PIP_CACHE_DIR", ".cache/pip"),
    ("UV_CACHE_DIR", ".cache/uv"),
    ("POETRY_CACHE_DIR", ".cache/pypoetry"),
    ("npm_config_cache", ".npm"),
    ("npm_config_prefix", ".local"),
    ("PNPM_HOME", ".local/share/pnpm"),
    ("COREPACK_HOME", ".cache/node/corepack"),
    ("GRADLE_USER_HOME", ".gradle"),
    ("DENO_DIR", ".cache/deno"),
    // From pnpm 11 on; older ones read a file.
    ("pnpm_config_store_dir", PNPM_STORE),
];
/// Maven's central repository.
const MAVEN_CENTRAL: &str = "repo.maven.apache.org";
/// The same in plain text: the gateway goes on over TLS, and hands on nothing that did not come whole. So the sums that lie
/// beside each file at the same host, which the tool would only warn about, are not asked for: half of all requests.
/// Under its own id, so that Maven takes what it has for its own.
const MAVEN_MIRROR: &str = "  <mirrors>\n    <mirror><id>central</id><mirrorOf>central</mirrorOf>\
                            <url>http://repo.maven.apache.org/maven2</url></mirror>\n  </mirrors>\n\
  <profiles>\n    <profile><id>hotcell</id>\n\
      <repositories><repository><id>central</id><url>https://repo.maven.apache.org/maven2</url>\
        <releases><checksumPolicy>ignore</checksumPolicy></releases><snapshots><enabled>false</enabled></snapshots>\
      </repository></repositories>\n\
      <pluginRepositories><pluginRepository><id>central</id><url>https://repo.maven.apache.org/maven2</url>\
        <releases><checksumPolicy>ignore</checksumPolicy></releases><snapshots><enabled>false</enabled></snapshots>\
      </pluginRepository></pluginRepositories>\n\
    </profile>\n  </profiles>\n  <activeProfiles><activeProfile>hotcell</activeProfile></activeProfiles>\n";
/// Packages of pnpm, below HOME.
const PNPM_STORE: &str = ".local/share/pnpm/store";

/// What else tools have to be told in a cell.
const SETTINGS: [(&str, &str); 4] = [
    // Debian's pip installs nothing beside the system's packages unless told. Here the system cannot be changed, and
    // what is installed lies below HOME.
    ("PIP_BREAK_SYSTEM_PACKAGES", "1"),
    // Workspace and cache are two mounts, over which nothing can be linked.
    ("UV_LINK_MODE", "copy"),
    // Its own git knows neither the authorities nor the rewritten addresses.
    ("CARGO_NET_GIT_FETCH_WITH_CLI", "true"),
    // Nobody can answer.
    ("GIT_TERMINAL_PROMPT", "0"),
];

/// Directory of programs that tools install, the last of PATH: it never stands in for a program of the image.
pub(super) const OWN_PROGRAMS: &str = ".local/bin";

/// What holds unless the job says otherwise: what the image says, under what hotcell says, under what the sets of
/// hosts say.
pub(super) fn defaults(plan: &Plan, image: &[(String, String)]) -> BTreeMap<String, String> {
    let mut env: BTreeMap<String, String> = image
        .iter()
        .filter(|(name, value)| {
            let plain = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
            let named = !name.is_empty() && !name.starts_with(|c: char| c.is_ascii_digit());
            let bytes = name.len() + value.len();
            named
                && name.bytes().all(plain)
                && bytes <= IMAGE_VARIABLE_BYTES_MAX
                && !value.contains('\0')
                && !IMAGE_LEFT_OUT.contains(&name.as_str())
                && !name.starts_with("GIT_CONFIG")
                && !is_reserved_variable(name)
        })
        .take(IMAGE_VARIABLES_MAX)
        .cloned()
        .collect();
    env.extend(BELOW_HOME.map(|(name, below)| (name.to_owned(), format!("{HOME}/{below}"))));
    env.extend(SETTINGS.map(|(name, value)| (name.to_owned(), value.to_owned())));
    env.extend(plan.set_env.clone());
    env
}

/// The way out in a finished environment: proxy and authorities for everybody, Java's own words for them, and git's
/// https addresses in place of those of ssh. `authorities`: the files of certificate authorities are there.
pub fn add_way_out(env: &mut BTreeMap<String, String>, plan: &Plan, authorities: bool) {
    env.extend(way_out::environment(plan, authorities));
    let java = java_options(plan, authorities);
    if !java.is_empty() {
        // What stands there already is the job's or the image's: the later one of two options holds.
        let own = env.remove("JAVA_TOOL_OPTIONS").map(|own| format!(" {own}")).unwrap_or_default();
        env.insert("JAVA_TOOL_OPTIONS".to_owned(), format!("{java}{own}"));
    }
    let mut settings = Vec::new();
    for host in git_hosts(plan) {
        for written in [format!("git@{host}:"), format!("ssh://git@{host}/"), format!("git://{host}/")] {
            settings.push((format!("url.https://{host}/.insteadOf"), written));
        }
    }
    add_git_settings(env, &settings);
}

/// Java looks at no proxy variable, and trusts its own store alone.
fn java_options(plan: &Plan, authorities: bool) -> String {
    if !plan.cell_has_egress() {
        return String::new();
    }
    let port = way_out::EGRESS_PORT;
    let mut options: Vec<String> = ["http", "https"]
        .into_iter()
        .flat_map(|scheme| {
            [format!("-D{scheme}.proxyHost=127.0.0.1"), format!("-D{scheme}.proxyPort={port}")]
        })
        .collect();
    // Maven from 3.9 on looks at those only when it is told to.
    options.push("-Daether.connector.http.useSystemProperties=true".to_owned());
    if authorities {
        let store = way_out::java_authorities();
        options.push(format!("-Djavax.net.ssl.trustStore={store}"));
        options.push("-Djavax.net.ssl.trustStoreType=PKCS12".to_owned());
        options.push(format!("-Djavax.net.ssl.trustStorePassword={}", trust_store::PASSWORD));
    }
    options.join(" ")
}

/// Hosts that a git repository may be fetched from: exact names on port 443 that a request of git's may go to.
fn git_hosts(plan: &Plan) -> Vec<String> {
    let setup = plan.for_setup(None);
    let mut hosts: Vec<String> = Vec::new();
    for rule in
        [plan, &setup].into_iter().filter_map(|plan| plan.layers.first()).flat_map(|l| &l.egress.hosts)
    {
        let posts = rule.methods.as_ref().is_none_or(|list| list.iter().any(|method| method == "POST"));
        let exact =
            rule.name.contains(|c: char| c.is_ascii_alphabetic()) && !rule.name.starts_with(['.', '[']);
        let name = rule.name.trim_end_matches('.').to_ascii_lowercase();
        if posts && exact && rule.ports.contains(&443) && !hosts.contains(&name) {
            hosts.push(name);
        }
    }
    hosts.truncate(GIT_HOSTS_MAX);
    hosts
}

/// Adds settings behind those that git is given by variables already.
fn add_git_settings(env: &mut BTreeMap<String, String>, settings: &[(String, String)]) {
    let there = env.get("GIT_CONFIG_COUNT").and_then(|count| count.parse::<usize>().ok()).unwrap_or(0);
    if settings.is_empty() || there > 1000 {
        return;
    }
    for (at, (key, value)) in settings.iter().enumerate() {
        env.insert(format!("GIT_CONFIG_KEY_{}", there + at), key.clone());
        env.insert(format!("GIT_CONFIG_VALUE_{}", there + at), value.clone());
    }
    env.insert("GIT_CONFIG_COUNT".to_owned(), (there + settings.len()).to_string());
}

/// Where the policy upgrades Maven's central repository, in each step of the job that reaches it.
fn asks_maven_in_plain_text(plan: &Plan) -> bool {
    let Ok(central) = Host::parse(MAVEN_CENTRAL) else { return false };
    let setup = plan.for_setup(None);
    let upgraded = |plan: &Plan| is_upgraded(&plan.layers, &central, 80);
    let reaches = |plan: &Plan| plan.has_egress() && upgraded(plan);
    let steps = [plan, &setup];
    steps.into_iter().any(reaches) && steps.into_iter().all(|step| !step.has_egress() || upgraded(step))
}

/// Files below HOME of a new cell, for tools that no variable tells: pnpm up to 10 puts its store into the workspace
/// otherwise, and Maven 4 looks at no system property for a proxy.
pub fn home_files(plan: &Plan) -> Vec<(&'static str, String)> {
    let mut files = vec![(".config/pnpm/rc", format!("store-dir={HOME}/{PNPM_STORE}\n"))];
    if plan.cell_has_egress() {
        let port = way_out::EGRESS_PORT;
        let proxies: String = ["http", "https"]
            .iter()
            .map(|scheme| {
                format!(
                    "    <proxy><id>hotcell-{scheme}</id><active>true</active><protocol>{scheme}</protocol>\
                     <host>127.0.0.1</host><port>{port}</port><nonProxyHosts>localhost|127.*</nonProxyHosts></proxy>\n"
                )
            })
            .collect();
        let mirrors = if asks_maven_in_plain_text(plan) { MAVEN_MIRROR } else { "" };
        let text = format!("<settings>\n  <proxies>\n{proxies}  </proxies>\n{mirrors}</settings>\n");
        files.push((".m2/settings.xml", text));
    }
    files
}

/// What the agent is told of its cell.
pub fn words(plan: &Plan) -> String {
    let network = if plan.has_egress() {
        format!(
            "Of the network only this can be reached, through the proxy that the environment names: {}. A refused host \
             is told with the line of the policy that would open it: pass that on.",
            opened(plan)
        )
    } else {
        "Nothing of the network can be reached: what is not there cannot be downloaded.".to_owned()
    };
    format!(
        "You are in a cell: a container of your own with a read-only root and no root user. HOME, /tmp and, where it is \
         not read-only, the workspace can be written; package caches and installed tools lie below HOME. {network} \
         There is no Docker here, so `docker`, compose and testcontainers do not work: services that tests need \
         must be in the image and started by setup commands. Where a program or service is missing, say so and name the \
         image or setup command that would bring it."
    )
}

/// Names of the sets and hosts that all layers have, the policy's order.
fn opened(plan: &Plan) -> String {
    let (mut sets, mut hosts) = (Vec::new(), Vec::new());
    let Some((policy, others)) = plan.layers.split_first() else { return String::new() };
    for rule in &policy.egress.hosts {
        if others.iter().any(|layer| !layer.egress.meets(rule)) {
            continue;
        }
        let (list, name) = match &rule.set {
            Some(set) => (&mut sets, set.as_str()),
            None if rule.name == "*" => (&mut hosts, "any host"),
            None => (&mut hosts, rule.name.as_str()),
        };
        if !list.contains(&name) {
            list.push(name);
        }
    }
    let told = |what: &str, list: &[&str]| {
        let more = list.len().saturating_sub(NAMES_TOLD_MAX);
        let names = list.iter().take(NAMES_TOLD_MAX).copied().collect::<Vec<_>>().join(", ");
        let more = if more > 0 { format!(" and {more} more") } else { String::new() };
        (!list.is_empty()).then(|| format!("{what}{names}{more}"))
    };
    let parts = [told("package registries and hosts of the sets ", &sets), told("the hosts ", &hosts)];
    parts.into_iter().flatten().collect::<Vec<_>>().join("; ")
}

#[cfg(test)]
mod tests;
