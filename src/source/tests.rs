//! Fetching from real repositories with the real git, as another user where the tests run as root.

use std::net::TcpListener;
use std::os::unix::fs::{MetadataExt, PermissionsExt};

use super::*;
use crate::git::testing::Place;

struct Bench {
    dir: tempfile::TempDir,
    place: Place,
    sources: Sources,
}

impl Bench {
    fn new() -> Self {
        Self::with(Limits { reserve_bytes: 0, ..Limits::default() })
    }

    fn with(limits: Limits) -> Self {
        let dir = tempfile::tempdir().expect("tempdir");
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).expect("opened");
        let place = Place::new();
        let home = ("HOME".to_owned(), place.path("").into_os_string());
        let sources = Sources::new(dir.path().join("sources"), limits).with_env(vec![home]);
        Self { dir, place, sources }
    }

    /// A bare repository with `main`, `feature/x`, the tag `v1` and its work tree beside it.
    fn bare(&self) -> (PathBuf, PathBuf) {
        let (work, _) = self.place.repository("work");
        self.place.sh(&work, "git tag -am one v1; git checkout -qb feature/x; echo x >x; git add x; git commit -qm x; git checkout -q main");
        self.place.git(&work, &["clone", "-q", "--bare", ".", "../app.git"]);
        (self.place.path("app.git"), work)
    }

    async fn fetch(&self, url: &str, name: Option<&str>) -> Result<Fetched, SourceError> {
        self.fetch_for(url, name, &job(1)).await
    }

    async fn fetch_for(&self, url: &str, name: Option<&str>, job: &JobId) -> Result<Fetched, SourceError> {
        let source = GitSource { url: url.to_owned(), name: name.map(str::to_owned) };
        assert_eq!(source.check(), Ok(()));
        Ok(self.sources.fetch(&self.place.who, &source, job).await?.fetched)
    }

    fn own(&self) -> PathBuf {
        self.dir.path().join("sources").join(self.place.who.uid.to_string())
    }

    fn trees(&self) -> usize {
        std::fs::read_dir(self.own().join("trees")).map_or(0, Iterator::count)
    }
}

fn job(n: u64) -> JobId {
    JobId::new(1_700_000_000_000, n)
}

fn text(path: &Path) -> String {
    path.to_str().expect("UTF-8").to_owned()
}

#[tokio::test]
async fn a_branch_a_tag_and_a_commit_are_checked_out_as_the_user() {
    let bench = Bench::new();
    let (bare, work) = bench.bare();
    let url = text(&bare);
    let main = bench.place.git(&work, &["rev-parse", "main"]);
    let cases = [
        (None, "main", &main),
        (Some("main"), "main", &main),
        (Some("v1"), "", &main),
        (Some(&*main), "", &main),
        (Some("feature/x"), "feature/x", &bench.place.git(&work, &["rev-parse", "feature/x"])),
    ];
    for (n, (name, branch, commit)) in cases.into_iter().enumerate() {
        let fetched = bench.fetch_for(&url, name, &job(n as u64)).await.expect("fetched");
        assert_eq!(
            (&fetched.checkout.commit, fetched.checkout.branch.as_deref().unwrap_or("")),
            (commit, branch)
        );
        let tree = &fetched.tree;
        assert_eq!(std::fs::read_to_string(tree.join("a.txt")).expect("a file"), "one\ntwo\nthree\n");
        assert_eq!(bench.place.git(tree, &["status", "--porcelain"]), "");
        assert_eq!(bench.place.git(tree, &["rev-parse", "HEAD"]), *commit);
        assert_eq!(bench.place.git(tree, &["branch", "--show-current"]), branch);
        assert_eq!(bench.place.git(tree, &["remote", "get-url", "origin"]), url);
        assert!(!tree.join(".git/hooks").exists() && !tree.join(".git/objects/info/alternates").exists());
        let stat = std::fs::metadata(tree.join("a.txt")).expect("stat");
        assert_eq!((stat.uid(), stat.mode() & 0o777), (bench.place.who.uid, 0o644));
        assert_eq!(fetched.notes[0].contains("was up to date"), n > 0, "{:?}", fetched.notes);
    }
    let mode = |path: &Path| std::fs::metadata(path).expect("stat").mode() & 0o777;
    assert_eq!((mode(bench.sources.dir()), mode(&bench.own())), (0o711, 0o700));
    assert_eq!(bench.sources.jobs().await.expect("listed").len(), 5);
    bench.sources.remove(&bench.place.who, &job(0)).await.expect("removed");
    bench.sources.remove(&bench.place.who, &job(0)).await.expect("nothing there is fine");
    assert_eq!(bench.trees(), 4);
}

