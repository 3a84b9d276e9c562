//! Indexes that git wrote, and what git makes of what we write.

use proptest::prelude::*;

use super::super::testing::Place;
use super::*;

fn index_of(path: &std::path::Path) -> Vec<u8> {
    std::fs::read(path.join(".git/index")).expect("index")
}

#[test]
fn git_takes_what_lies_outside_for_not_checked_out_whatever_the_form() {
    let place = Place::new();
    for (name, init, versions) in
        [("sha1", &[][..], &["2", "3", "4"][..]), ("sha256", &["--object-format=sha256"], &["2", "4"])]
    {
        let (path, _) = place.repository_with(name, init);
        place.sh(&path, "mkdir -p dir/deep dirt; for n in 1 22 333 4444 55555 666666 7777777; do echo $n >$n; echo $n >dir/deep/$n; done; \
            echo x >dirt/x; echo u >'\u{fc} odd'; git add -A; git commit -qm second");
        let files = place.git(&path, &["ls-files", "-s"]);
        let format = if name == "sha1" { Format::Sha1 } else { Format::Sha256 };
        for version in versions {
            place.git(&path, &["update-index", "--index-version", version]);
            if *version == "3" {
                place.sh(&path, "echo later >dir/later; git add -N dir/later");
            }
            let marked = only_below(&index_of(&path), b"dir", format).expect("read");
            let other = path.join(".git/index.other");
            std::fs::write(&other, &marked).expect("written");
            let shown = place.path(&format!("{name}-{version}"));
            place.sh(
                &path,
                &format!(
                    "mkdir -p {0}; cp -r dir {0}/; cp -r .git {0}/.git; cp .git/index.other {0}/.git/index",
                    shown.display()
                ),
            );
            let listed = place.git(&shown, &["ls-files", "-s"]);
            assert!(listed.contains("a.txt") && (listed == files || *version == "3"), "{version}: {listed}");
            let status = place.git(&shown, &["status", "--porcelain"]);
            assert!(
                status.is_empty() || status == "A dir/later" || status == " A dir/later",
                "{version}: {status}"
            );
            let skipped = place.sh(&shown, "git ls-files -t | grep -c '^S' || true");
            assert_eq!(skipped, "10", "{version}");
            place.sh(
                &shown,
                "git fsck --strict && echo more >>dir/b.txt && git add dir/b.txt && git commit -qm third",
            );
            assert_eq!(place.git(&shown, &["show", "--name-only", "--format=", "HEAD"]).trim(), "dir/b.txt");
            if *version == "3" {
                place.git(&path, &["reset", "-q"]);
                place.sh(&path, "rm dir/later");
            }
        }
    }
}

#[test]
fn what_cannot_be_marked_is_refused_by_its_name() {
    let place = Place::new();
    let (path, _) = place.repository("split");
    place.git(&path, &["update-index", "--split-index"]);
    let error = only_below(&index_of(&path), b"dir", Format::Sha1).expect_err("split");
    assert!(error.contains("--no-split-index"), "{error}");
    assert!(only_below(b"DIRC", b"dir", Format::Sha1).is_err());
    assert!(only_below(&[b'x'; 100], b"dir", Format::Sha1).is_err());
}

#[test]
fn a_name_is_a_pattern_of_itself_only() {
    assert_eq!(pattern_of("a/b"), "/a/b/\n");
    assert_eq!(pattern_of("a*[b] c\\"), "/a\\*\\[b\\]\\ c\\\\/\n");
}

proptest! {
    #[test]
    fn garbage_does_not_panic(version in 0u8..6, count in 0u8..4, garbage in prop::collection::vec(any::<u8>(), 0..400)) {
        let head = [&b"DIRC\0\0\0"[..], &[version, 0, 0, 0, count], &garbage].concat();
        let _ = only_below(&head, b"dir", Format::Sha1);
    }
}
