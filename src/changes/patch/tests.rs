//! Patches, applied by plain git.

use super::*;
use crate::change::{Special, Verdict};
use crate::changes::testing::{between, entry, file, set, shelf, tree};
use crate::git::testing::Place;

fn wanted(form: Form) -> Render<'static> {
    let temporary = Path::new("/var/tmp");
    Render {
        form,
        only: &[],
        include: Include::All,
        colour: false,
        width: 80,
        bytes_max: 64 << 20,
        temporary,
    }
}

fn text(shelf: &JobShelf, changes: &ChangeSet, form: Form) -> String {
    String::from_utf8_lossy(&render(shelf, changes, &wanted(form)).expect("rendered").bytes).into_owned()
}

/// Every kind of change that a patch can carry.
const EDITS: &str = r#"
printf 'one\nTWO\nthree\n' > a.txt
git mv -f moved.txt renamed.txt 2>/dev/null || mv moved.txt renamed.txt
rm dir/gone.txt
chmod +x script
ln -sfn elsewhere link
rm was-file; mkdir was-file; echo inner > was-file/inner
rm -r was-dir; echo file > was-dir
head -c 70000 /dev/urandom > binary
: > empty
printf 'no newline' > "odd
name	\"quoted\" \\ und ü"
printf 'x' > "$(printf 'latin\351')"
rm was-link; echo now a file > was-link
mkdir -p "new dir/deep"; echo x > "new dir/deep/ file "
printf '* filter=x diff=x text eol=crlf\n' > .gitattributes
printf 'a\r\nb\r\n' > crlf
"#;
const START: &str = r#"
seq 1 50 > moved.txt; echo gone > dir/gone.txt; echo '#!/bin/sh' > script; ln -s nowhere link
echo file > was-file; mkdir was-dir; echo 1 > was-dir/1; echo 2 > was-dir/2; ln -s x was-link
head -c 50000 /dev/urandom > binary; printf 'old' > crlf
"#;

#[test]
fn plain_git_apply_of_the_patch_gives_what_the_agent_left() {
    let place = Place::new();
    let (path, _) = place.repository("r");
    place.sh(&path, START);
    place.sh(&path, "cp -a . ../after; cd ../after; rm -r .git");
    place.sh(&place.path("after"), EDITS);
    let (_dir, shelf) = shelf();
    let changes = set(between(&shelf, &path, &place.path("after")), None);
    let patch = render(&shelf, &changes, &wanted(Form::Patch)).expect("rendered");
    assert!(patch.notes.is_empty(), "{:?}", patch.notes);
    std::fs::write(place.path("p"), &patch.bytes).expect("written");
    place.git(&path, &["apply", "../p"]);
    assert_eq!(tree(&shelf, &path), tree(&shelf, &place.path("after")));
    let text = String::from_utf8_lossy(&patch.bytes);
    assert!(text.contains("rename from moved.txt") && text.contains("GIT binary patch"), "{text}");
}

#[test]
fn what_a_patch_cannot_say_is_said_beside_it() {
    let place = Place::new();
    let (path, _) = place.repository("r");
    let (_dir, shelf) = shelf();
    let dir = |mode| Some(crate::change::Node::Dir { mode });
    let unknown = Some(crate::change::Node::File { mode: 0o644, bytes: 3, blob: None });
    let mut refused = entry(".git/hooks/x", None, Some(file(&shelf, b"#!/bin/sh\n", 0o755)));
    refused.verdict = Verdict::Refused;
    let new = |content: &[u8]| Some(file(&shelf, content, 0o644));
    let changes = set(
        vec![
            entry("empty", None, dir(0o755)),
            entry("dir", dir(0o755), dir(0o700)),
            entry("fifo", None, Some(crate::change::Node::Special { what: Special::Fifo })),
            entry("a.txt", unknown, new(b"mine\n")),
            entry("private", new(b"p"), Some(file(&shelf, b"p", 0o600))),
            entry("new\n+++ b/evil", None, new(b"new\n")),
            refused,
        ],
        None,
    );
    let patch = text(&shelf, &changes, Form::Patch);
    for word in
        ["empty directories", "permissions beyond", ": fifo", ": a.txt", "#  +#!/bin/sh", "inside of .git"]
    {
        assert!(patch.contains(word), "{word} in {patch}");
    }
    std::fs::write(place.path("p"), &patch).expect("written");
    place.git(&path, &["apply", "../p"]);
    place.sh(
        &path,
        "test \"$(find . -name evil -printf x | wc -c)\" = 1; test ! -e .git/hooks/x; test ! -e fifo; test ! -e empty",
    );
    let stat = text(&shelf, &changes, Form::Stat);
    assert!(stat.contains(" a.txt | not shown") && stat.contains(".git/hooks/x"), "{stat}");
    let names = text(&shelf, &changes, Form::NameStatus);
    assert!(names.contains("A\t\"new\\n+++ b/evil\"") && names.contains("M\tdir\n"), "{names}");
    let plain = Render { include: Include::Plain, ..wanted(Form::NameOnly) };
    let plain = render(&shelf, &changes, &plain).expect("rendered").bytes;
    assert!(!String::from_utf8_lossy(&plain).contains("hooks"));
}

#[test]
fn forms_patterns_colours_and_limits() {
    let (_dir, shelf) = shelf();
    let new = |content: &[u8]| Some(file(&shelf, content, 0o644));
    let changes = set(vec![entry("src/a.rs", None, new(b"1\n2\n")), entry("b", new(b"x\n"), None)], None);
    assert_eq!(text(&shelf, &changes, Form::NumStat), "0\t1\tb\n2\t0\tsrc/a.rs\n");
    assert!(text(&shelf, &changes, Form::Stat).contains("2 files changed, 2 insertions(+), 1 deletion(-)"));
    let patterns = ["*.rs".to_owned()];
    let only = Render { only: &patterns, colour: true, ..wanted(Form::Patch) };
    let bytes = render(&shelf, &changes, &only).expect("rendered").bytes;
    let coloured = String::from_utf8_lossy(&bytes).into_owned();
    assert!(coloured.contains("\u{1b}[32m") && !coloured.contains("a/b"), "{coloured}");
    let short = render(&shelf, &changes, &Render { bytes_max: 20, ..wanted(Form::Patch) });
    assert!(matches!(short, Err(RenderError::TooLong { bytes_max: 20 })), "{short:?}");
    assert_eq!(text(&shelf, &set(Vec::new(), None), Form::Patch), "");
    std::fs::remove_dir_all(shelf.dir().join("blobs")).expect("removed");
    let lost = render(&shelf, &changes, &wanted(Form::Patch));
    assert!(matches!(lost, Err(RenderError::Git(GitError::Stream { doing: "feed", .. }))), "{lost:?}");
}