#[tokio::test]
async fn what_is_new_and_what_is_gone_come_with_the_next_fetch() {
    let bench = Bench::new();
    let (bare, work) = bench.bare();
    let url = text(&bare);
    bench.fetch_for(&url, None, &job(1)).await.expect("fetched");
    bench.place.sh(
        &work,
        "git commit -q --amend -m other; git push -qf ../app.git main; git push -q ../app.git :feature/x",
    );
    // What a fetch that was killed left is no obstacle.
    let mirror = bench.own().join("mirrors").join(room::mirror_name(&url));
    for name in ["packed-refs.lock", "refs/heads/main.lock", "objects/pack/tmp_pack_x"] {
        std::fs::write(mirror.join(name), "").expect("written");
    }
    let fetched = bench.fetch_for(&url, Some("main"), &job(2)).await.expect("fetched");
    assert_eq!(fetched.checkout.commit, bench.place.git(&work, &["rev-parse", "main"]));
    assert!(matches!(
        bench.fetch_for(&url, Some("feature/x"), &job(3)).await,
        Err(SourceError::UnknownRef { .. })
    ));
    assert!(!mirror.join("objects/pack/tmp_pack_x").exists());
    assert_eq!(bench.trees(), 2);
}

#[tokio::test]
async fn what_is_missing_is_named_and_nothing_is_left() {
    let bench = Bench::new();
    let (bare, _) = bench.bare();
    let url = text(&bare);
    bench.place.git(&bench.place.path(""), &["init", "-q", "--bare", "empty.git"]);
    let closed = TcpListener::bind("127.0.0.1:0").expect("port").local_addr().expect("address");
    for (url, name, words) in [
        (url.clone(), Some("mian"), "did you mean main?"),
        (url.clone(), Some("0123456789012345678901234567890123456789"), "has no \"0123"),
        (url.clone(), Some("refs/heads/feature"), "feature/x"),
        (text(&bench.place.path("no-such.git")), None, "no git repository that you can read"),
        (text(&bench.place.path("")), None, "no git repository that you can read"),
        (text(&bench.place.path("empty.git")), None, "no commit yet"),
        (format!("http://{closed}/app.git"), None, "cannot be reached"),
    ] {
        let error = bench.fetch(&url, name).await.expect_err(&url).to_string();
        assert!(error.contains(words), "{url}: {error}");
        assert_eq!(bench.trees(), 0, "{url}");
    }
    let tree = bench.place.git(&bare, &["rev-parse", "main^{tree}"]);
    let error = bench.fetch(&url, Some(&tree)).await.expect_err("a tree");
    assert!(matches!(error, SourceError::NotACommit { .. }), "{error}");
    assert!(bench.sources.under_way.lock().expect("lock").jobs.is_empty());
}

