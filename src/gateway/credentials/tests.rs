//! Credentials: sources, expiry, who may use them, and that none is ever printed.

use super::*;

fn permit() -> Permit {
    let plan = super::super::tests::plan(vec!["*".into()]);
    crate::policy::decide(&plan, crate::policy::Ask::Model { name: "m" }).unwrap()
}

fn me() -> Identity {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    Identity { uid, gid, groups: vec![4_000_123] }
}

fn spec(kind: CredentialKind, source: CredentialSource) -> CredentialSpec {
    let (users, groups) = (Vec::new(), Vec::new());
    CredentialSpec { name: "c".into(), kind, source, refresh: REFRESH, users, groups, required: true }
}

async fn open(spec: CredentialSpec) -> Result<Credentials, CredentialError> {
    Credentials::open(vec![spec]).await.map_err(|(_, error)| error)
}

async fn value(credentials: &Credentials) -> Result<String, CredentialError> {
    let injected = credentials.header("c", &permit(), &me()).await?;
    assert!(injected.secrets.are_in(injected.value.as_bytes()), "the censor knows what went out");
    Ok(format!("{}: {}", injected.name, injected.value.to_str().unwrap()))
}

fn sh(script: &str) -> CredentialSource {
    CredentialSource::Command(["/bin/sh", "-c", script].map(str::to_owned).into())
}

#[tokio::test]
async fn a_reload_reads_files_and_commands_again_and_keeps_what_it_cannot_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    std::fs::write(&path, "canary-1").unwrap();
    let file = open(spec(CredentialKind::ApiKey, CredentialSource::File(path.clone()))).await.unwrap();
    assert_eq!(value(&file).await.unwrap(), "x-api-key: canary-1");
    std::fs::write(&path, "canary-2").unwrap();
    assert_eq!(value(&file).await.unwrap(), "x-api-key: canary-1", "not due yet");
    assert!(file.reload().await.is_empty());
    assert_eq!(value(&file).await.unwrap(), "x-api-key: canary-2");
    std::fs::write(&path, "canary-3\ncanary-4").unwrap();
    let wrong = file.reload().await;
    assert!(wrong.len() == 1 && wrong[0].contains("key") && !wrong[0].contains("canary"), "{wrong:?}");
    assert_eq!(value(&file).await.unwrap(), "x-api-key: canary-2");
    std::fs::remove_file(&path).unwrap();
    assert_eq!(file.reload().await.len(), 1);
    assert_eq!(value(&file).await.unwrap(), "x-api-key: canary-2");
}

#[tokio::test]
async fn it_is_read_from_file_and_command_and_never_printed() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    std::fs::write(&path, "canary-1\n").unwrap();
    let credentials = open(spec(CredentialKind::ApiKey, CredentialSource::File(path))).await.unwrap();
    assert_eq!(value(&credentials).await.unwrap(), "x-api-key: canary-1");
    let injected = credentials.header("c", &permit(), &me()).await.unwrap();
    assert!(!format!("{credentials:?} {injected:?}").contains("canary"));
    credentials.doubt("c", &me()).await;

    let command = CredentialSource::Command(vec!["echo".into(), "canary-2".into()]);
    assert!(!format!("{command:?}").contains("canary"));
    for (kind, wanted) in [
        (CredentialKind::Bearer, "authorization: Bearer canary-2"),
        (CredentialKind::Basic { username: "x".into() }, "authorization: Basic eDpjYW5hcnktMg=="),
        (
            CredentialKind::Header { name: "private-token".into(), prefix: "tok ".into() },
            "private-token: tok canary-2",
        ),
    ] {
        assert_eq!(value(&open(spec(kind, command.clone())).await.unwrap()).await.unwrap(), wanted);
    }
}

#[tokio::test]
async fn what_is_no_credential_is_an_error_that_names_the_source() {
    let of = |source| async {
        match open(spec(CredentialKind::ApiKey, source)).await {
            Ok(credentials) => value(&credentials).await.unwrap_err().to_string(),
            Err(error) => error.to_string(),
        }
    };
    assert!(of(CredentialSource::Env("HOTCELL_NO_SUCH_KEY".into())).await.contains("HOTCELL_NO_SUCH_KEY"));
    assert!(of(CredentialSource::File("/nonexistent/key".into())).await.contains("/nonexistent/key"));
    assert!(of(CredentialSource::Command(vec!["false".into()])).await.contains("failed"));
    assert!(of(CredentialSource::Command(vec!["printf".into(), "a\nb".into()])).await.contains("API key"));
    assert!(of(CredentialSource::Command(vec!["/nonexistent/x".into()])).await.contains("cannot run"));
}

#[tokio::test]
async fn a_subscriptions_token_is_refused_from_every_source_with_the_reason() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    std::fs::write(&path, "sk-ant-oat01-canary\n").unwrap();
    for source in [
        CredentialSource::File(path),
        sh("echo sk-ant-oat01-canary"),
        sh(r#"echo '{"token":"sk-ant-oat01-canary"}'"#),
    ] {
        for kind in [CredentialKind::ApiKey, CredentialKind::Bearer] {
            let error = match open(spec(kind, source.clone())).await {
                Ok(credentials) => value(&credentials).await.unwrap_err(),
                Err(error) => error,
            };
            let words = format!("{error} {error:?}");
            assert!(words.contains("subscription") && !words.contains("canary"), "{words}");
        }
    }
}

