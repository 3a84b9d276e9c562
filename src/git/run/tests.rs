//! Git in a repository of ours.

use super::*;
use crate::git::testing::somebody;

fn new(who: &Who) -> (tempfile::TempDir, Git) {
    let parent = tempfile::tempdir().expect("tempdir");
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(parent.path(), open).expect("opened");
    let git = Git::new(parent.path(), who, Format::Sha1, &Borrowed::default()).expect("made");
    (parent, git)
}

#[test]
fn git_reads_what_it_is_fed_and_leaves_nothing() {
    for who in [Who::Nobody, Who::Submitter(somebody())] {
        let (parent, git) = new(&who);
        let mut feed = |to: &mut dyn Write| to.write_all(b"hello\n");
        let id =
            git.text(&["hash-object", "-w", "--stdin"], Some(&mut feed), &Bounds::default()).expect("ran");
        assert_eq!(id, b"ce013625030ba8dba906f756967f9e9ca394464a\n");
        let config = git.text(&["config", "--list", "--show-scope"], None, &Bounds::default()).expect("ran");
        let text = String::from_utf8(config).expect("text");
        assert!(text.lines().all(|line| line.starts_with("local\t")), "{text}");
        git.destroy().expect("removed");
        assert_eq!(std::fs::read_dir(parent.path()).expect("listed").count(), 0);
    }
}

#[test]
fn time_output_and_a_broken_feed_are_errors() {
    let (_parent, git) = new(&Who::Nobody);
    let slow = Bounds { wall: Duration::from_millis(200), ..Bounds::default() };
    let (send, receive) = mpsc::channel::<()>();
    let mut hang = move |_: &mut dyn Write| {
        // Until git is gone; then its pipe is, too.
        let _ = receive.recv_timeout(Duration::from_secs(1));
        Ok(())
    };
    let late = git.text(&["hash-object", "--stdin"], Some(&mut hang), &slow);
    assert!(matches!(late, Err(GitError::Late { .. })), "{late:?}");
    drop(send);
    let tight = Bounds { output_bytes_max: 10, ..Bounds::default() };
    let flood = git.text(&["config", "--list"], None, &tight);
    assert!(matches!(flood, Err(GitError::TooMuch { bytes_max: 10, .. })), "{flood:?}");
    let mut fails = |_: &mut dyn Write| Err(io::Error::other("the disk"));
    let fed = git.text(&["hash-object", "--stdin"], Some(&mut fails), &Bounds::default());
    assert!(matches!(fed, Err(GitError::Stream { doing: "feed", .. })), "{fed:?}");
    let failed = git.text(&["cat-file", "-e", "main"], None, &Bounds::default());
    assert!(matches!(failed, Err(GitError::Failed { code: 128, .. })), "{failed:?}");
    git.destroy().expect("removed");
}

#[test]
fn what_a_dead_daemon_left_is_swept_and_what_is_used_stays() {
    let (parent, git) = new(&Who::Nobody);
    assert_eq!(sweep(parent.path()).expect("listed"), 0);
    std::fs::create_dir(parent.path().join(format!("{PREFIX}dead"))).expect("made");
    assert_eq!(sweep(parent.path()).expect("listed"), 1);
    assert!(git.dir().exists());
    git.destroy().expect("removed");
}