#[tokio::test]
async fn another_users_repository_is_not_read_without_their_leave_nor_without_the_users_word() {
    if !rustix::process::geteuid().is_root() {
        return;
    }
    let bench = Bench::new();
    let (bare, _) = bench.bare();
    let url = text(&bare);
    assert!(
        std::process::Command::new("chown").args(["-R", "4545", &url]).status().expect("chown").success()
    );
    let error = bench.fetch(&url, None).await.expect_err("another user's");
    assert!(matches!(error, SourceError::Owner { .. }), "{error}");
    bench.place.git(&bench.place.path(""), &["config", "--global", "safe.directory", &url]);
    bench.fetch(&url, None).await.expect("the user trusts it");
    std::fs::set_permissions(&bare, std::fs::Permissions::from_mode(0o700)).expect("closed");
    let error = bench.fetch_for(&url, None, &job(2)).await.expect_err("closed");
    assert!(matches!(error, SourceError::NotThere { .. }), "{error}");
    // A directory that somebody else made where a user's belongs is not used.
    let (other, theirs) =
        (Identity { uid: 4646, gid: 4646, groups: Vec::new() }, bench.sources.dir().join("4646"));
    std::fs::create_dir(&theirs).expect("made");
    let source = GitSource { url, name: None };
    let error = bench.sources.fetch(&other, &source, &job(3)).await.map(|_| ()).expect_err("not theirs");
    assert!(matches!(error, SourceError::Place { .. }), "{error}");
}

/// A server that answers everybody with `answer`, or never.
fn server(answer: &'static str) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("port");
    let address = listener.local_addr().expect("address");
    std::thread::spawn(move || {
        let mut held = Vec::new();
        for stream in listener.incoming().flatten() {
            use std::io::{Read, Write};
            let mut stream = stream;
            if answer.is_empty() {
                held.push(stream);
                continue;
            }
            let mut request = [0; 4096];
            let _ = stream.read(&mut request).and_then(|_| stream.write_all(answer.as_bytes()));
        }
    });
    format!("http://{address}/team/app.git")
}

#[tokio::test]
async fn a_server_that_asks_or_hangs_is_told_and_nobody_is_prompted() {
    let url = server(
        "HTTP/1.1 401 Unauthorized\r\nWWW-Authenticate: Basic realm=\"x\"\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
    );
    let bench = Bench::new();
    let error = bench.fetch(&url, None).await.expect_err("a password is wanted");
    assert!(matches!(error, SourceError::Credentials { .. }), "{error}");
    assert!(error.to_string().contains("credential helper"), "{error}");
    // The user's own helper is asked; what it gives does not come back in words.
    let config = "[credential]\n\thelper = \"!f() { touch $HOME/asked; echo username=ann; echo password=hunter2; }; f\"\n";
    std::fs::write(bench.place.path(".gitconfig"), config).expect("written");
    let error = bench.fetch(&url, None).await.expect_err("a wrong password");
    assert!(matches!(error, SourceError::Credentials { .. }), "{error}");
    assert!(bench.place.path("asked").exists() && !error.to_string().contains("hunter2"), "{error}");
    let bench =
        Bench::with(Limits { wall: Duration::from_millis(700), reserve_bytes: 0, ..Limits::default() });
    let error = bench.fetch(&server(""), None).await.expect_err("it hangs");
    assert!(matches!(error, SourceError::Late { .. }), "{error}");
    assert_eq!(bench.trees(), 0);
}

#[tokio::test]
async fn the_users_own_ssh_command_reaches_the_repository_and_cannot_ask() {
    let bench = Bench::new();
    let (bare, _) = bench.bare();
    let (ssh, seen) = (bench.place.path("ssh"), bench.place.path("seen"));
    let script = format!(
        "#!/bin/sh\necho \"$@\" >>{seen}\nif (: </dev/tty) 2>/dev/null; then echo tty >>{seen}; fi\nfor last; do :; done\nexec sh -c \"$last\"\n",
        seen = seen.display()
    );
    std::fs::write(&ssh, script).expect("written");
    std::fs::set_permissions(&ssh, std::fs::Permissions::from_mode(0o755)).expect("mode");
    let config = format!("[core]\n\tsshCommand = {} -i key\n[ssh]\n\tvariant = ssh\n", ssh.display());
    std::fs::write(bench.place.path(".gitconfig"), config).expect("written");
    let url = format!("git@example.org:{}", bare.display());
    let fetched = bench.fetch(&url, Some("main")).await.expect("fetched");
    assert!(fetched.tree.join("dir/b.txt").exists());
    let seen = std::fs::read_to_string(seen).expect("it was asked");
    assert!(seen.lines().all(|line| line.contains("-i key -o BatchMode=yes")), "{seen}");
}

