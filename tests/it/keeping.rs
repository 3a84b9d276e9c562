//! What is kept and what goes: a damaged store set aside with nothing of its cells left, and jobs that are old or too
//! many, removed by the daemon itself and by `hotcell gc`.

use std::fs;
use std::os::unix::fs::FileExt;
use std::process::Stdio;

use hotcell::store::FILE_NAME;
use serde_json as _;

use crate::fake_agent::{containers, done, spec, until_event, until_state, world};
use crate::world::{World, docker};

/// What the daemon says when it does not start: exit code, standard error.
fn refused(world: &World) -> (i32, String) {
    let output = world.hotcell().arg("serve").stdin(Stdio::null()).output().unwrap();
    (output.status.code().unwrap(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Overwrites the middle of the database, and takes its log away, which may hold those pages anew.
fn damage(world: &World) {
    let path = world.state_dir().join(FILE_NAME);
    let log = fs::read(world.state_dir().join(format!("{FILE_NAME}-wal"))).unwrap_or_default();
    if !log.is_empty() {
        // All of it into the file, as after an orderly end.
        let db = rusqlite::Connection::open(&path).unwrap();
        db.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(())).unwrap();
    }
    let file = fs::File::options().write(true).open(&path).unwrap();
    let pages = file.metadata().unwrap().len() / 4096;
    for page in 1..pages {
        file.write_all_at(&[0x5a; 2048], page * 4096).unwrap();
    }
}

#[test]
fn a_damaged_store_is_refused_and_set_aside_and_nothing_of_its_cells_is_left() {
    let mut world = world("limits.slots = 2\n");
    let over = world.submit(&spec("print 2 2"));
    done(&mut world, &over);
    let running = world.submit(&spec("print 1 1; sleep 600"));
    until_event(&mut world, &running, "\"n\":0");
    until_state(&mut world, &running, "running");
    let instance = world.instance();
    assert_eq!(containers(&world).len(), 1);
    world.kill();
    let state = world.state_dir();
    assert_eq!(fs::read_to_string(state.join("instance")).unwrap().trim(), instance);
    damage(&world);

    let (code, said) = refused(&world);
    assert_eq!(code, 1, "{said}");
    for words in [&*state.join(FILE_NAME).to_string_lossy(), "put a copy of it back", "--set-store-aside"] {
        assert!(said.contains(words), "{words}: {said}");
    }
    let filter = format!("label=hotcell.instance={instance}");
    let listed = || docker(&["ps", "-aq", "--filter", &filter]);
    assert_ne!(listed().trim(), "", "nothing is touched without a word");
    assert!(!state.join("set-aside").exists());

    world.daemon_args = vec!["--set-store-aside".to_owned()];
    world.start();
    assert_eq!(world.instance(), instance);
    let log = world.log();
    for words in ["It was set aside", &over, &running, "begin at zero", &instance] {
        assert!(log.contains(words), "{words}: {log}");
    }
    let aside = fs::read_dir(&state)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .find(|path| path.file_name().unwrap().to_string_lossy().starts_with("set-aside-"))
        .expect("a directory for it");
    assert!(aside.join(FILE_NAME).is_file());
    for job in [&over, &running] {
        assert_ne!(fs::read_dir(aside.join("jobs").join(job)).unwrap().count(), 0, "journals are kept");
        assert_eq!(world.call("GET", &format!("/v1/jobs/{job}"), "").status, 404);
    }
    assert_eq!(listed().trim(), "", "the cell of the job that ran is gone");
    world.nothing_left();
    // It works as a new one, and the flag does nothing to a whole store.
    world.terminate();
    world.start();
    let fresh = world.submit(&spec("print 1 1"));
    assert_eq!(done(&mut world, &fresh).1["outcome"], "succeeded");
    world.kill();
    world.start();
    assert_eq!(world.show(&fresh)["outcome"], "succeeded");
    world.end();
}

#[test]
fn a_file_of_another_program_is_refused_by_name_even_where_setting_aside_is_allowed() {
    let mut world = World::without_daemon("[default]\ntext = \"never asked\"\n", "");
    let path = world.state_dir().join(FILE_NAME);
    rusqlite::Connection::open(&path).unwrap().execute_batch("CREATE TABLE theirs (x)").unwrap();
    let before = fs::read(&path).unwrap();
    let output = world.hotcell().args(["serve", "--set-store-aside"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("is not a hotcell store") && said.contains(&*path.to_string_lossy()), "{said}");
    assert_eq!(fs::read(&path).unwrap(), before);
    fs::remove_file(&path).unwrap();
    world.start();
    world.end();
}