#[tokio::test]
async fn an_expired_one_is_read_again_and_many_ask_once() {
    let dir = tempfile::tempdir().unwrap();
    // A moment ahead: renewed at half its life, a second at the least.
    let script = format!(
        "echo x >>{0}/runs; printf '{{\"token\":\"t%s\",\"expires_at\":\"%s\"}}' $(wc -l <{0}/runs) \
         $(date -u -d '+3 seconds' +%Y-%m-%dT%H:%M:%SZ)",
        dir.path().display()
    );
    let credentials = Arc::new(open(spec(CredentialKind::Bearer, sh(&script))).await.unwrap());
    let mut asks = tokio::task::JoinSet::new();
    for _ in 0..40 {
        let credentials = Arc::clone(&credentials);
        asks.spawn(async move { value(&credentials).await.unwrap() });
    }
    assert!(asks.join_all().await.iter().all(|value| value == "authorization: Bearer t1"));
    let until = Instant::now() + Duration::from_secs(10);
    while value(&credentials).await.unwrap() == "authorization: Bearer t1" {
        assert!(Instant::now() < until, "it is never read again");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let runs = std::fs::read_to_string(dir.path().join("runs")).unwrap();
    assert_eq!(runs.lines().count(), 2);
}

#[tokio::test]
async fn a_value_that_cannot_be_read_again_serves_on_until_it_expires() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    let now = jiff::Timestamp::now();
    let soon = now.checked_add(jiff::SignedDuration::from_millis(2_500)).unwrap();
    std::fs::write(&path, format!("{{\"token\":\"abcdef\",\"expires_at\":\"{soon}\"}}")).unwrap();
    let credentials = open(spec(CredentialKind::Bearer, CredentialSource::File(path.clone()))).await.unwrap();
    std::fs::remove_file(&path).unwrap();
    let until = Instant::now() + Duration::from_secs(10);
    let error = loop {
        let early = clock::wall_ms() < u64::try_from(soon.as_millisecond()).unwrap();
        match value(&credentials).await {
            Ok(_) => {}
            Err(error) => {
                assert!(!early, "{error}");
                break error;
            }
        }
        // The retry after a failure comes after 15 s: this one is made due.
        if let Some(current) = credentials.0["c"].slot(&me()).lock().await.as_mut() {
            current.fresh_until = Instant::now();
        }
        assert!(Instant::now() < until, "it serves for ever");
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    assert!(matches!(error, CredentialError::File { .. }), "{error}");
}

#[tokio::test]
async fn only_listed_users_and_groups_may_use_it() {
    let source = || CredentialSource::Command(vec!["echo".into(), "abcdef".into()]);
    let allowed = |users: Vec<Principal>, groups: Vec<Principal>| async move {
        let spec = CredentialSpec { users, groups, ..spec(CredentialKind::ApiKey, source()) };
        let credentials = open(spec).await?;
        credentials.may_use("c", &me())?;
        value(&credentials).await
    };
    let (id, name) = (Principal::Id, |name: &str| Principal::Name(name.to_owned()));
    assert!(allowed(vec![id(me().uid)], vec![]).await.is_ok());
    assert!(allowed(vec![], vec![id(4_000_123)]).await.is_ok());
    let other = allowed(vec![id(4_000_000)], vec![]).await;
    assert!(matches!(other, Err(CredentialError::NotAllowed { .. })), "{other:?}");
    assert!(matches!(
        allowed(vec![name("daemon")], vec![name("daemon")]).await,
        Err(CredentialError::NotAllowed { .. })
    ));
    let error = allowed(vec![name("no-such-user")], vec![]).await.unwrap_err().to_string();
    assert!(error.contains("no-such-user"), "{error}");
    let none = open(spec(CredentialKind::ApiKey, source())).await.unwrap();
    assert!(matches!(none.may_use("d", &me()), Err(CredentialError::Unknown(_))));
}

#[tokio::test]
async fn a_command_runs_as_the_user_and_serves_that_user_only() {
    if !rustix::process::geteuid().is_root() {
        // Another user's program needs root: then it must be refused, not run as us.
        let credentials = open(spec(CredentialKind::ApiKey, sh("id -u"))).await.unwrap();
        let other = Identity { uid: 12_345, ..me() };
        let error = credentials.header("c", &permit(), &other).await.unwrap_err();
        assert!(matches!(error, CredentialError::Run(RunError::NotRoot { .. })), "{error}");
        return;
    }
    let credentials = open(spec(CredentialKind::ApiKey, sh("echo uid-$(id -u)"))).await.unwrap();
    for uid in [12_345, 12_346, 12_345] {
        let who = Identity { uid, gid: uid, groups: Vec::new() };
        let injected = credentials.header("c", &permit(), &who).await.unwrap();
        assert_eq!(injected.value, format!("uid-{uid}"));
    }
}

#[tokio::test]
async fn keys_of_aws_sign_and_fit_into_no_header() {
    let script = r#"echo '{"Version":1,"AccessKeyId":"AKIDcanary","SecretAccessKey":"canary"}'"#;
    let credentials = open(spec(CredentialKind::Aws, sh(script))).await.unwrap();
    let attached = credentials.attachment("c", &permit(), &me()).await.unwrap();
    assert!(matches!(&attached, Attachment::Sign(keys) if keys.access_key_id == "AKIDcanary"));
    let error = credentials.header("c", &permit(), &me()).await.unwrap_err();
    assert!(matches!(error, CredentialError::NoHeader(_)), "{error}");
}
