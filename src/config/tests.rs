//! The configuration: what wins over what, and what its errors say.

use super::raw::RawConfig;
use super::*;
use crate::gateway::CredentialSource;

fn machine(vars: &[(&str, &str)], root: bool) -> Machine {
    let mut all: BTreeMap<String, String> = [("HOME".into(), "/home/ann".into())].into();
    all.extend(vars.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())));
    Machine { vars: all, root, cores: 6, exe_dir: Some("/opt/hotcell/bin".into()) }
}

fn flags(config: Option<&Path>, values: &[(&'static str, &str)]) -> Flags {
    Flags {
        config: config.map(Path::to_owned),
        values: values.iter().map(|(k, v)| (*k, (*v).to_owned())).collect(),
    }
}

fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().expect("dir");
    let path = dir.path().join("config.toml");
    std::fs::write(&path, text).expect("write");
    (dir, path)
}

fn error_of(text: &str, vars: &[(&str, &str)], values: &[(&'static str, &str)]) -> String {
    let (dir, path) = file(text);
    let error =
        Config::load(&flags(Some(&path), values), &machine(vars, false)).expect_err("must be refused");
    error.to_string().replace(&*dir.path().to_string_lossy(), "DIR")
}

#[test]
fn without_a_file_there_is_a_default_for_everything() {
    let config = Config::load(&Flags::default(), &machine(&[], false)).expect("config");
    insta::assert_debug_snapshot!("defaults_user", config);
    let vars = [("XDG_STATE_HOME", "/xs"), ("XDG_RUNTIME_DIR", "/run/user/7"), ("XDG_CONFIG_HOME", "/xc")];
    let config = Config::load(&Flags::default(), &machine(&vars, false)).expect("config");
    assert_eq!(config.state_dir, Path::new("/xs/hotcell"));
    assert_eq!(config.socket, Path::new("/run/user/7/hotcell.sock"));
    assert_eq!(config.policy_dirs, [Path::new("/xc/hotcell/policies")]);
}

#[test]
fn flags_win_over_variables_over_the_file_over_defaults() {
    let (_dir, path) = file("log = \"warn\"\nengine = \"/file.sock\"\n[limits]\nslots = 2\ndrain_s = 5\n");
    let vars = [("HOTCELL_LIMITS_SLOTS", "3"), ("HOTCELL_ENGINE", "unix:///env.sock"), ("HOTCELL_LOG", "")];
    let flags = flags(Some(&path), &[("limits.slots", "4")]);
    let config = Config::load(&flags, &machine(&vars, false)).expect("config");
    assert_eq!((config.limits.slots, config.limits.drain_s, config.limits.cancel_grace_s), (4, 5, 10));
    assert_eq!(config.engine.as_deref(), Some("unix:///env.sock"));
    assert_eq!(config.log, "warn", "an empty variable is none");
    assert_eq!(config.file, Some(path));
}

#[test]
fn a_mistake_in_the_file_is_named_with_file_line_and_key() {
    let error = error_of("log = \"info\"\n\n[limits]\nslotz = 4\n", &[], &[]);
    assert!(error.contains("DIR/config.toml") && error.contains("line 4"), "{error}");
    assert!(error.contains("slotz") && error.contains("slots"), "{error}");
}

#[test]
fn a_wrong_value_names_its_origin_and_all_three_places() {
    assert_eq!(
        error_of("\n[limits]\nslots = 0\n", &[], &[]),
        "limits.slots: \"0\" is not a whole number from 1 to 4096, from DIR/config.toml, line 3 \
         (set it with limits.slots in DIR/config.toml, HOTCELL_LIMITS_SLOTS or --limits-slots)"
    );
    let error = error_of("", &[("HOTCELL_LIMITS_SLOTS", "many")], &[]);
    assert!(error.contains("\"many\"") && error.contains("from HOTCELL_LIMITS_SLOTS ("), "{error}");
    let error = error_of("", &[("HOTCELL_LIMITS_SLOTS", "3")], &[("limits.slots", "-1")]);
    assert!(error.contains("from --limits-slots ("), "{error}");
}

#[test]
fn values_outside_their_form_are_refused() {
    for (key, value) in [
        ("state_dir", "relative/dir"),
        ("socket_mode", "0999"),
        ("socket_group", "no such group"),
        ("engine", "tcp://10.0.0.1:2375"),
        ("metrics", "localhost"),
        ("provider.anthropic.base_url", "api.anthropic.com"),
        ("provider.anthropic.base_url", "https://"),
        ("provider.anthropic.api_key_env", "sk-ant-secret value"),
        ("policy_dirs", "/a:b"),
        ("admin_uids", "0,root"),
        ("defaults.model", "--help"),
        ("log", "hotcell=loud"),
    ] {
        let error = error_of("", &[], &[(key, value)]);
        assert!(error.starts_with(&format!("{key}: ")), "{key}={value}: {error}");
    }
    let long = format!("/{}", "x".repeat(107));
    assert!(error_of("", &[], &[("socket", &long)]).contains("at most 107"));
}

#[test]
fn what_could_be_a_secret_is_not_repeated_in_an_error() {
    let error = error_of("", &[], &[("provider.anthropic.api_key_env", "sk-ant-0123")]);
    assert!(!error.contains("0123"), "{error}");
    let error = error_of("", &[], &[("provider.anthropic.base_url", "https://me:pass0123@host")]);
    assert!(!error.contains("0123"), "{error}");
}

#[test]
fn the_highest_layer_that_names_a_key_decides_and_names_exactly_one() {
    let text = "[provider.anthropic]\napi_key_file = \"/k\"\n";
    let (_dir, path) = file(text);
    let load = |vars: &[(&str, &str)]| {
        let config = Config::load(&flags(Some(&path), &[]), &machine(vars, false)).expect("config");
        config.gateway.credentials[0].source.clone()
    };
    assert_eq!(load(&[]), CredentialSource::File("/k".into()));
    let env = [("HOTCELL_PROVIDER_ANTHROPIC_API_KEY_COMMAND", "pass show key")];
    let command = ["/bin/sh", "-c", "pass show key"].map(str::to_owned);
    assert_eq!(load(&env), CredentialSource::Command(command.into()));
    let error = error_of("[provider.anthropic]\napi_key_file = \"/k\"\napi_key_env = \"K\"\n", &[], &[]);
    assert!(error.contains("exactly one"), "{error}");
}

#[test]
fn metrics_listen_on_the_loopback_unless_an_address_is_given() {
    for (text, wanted) in [
        ("9100", "127.0.0.1:9100"),
        (":9100", "127.0.0.1:9100"),
        ("0.0.0.0:9100", "0.0.0.0:9100"),
        ("[::1]:1", "[::1]:1"),
    ] {
        assert_eq!(parse_metrics(text).map(|a| a.to_string()), Ok(wanted.to_owned()));
    }
}

#[test]
fn a_named_file_must_exist_and_the_usual_one_need_not() {
    let absent = Path::new("/nonexistent/config.toml");
    let error = Config::load(&flags(Some(absent), &[]), &machine(&[], false)).expect_err("absent");
    assert!(matches!(error, ConfigError::Read { .. }), "{error}");
    let vars = [("HOTCELL_CONFIG", "/nonexistent/config.toml")];
    assert!(Config::load(&Flags::default(), &machine(&vars, false)).is_err());
}

#[test]
fn a_client_that_is_told_its_socket_reads_no_file() {
    let absent = Path::new("/nonexistent/config.toml");
    let named = flags(Some(absent), &[("socket", "/s.sock")]);
    assert_eq!(client_socket(&named, &machine(&[], false)).expect("socket"), Path::new("/s.sock"));
    let (_dir, path) = file("socket = \"/file.sock\"");
    let found = client_socket(&flags(Some(&path), &[]), &machine(&[], false)).expect("socket");
    assert_eq!(found, Path::new("/file.sock"));
}

#[test]
fn without_a_home_the_error_says_what_to_set() {
    let bare = Machine { cores: 1, exe_dir: Some("/b".into()), ..Machine::default() };
    let error = Config::load(&Flags::default(), &bare).expect_err("no home").to_string();
    assert!(error.contains("HOTCELL_STATE_DIR") && error.contains("--state-dir"), "{error}");
}

#[test]
fn the_table_of_settings_and_the_file_have_the_same_keys() {
    let mut text = String::new();
    let value = |key: &str| match key {
        "policy_dirs" => "[\"/p\"]",
        "admin_uids" => "[0]",
        "network.no_proxy" => "[\"h\"]",
        "socket_mode" => "\"0600\"",
        "metrics" => "\"1\"",
        "provider.anthropic.base_url" => "\"http://h\"",
        "log" => "\"info\"",
        "budgets.day_usd" => "1.5",
        _ if key.starts_with("limits.") || key.starts_with("cache.") => "2000000",
        _ if key.starts_with("retention.") => "2000",
        _ => "\"/x\"",
    };
    for setting in &SETTINGS {
        text += &format!("{} = {}\n", setting.key, value(setting.key));
    }
    let raw: Result<RawConfig, _> = toml::from_str(&text);
    assert!(raw.is_ok(), "{raw:?}");
    // A key of the file that the table lacks would have neither a flag nor a variable.
    let unknown = toml::from_str::<RawConfig>("zzz = 1").expect_err("unknown").to_string();
    // Entries, of which there are several, stand in the file only.
    let several = |key: &&str| ["access", "credential", "egress_set", "notify"].contains(key);
    for key in unknown.split('`').skip(3).step_by(2).filter(|key| !several(key)) {
        assert!(SETTINGS.iter().any(|s| s.key.split('.').next() == Some(key)), "{key}");
    }
}

#[test]
fn a_set_of_hosts_is_read_and_a_mistake_in_one_is_named() {
    let read = |text: &str| {
        let dir = tempfile::tempdir().expect("dir");
        let file = dir.path().join("config.toml");
        std::fs::write(&file, format!("\n{text}")).expect("write");
        let flags = Flags { config: Some(file), ..Flags::default() };
        let words = |error: ConfigError| error.to_string().replace(&dir.path().display().to_string(), "DIR");
        (
            egress_sets(&flags, &machine(&[], false)).map_err(words),
            Config::load(&flags, &machine(&[], false)).map(|config| config.egress_sets),
        )
    };
    let host = "[[egress_set.npm.host]]\nname = 'npm.corp.example'\n";
    let (sets, config) = read(&format!("{host}inspect = true\ncredential = 'corp'"));
    let sets = sets.expect("sets");
    assert_eq!(sets.get("npm").expect("npm").hosts[0].name, "npm.corp.example");
    assert!(sets.get("pypi").is_some());
    assert_eq!(config.expect("config"), sets);
    let error = read(&format!("{host}paths = ['/x']")).0.expect_err("no inspect");
    assert!(
        error.starts_with("DIR/config.toml, line 2: egress_set.npm.host[0].paths: needs inspect"),
        "{error}"
    );
    let error = read(&format!("{host}port = 1")).0.expect_err("no such key");
    assert!(error.contains("unknown field `port`"), "{error}");
    let error = read("[[egress_set.Big.host]]\nname = 'a.example'").0.expect_err("name");
    assert!(error.contains("egress_set.Big: is not the name of a set"), "{error}");
}