#[tokio::test]
async fn nothing_of_a_poisoned_repository_runs() {
    let bench = Bench::new();
    let (bare, work) = bench.bare();
    let mark = bench.place.path("marker");
    let run = format!("touch {}", mark.display());
    bench.place.sh(
        &work,
        "a=$(printf '* filter=evil ident text working-tree-encoding=UTF-16 diff=evil merge=evil\\n' | git hash-object -w --stdin); \
         m=$(printf '[submodule \"s\"]\\n\\tpath = s\\n\\turl = https://127.0.0.1:1/s\\n\\tupdate = checkout\\n' | git hash-object -w --stdin); \
         git update-index --add --cacheinfo 100644,$a,.gitattributes --cacheinfo 100644,$m,.gitmodules \
         --cacheinfo 160000,$(git rev-parse HEAD),s; \
         git push -q ../app.git $(git commit-tree -p HEAD -m poison $(git write-tree)):main",
    );
    let script = format!("#!/bin/sh\n{run}\ncat\n");
    for hook in [
        "post-checkout",
        "post-update",
        "pre-receive",
        "reference-transaction",
        "post-index-change",
        "fsmonitor-watchman",
    ] {
        let path = bare.join("hooks").join(hook);
        std::fs::create_dir_all(bare.join("hooks")).expect("made");
        std::fs::write(&path, &script).expect("written");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).expect("mode");
    }
    let config = format!(
        "[core]\n\trepositoryformatversion = 0\n\tbare = true\n\tfsmonitor = {run}\n\thooksPath = {hooks}\n\tsshCommand = {run}\n\
         \tpager = {run}\n\teditor = {run}\n\talternateRefsCommand = {run}\n\tgitProxy = {run}\n[uploadpack]\n\
         \tpackObjectsHook = {run};\n[filter \"evil\"]\n\tclean = {run}\n\tsmudge = {run}\n\tprocess = {run}\n\trequired = true\n\
         [diff]\n\texternal = {run}\n[credential]\n\thelper = !{run}\n[extensions]\n\tpartialClone = origin\n[remote \"origin\"]\n\
         \turl = ext::sh -c {run}\n\tpromisor = true\n\tuploadpack = {run}\n\tvcs = ext\n[url \"ext::sh -c {run}\"]\n\tinsteadOf = /\n\
         [include]\n\tpath = {more}\n",
        hooks = bare.join("hooks").display(),
        more = bare.join("more").display()
    );
    std::fs::write(bare.join("config"), config).expect("written");
    std::fs::write(bare.join("more"), format!("[alias]\n\tupload-pack = !{run}\n")).expect("written");
    std::fs::write(bare.join("objects/info/alternates"), "/nonexistent\n").expect("written");
    let fetched = bench.fetch(&text(&bare), Some("main")).await.expect("fetched");
    assert!(!mark.exists() && !fetched.tree.join("marker").exists(), "something ran");
    assert!(
        fetched.notes.iter().any(|note| note.contains("1 submodules are not fetched")),
        "{:?}",
        fetched.notes
    );
    assert_eq!(std::fs::read_to_string(fetched.tree.join("a.txt")).expect("raw"), "one\ntwo\nthree\n");
    let own = std::fs::read_to_string(fetched.tree.join(".git/config")).expect("config");
    for word in ["evil", "ext::", "touch", "submodule"] {
        assert!(!own.contains(word), "{own}");
    }
    assert_eq!(bench.place.git(&fetched.tree, &["status", "--porcelain"]), "");
    assert!(!mark.exists(), "something ran");
}

