//! Archives and bundles, read by tar and git.

use super::*;
use crate::changes::testing::{between, entry, file, set, shelf, tree};
use crate::git::identity::GitIdentity;
use crate::git::testing::Place;
use crate::job::JobId;

#[test]
fn an_archive_gives_what_the_agent_left() {
    let place = Place::new();
    place.sh(
        &place.path(""),
        "mkdir before after; echo gone > before/gone; cd after; printf x > \"$(printf 'o\\nd\\351')\"; \
         mkdir -p deep/empty; chmod 700 deep; echo s > run; chmod 4755 run; ln -s /etc/passwd abs; \
         d=$(printf '%0200d' 0); mkdir -p $d/$d; echo long > $d/$d/file",
    );
    let (_dir, shelf) = shelf();
    let mut entries = between(&shelf, &place.path("before"), &place.path("after"));
    entries.push(entry("fifo", None, Some(Node::Special { what: crate::change::Special::Fifo })));
    let changes = set(entries, None);
    let mut bytes = Vec::new();
    let notes = tar(&shelf, &changes, Include::All, &[], 1_700_000_000, &mut bytes).expect("written");
    assert!(notes.len() == 1 && notes[0].contains("fifo"), "{notes:?}");
    std::fs::write(place.path("t"), &bytes).expect("written");
    place.sh(&place.path(""), "mkdir out; cd out; tar -xpf ../t; cat .hotcell-deleted; rm .hotcell-deleted");
    place.sh(&place.path("after"), "chmod 755 run");
    assert_eq!(tree(&shelf, &place.path("out")), tree(&shelf, &place.path("after")));
}

#[test]
fn what_is_gone_is_named_beside_a_file_of_that_name() {
    let (_dir, shelf) = shelf();
    let new = || Some(file(&shelf, b"x", 0o644));
    let changes = set(vec![entry("a\nb", new(), None), entry(DELETED, None, new())], None);
    let mut bytes = Vec::new();
    tar(&shelf, &changes, Include::Plain, &[], 0, &mut bytes).expect("written");
    let mut archive = ::tar::Archive::new(&bytes[..]);
    let mut found = Vec::new();
    for member in archive.entries().expect("archive") {
        let mut member = member.expect("member");
        let mut text = String::new();
        member.read_to_string(&mut text).expect("read");
        found.push((member.path().expect("path").display().to_string(), text));
    }
    let wanted = [(DELETED, "x"), (".hotcell-deleted-1", "\"a\\nb\"\n")];
    assert_eq!(found, wanted.map(|(name, text)| (name.to_owned(), text.to_owned())));
}

#[test]
fn a_bundle_is_fetched_with_all_checks_on() {
    let place = Place::new();
    for (name, init) in [("r", &[][..]), ("long", &["--object-format=sha256"])] {
        let (path, commit) = place.repository_with(name, init);
        let (_dir, shelf) = shelf();
        let changes = set(vec![entry("new", None, Some(file(&shelf, b"new\n", 0o755)))], Some(&commit));
        let (job, author) = (JobId::new(1, 1), GitIdentity::new("Ann", "a@b", "ann", "box"));
        let temporary = crate::git::temporary();
        let wanted = Build {
            shelf: &shelf,
            changes: &changes,
            job: &job,
            path: &path,
            identity: &place.who,
            author: &author,
            message: Some("Do it"),
            include: Include::Plain,
            only: &[],
            now_s: 1_700_000_000,
            temporary: &temporary,
        };
        let mut bytes = Vec::new();
        assert!(bundle(&wanted, &mut bytes).expect("written").is_empty());
        std::fs::write(place.path("b"), &bytes).expect("written");
        place.git(&path, &["bundle", "verify", "-q", "../b"]);
        let refs = format!("refs/heads/hotcell/{job}:refs/heads/got");
        place.git(&path, &["-c", "fetch.fsckObjects=true", "fetch", "-q", "../b", &refs]);
        assert_eq!(place.git(&path, &["log", "-1", "--format=%s %P", "got"]), format!("Do it {commit}"));
        assert_eq!(place.git(&path, &["diff", "--name-only", "main", "got"]), "new");
    }
}
