//! Configurations with odd syntax and with credentials.

use super::*;

fn clean(text: &str) -> String {
    let masked = masked(text);
    assert_eq!(masked.text.matches('\n').count(), text.matches('\n').count(), "lines stay: {masked:?}");
    // What is left says the same to git, and masking it again finds nothing.
    assert!(read(&masked.text).is_some(), "{masked:?}");
    let again = super::masked(&masked.text);
    assert_eq!(again.text, masked.text);
    assert!(again.what.is_empty(), "{again:?}");
    masked.text
}

#[test]
fn a_configuration_without_credentials_stays_as_it_is() {
    let text = "[core]\n\trepositoryformatversion = 0\n\tbare = false\n[remote \"origin\"]\n\turl = git@host:me/it.git\n\
                \tfetch = +refs/heads/*:refs/remotes/origin/*\n[branch \"ma\\\"in\"]\n\tremote = origin\r\n\
                [alias] st = status\n[remote \"ssh\"]\n url = ssh://git@host/x\n[a]b\n";
    assert_eq!(masked(text), Masked { text: text.to_owned(), what: Vec::new() });
}

#[test]
fn users_and_passwords_go_from_every_address() {
    for (before, after) in [
        ("https://me:pw@host/x.git", "https://host/x.git"),
        ("https://TOKEN@host/x.git", "https://host/x.git"),
        ("HTTPS://me:p@w@host:8443/x@1", "HTTPS://host:8443/x@1"),
        ("https://me:p/w@host/x", "https://host/x"),
        ("ssh://me:pw@host/x", "ssh://me@host/x"),
        ("git+ssh://me:pw@host/x", "git+ssh://me@host/x"),
        ("git@host:path", "git@host:path"),
        ("https://host:8443/a@b", "https://host:8443/a@b"),
        ("ext::cmd https://u:p@host/ %S http://a:b@c", "ext::cmd https://host/ %S http://c"),
        ("https://x/https://u:p@host/", "https://x/https://host/"),
        ("://@", "://@"),
    ] {
        assert_eq!(without_userinfo(before), after, "{before}");
    }
}

#[test]
fn credentials_are_found_however_they_are_written() {
    let text = r#"# https://me:sesame@host in a comment
[Remote "origin"] URL = "https://me:ses\
ame@host/x.git" ; sesame
	pushurl = https://me:sesame@host/x # sesame
[url "https://me:sesame@host/"]
	insteadOf = https://host/
[http "https://host/"]
	extraHeader = "AUTHORIZATION: basic sesame"
	EXTRAHEADER = X: sesame
	cookieFile = /home/me/sesame
	proxy = http://me:sesame@proxy:3128
	sslKey = /home/me/sesame
[http.https://x]
[credential]
	helper = "!f() { echo password=sesame; }; f"
[credential "https://host"] username = sesame
[include]
	path = ~/sesame
[includeIf "gitdir:~/sesame/"]
	path = sesame
"#;
    let masked = masked(text);
    assert!(!masked.text.contains("sesame"), "{}", masked.text);
    assert!(
        masked.what.contains(&"what git cannot parse".to_owned()),
        "the section with a colon: {masked:?}"
    );
    let text = text.replace("[http.https://x]\n", "");
    let left = clean(&text);
    assert!(!left.contains("sesame"), "{left}");
    let what = super::masked(&text).what;
    for name in ["remote.origin.url", "remote.origin.pushurl", "url.https://host/", "credential", "include"] {
        assert!(what.iter().any(|w| w == name), "{name} in {what:?}");
    }
    let variables = read(&left).expect("parses");
    let proxy = variables.iter().find(|v| v.key == "proxy").expect("kept");
    assert_eq!(proxy.value.as_deref(), Some("http://proxy:3128"));
    let url = variables.iter().find(|v| v.key == "url").expect("kept");
    assert_eq!(url.value.as_deref(), Some("https://host/x.git"));
}

#[test]
fn secrets_by_name_and_by_look_go() {
    let text = "[sendemail]\n smtpPass = x\n smtpServer = mail\n[imap]\n pass = x\n[github]\n token = x\n oauthtoken = x\n\
                [alias]\n up = !curl -H 'Authorization: Bearer x'\n pw = !sshpass -p x ssh\n\
                [hub]\n note = ghp_abc\n[filter \"x\"]\n clean = tool --password=x\n[user]\n name = Me\n";
    let left = clean(text);
    assert!(left.contains("smtpServer = mail") && left.contains("name = Me"), "{left}");
    assert_eq!(read(&left).expect("parses").len(), 2, "{left}");
}

#[test]
fn what_git_does_not_parse_is_not_handed_on() {
    for (text, kept) in [
        ("[a]\nb = \"open\nurl = https://u:p@h/\n", "[a]\n"),
        ("[a\nb = c\n", ""),
        ("b = c\n", ""),
        ("[a]\n1 = c\n", "[a]\n"),
        ("[a]\nb c\n", "[a]\n"),
        ("[a]\nb = \\x\n", "[a]\n"),
        ("[a \"b\" ]\n", ""),
        ("[]\n", ""),
    ] {
        let masked = masked(text);
        assert_eq!(masked.text, kept, "{text:?}");
        assert_eq!(masked.what, ["what git cannot parse"], "{text:?}");
        assert_eq!(read(text), None, "{text:?}");
    }
}

#[test]
fn variables_are_read_as_git_reads_them() {
    let text = "\u{feff}[Core]\r\n\tFileMode = true ; yes\r\n\tbare\n[Extensions] refStorage = \"ref\"table\n\
                [a \"B.c\\\\d\"] e = \" x \"  y\\t \\\n z  \n[x.Y] q = a;b\n";
    let all = read(text).expect("parses");
    let shown: Vec<String> = all
        .iter()
        .map(|v| format!("{}|{:?}|{}|{:?}", v.section, v.subsection.as_deref(), v.key, v.value.as_deref()))
        .collect();
    assert_eq!(
        shown,
        [
            "core|None|filemode|Some(\"true\")",
            "core|None|bare|None",
            "extensions|None|refstorage|Some(\"reftable\")",
            "a|Some(\"B.c\\\\d\")|e|Some(\" x   y\\t  z\")",
            "x.y|None|q|Some(\"a\")",
        ]
    );
}

proptest::proptest! {
    #[test]
    fn no_password_of_an_address_survives_any_surroundings(
        before in "[ -~\n\t]{0,40}", after in "[ -~\n\t]{0,40}", key in "[a-z]{1,8}", quote in proptest::bool::ANY,
    ) {
        let q = if quote { "\"" } else { "" };
        let text = format!("[remote \"o\"]\n{before}\n[remote \"p\"]\n{key} = {q}https://me:sesame@host/x{q}\n{after}\n");
        let masked = masked(&text);
        proptest::prop_assert!(!masked.text.contains("sesame"), "{:?}", masked.text);
    }
}