#[tokio::test]
async fn objects_that_git_would_not_make_are_refused() {
    let bench = Bench::new();
    let (bare, _) = bench.bare();
    let line = "c=$(printf 'tree %s\\n\\nno author' $(git rev-parse 'main^{tree}') | \
                git hash-object -w -t commit --stdin --literally); git update-ref refs/heads/main $c";
    bench.place.sh(&bare, line);
    let error = bench.fetch(&text(&bare), None).await.expect_err("damaged");
    assert!(matches!(error, SourceError::Damaged { .. }), "{error}");
    // What tries to write into `.git` by another spelling of it.
    let line = "b=$(echo evil | git hash-object -w --stdin); t=$(printf '100644 blob %s\\tpost-checkout\\n' $b | git mktree); \
                t=$(printf '040000 tree %s\\t.GIT\\n' $t | git mktree); \
                git update-ref refs/heads/main $(git commit-tree -m x $t)";
    bench.place.sh(&bare, line);
    let error = bench.fetch(&text(&bare), None).await.expect_err("damaged");
    assert!(matches!(error, SourceError::Damaged { .. }), "{error}");
}

#[tokio::test]
async fn what_is_too_large_is_stopped() {
    let limits = Limits { reserve_bytes: 0, pack_bytes_max: 100_000, ..Limits::default() };
    let bench = Bench::with(limits);
    let (bare, work) = bench.bare();
    bench.place.sh(
        &work,
        "head -c 300000 /dev/urandom >big; git add big; git commit -qm big; git push -q ../app.git main",
    );
    let error = bench.fetch(&text(&bare), None).await.expect_err("too large a pack");
    assert!(matches!(error, SourceError::TooLarge { .. }), "{error}");
    assert_eq!(bench.trees(), 0);
    let bench = Bench::with(Limits { tree_bytes_max: 299_999, reserve_bytes: 0, ..Limits::default() });
    let (bare, work) = bench.bare();
    bench.place.sh(
        &work,
        "head -c 300000 /dev/zero >big; git add big; git commit -qm big; git push -q ../app.git main",
    );
    let error = bench.fetch(&text(&bare), None).await.expect_err("too large a checkout");
    assert!(error.to_string().contains("the checkout has 3000"), "{error}");
    let bench = Bench::with(Limits { per_user_max: 0, ..Limits::default() });
    assert!(matches!(bench.fetch("/x", None).await, Err(SourceError::Busy { .. })));
}

const POINTER: &str = "version https://git-lfs.github.com/spec/v1\\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\\nsize 7\\n";

#[tokio::test]
async fn lfs_files_are_refused_by_name_or_brought_by_the_users_git_lfs() {
    let bench = Bench::new();
    let (bare, work) = bench.bare();
    bench.place.sh(
        &work,
        &format!("echo '*.bin filter=lfs diff=lfs merge=lfs -text' >.gitattributes; printf '{POINTER}' | tee a.bin >dir/b.bin; \
                  git add .; git commit -qm lfs; git push -q ../app.git main"),
    );
    let url = text(&bare);
    let error = bench.fetch(&url, None).await.expect_err("no git-lfs").to_string();
    assert!(
        error.contains("2 files are in Git LFS (a.bin, dir/b.bin)") && error.contains("install git-lfs"),
        "{error}"
    );
    assert_eq!(bench.trees(), 0);
    // With a git-lfs: by explicit command, never as the filter that the user's configuration may name.
    let programs = bench.place.path("bin");
    std::fs::create_dir(&programs).expect("made");
    let script = "#!/bin/sh\nset -e\necho \"$@\" >>$HOME/lfs-calls\ncase $1 in checkout) printf content >a.bin; printf content >dir/b.bin;; esac\n";
    std::fs::write(programs.join("git-lfs"), script).expect("written");
    std::fs::set_permissions(programs.join("git-lfs"), std::fs::Permissions::from_mode(0o755)).expect("mode");
    let config = "[filter \"lfs\"]\n\tprocess = touch $HOME/filtered\n\tsmudge = touch $HOME/filtered\n\trequired = true\n";
    std::fs::write(bench.place.path(".gitconfig"), config).expect("written");
    let Bench { dir, place, sources } = bench;
    let path = format!("{}:/usr/local/bin:/usr/bin:/bin", programs.display());
    let env = vec![("HOME".to_owned(), place.path("").into_os_string()), ("PATH".to_owned(), path.into())];
    let bench = Bench { dir, place, sources: sources.with_env(env) };
    let fetched = bench.fetch(&url, None).await.expect("brought");
    assert_eq!(std::fs::read_to_string(fetched.tree.join("dir/b.bin")).expect("read"), "content");
    let calls = std::fs::read_to_string(bench.place.path("lfs-calls")).expect("calls");
    assert_eq!(calls, format!("version\nfetch origin {}\ncheckout\n", fetched.checkout.commit));
    assert_eq!(bench.place.git(&fetched.tree, &["status", "--porcelain"]), "");
    assert!(!bench.place.path("filtered").exists());
    // A server that the repository names is not asked.
    std::fs::remove_file(bench.place.path(".gitconfig")).expect("removed");
    bench.place.sh(&work, "printf '[lfs]\\n\\turl = http://127.0.0.1:1/\\n' >.lfsconfig; git add .; git commit -qm c; git push -q ../app.git main");
    let error = bench.fetch_for(&url, None, &job(2)).await.expect_err("redirected").to_string();
    assert!(error.contains(".lfsconfig"), "{error}");
}

