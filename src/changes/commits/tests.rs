//! Bundles, good and forged.

use super::*;
use crate::changes::testing::shelf;
use crate::git::testing::Place;

struct Case {
    place: Place,
    path: std::path::PathBuf,
    base: String,
    _dir: tempfile::TempDir,
    shelf: JobShelf,
}

fn case() -> Case {
    let place = Place::new();
    let (path, base) = place.repository("r");
    let (dir, shelf) = shelf();
    place.sh(&path, "cp -a . ../cell");
    Case { place, path, base, _dir: dir, shelf }
}

impl Case {
    fn import(&self, bundle: &[u8], bytes_max: u64) -> Result<Option<Commits>, BundleError> {
        let limits = BundleLimits { bytes_max, ..BundleLimits::default() };
        let temporary = crate::git::temporary();
        let mut bundle = bundle;
        import_bundle(
            &mut bundle,
            &self.shelf,
            &self.path,
            &self.place.who,
            Some(&self.base),
            &temporary,
            &limits,
        )
    }

    /// What `script` leaves as HEAD, as a bundle.
    fn bundle(&self, script: &str) -> Vec<u8> {
        let cell = self.place.path("cell");
        self.place.sh(&cell, script);
        self.place.git(&cell, &["bundle", "create", "-q", "../b", "HEAD", &format!("^{}", self.base)]);
        std::fs::read(self.place.path("b")).expect("made")
    }

    fn blobs(&self) -> usize {
        std::fs::read_dir(self.shelf.dir().join("blobs")).expect("listed").count()
    }
}

#[test]
fn only_bundles_that_pass_are_kept() {
    let case = case();
    let good = case.bundle("echo 2 >> a.txt; git commit -qam two");
    let before = case.place.sh(&case.path, "find .git | sort");
    for (what, bytes) in [
        ("a cut one", good[..good.len() - 30].to_vec()),
        ("a changed one", [&good[..good.len() - 40], &[b'x'; 40]].concat()),
        ("no bundle", b"PACK".to_vec()),
        ("nothing", Vec::new()),
        ("a head without end", [b"# v2 git bundle\n".to_vec(), vec![b'-'; 10_000]].concat()),
        ("a filtered one", b"# v3 git bundle\n@filter=blob:none\n\n".to_vec()),
        ("another format", b"# v3 git bundle\n@object-format=sha256\n\n".to_vec()),
    ] {
        case.import(&bytes, 1 << 20).expect_err(what);
    }
    assert!(matches!(case.import(&good, 100), Err(BundleError::TooLong { bytes_max: 100 })));
    assert_eq!(case.blobs(), 0, "nothing is kept of them");
    let taken = case.import(&good, 1 << 20).expect("taken in").expect("new ones");
    assert_eq!((taken.count, case.blobs()), (1, 1));
    assert_eq!(case.place.sh(&case.path, "find .git | sort"), before, "the repository is as it was");
}

impl Case {
    /// A bundle of one commit whose tree has this one entry, as it is.
    fn forged(&self, mode: &str, name: &str, object: &str) -> Vec<u8> {
        let cell = self.place.path("cell");
        let byte = |at: usize| u8::from_str_radix(&object[at..at + 2], 16).expect("hex");
        let raw: Vec<u8> = (0..object.len()).step_by(2).map(byte).collect();
        let tree = [format!("{mode} {name}\0").as_bytes(), &raw].concat();
        std::fs::write(self.place.path("tree"), tree).expect("written");
        self.place.sh(
            &cell,
            &format!(
                "id=$(git hash-object -w -t tree --literally ../tree); \
                 commit=$(echo forged | git commit-tree $id -p HEAD); \
                 printf '# v2 git bundle\\n-%s \\n%s HEAD\\n\\n' {} $commit > ../b; \
                 printf '%s\\n%s\\n%s\\n' $commit $id $(git hash-object -w -t tree /dev/null) \
                   | git pack-objects --stdout -q >> ../b",
                self.base
            ),
        );
        std::fs::read(self.place.path("b")).expect("made")
    }
}

#[test]
fn trees_that_would_hurt_are_refused() {
    let case = case();
    let blob = case.place.git(&case.path, &["rev-parse", "HEAD:a.txt"]);
    let empty = "4b825dc642cb6eb9a060e54bf8d69288fbee4904";
    for (mode, name, object, word) in [
        ("40000", ".git", empty, "hasDotgit"),
        ("40000", ".GiT", empty, "hasDotgit"),
        ("40000", "git~1", empty, "hasDotgit"),
        ("100644", "..", &blob, "hasDotdot"),
        ("100644", ".", &blob, "hasDot"),
        ("100644", "a/b", &blob, "fullPathname"),
        ("120000", ".gitmodules", &blob, "gitmodulesSymlink"),
        ("100666", "a", &blob, "badFilemode"),
        ("100644", "a", &"7".repeat(40), "did not receive"),
    ] {
        match case.import(&case.forged(mode, name, object), 1 << 20) {
            Err(BundleError::Check(words)) => assert!(words.contains(word), "{name}: {words}"),
            other => panic!("{mode} {name}: {other:?}"),
        }
        assert_eq!(case.blobs(), 0);
    }
    let fine = case.import(&case.forged("100644", "fine", &blob), 1 << 20);
    assert_eq!(
        fine.expect("taken in").map(|commits| commits.count),
        Some(1),
        "the forge makes good ones, too"
    );
}

#[test]
fn the_command_in_the_cell_keeps_to_its_limit_and_says_when_there_is_nothing() {
    let case = case();
    let (cell, into) = (case.place.path("cell"), case.place.path("out"));
    let run = |base: Option<&str>, bytes_max| {
        let argv =
            bundle_command(cell.to_str().expect("text"), base, into.to_str().expect("text"), bytes_max);
        let ended = case.place.command(&argv[0], &case.path).args(&argv[1..]).status().expect("ran");
        (ended.success(), into.exists())
    };
    assert_eq!(run(Some(&case.base), 1 << 20), (false, false), "nothing new");
    assert_eq!(run(None, 1 << 20), (true, true), "without a base all of it");
    case.place.sh(&cell, "head -c 300000 /dev/urandom > big; git add big; git commit -qm big");
    assert_eq!(run(Some(&case.base), 100_000), (false, false), "too long");
    assert_eq!(run(Some(&case.base), 1 << 20), (true, true));
    let bytes = std::fs::read(&into).expect("made");
    assert_eq!(case.import(&bytes, 1 << 20).expect("taken in").map(|c| c.count), Some(1));
}