#[tokio::test]
async fn a_directory_that_its_user_bends_hurts_nobody_else() {
    let bench = Bench::new();
    let (bare, _) = bench.bare();
    bench.fetch(&text(&bare), None).await.expect("fetched");
    let victim = bench.dir.path().join("victim");
    std::fs::create_dir(&victim).expect("made");
    std::fs::set_permissions(&victim, std::fs::Permissions::from_mode(0o755)).expect("mode");
    std::fs::write(victim.join("file"), "kept").expect("written");
    let trees = bench.own().join("trees");
    let line = format!("rm -rf trees/*; ln -s {} trees/{}; ls -d trees/*", victim.display(), job(1));
    bench.place.sh(&bench.own(), &line);
    bench.sources.remove(&bench.place.who, &job(1)).await.expect("the link alone");
    bench.place.sh(
        &bench.own(),
        &format!("rm -rf trees; ln -s {} trees", victim.parent().expect("parent").display()),
    );
    std::fs::create_dir(bench.dir.path().join(job(1).as_str())).expect("made");
    std::fs::write(bench.dir.path().join(job(1).as_str()).join("file"), "kept").expect("written");
    if rustix::process::geteuid().is_root() {
        bench.sources.remove(&bench.place.who, &job(1)).await.expect_err("with the user's rights alone");
        assert!(bench.dir.path().join(job(1).as_str()).join("file").exists());
    }
    assert_eq!(std::fs::read_to_string(victim.join("file")).expect("read"), "kept");
    assert!(trees.is_symlink());
}

#[tokio::test]
async fn mirrors_go_when_they_are_too_many_but_not_one_in_use() {
    let bench = Bench::with(Limits { mirrors_bytes_max: 0, reserve_bytes: 0, ..Limits::default() });
    let (bare, _) = bench.bare();
    let url = text(&bare);
    bench.fetch(&url, None).await.expect("fetched");
    let name = room::mirror_name(&url);
    let lock = bench.sources.lock_of(bench.place.who.uid, &name);
    let held = lock.lock().await;
    let old = bench.sources.evictable().await.expect("looked");
    assert_eq!(old.iter().map(|old| &old.name).collect::<Vec<_>>(), [&name]);
    assert!(!bench.sources.evict(&old[0]).await.expect("in use"));
    drop(held);
    assert!(bench.sources.evict(&old[0]).await.expect("removed"));
    assert!(!bench.own().join("mirrors").join(&name).exists());
    // The checkout stands on its own.
    let tree = bench.own().join("trees").join(job(1).as_str()).join("tree");
    assert_eq!(bench.place.git(&tree, &["fsck", "--full"]), "");
    assert_eq!(bench.place.git(&tree, &["log", "--format=%s"]), "first");
}
