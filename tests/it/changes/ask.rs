//! The question at the end of `hotcell run` on a terminal, answered by a person at one.

use std::io::{Read, Write};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::*;
use crate::world::PATIENCE;

/// A command of Ann's on a terminal of its own, which `script` makes.
struct Terminal {
    child: std::process::Child,
    keys: Option<std::process::ChildStdin>,
    shown: Arc<Mutex<String>>,
    reader: std::thread::JoinHandle<()>,
}

impl Terminal {
    fn open(world: &World, args: &[&str]) -> Self {
        let hotcell = command(world, ANN, &[]);
        let line = std::iter::once(hotcell.get_program().to_str().unwrap()).chain(args.iter().copied());
        let line: Vec<String> = line.map(|word| format!("'{word}'")).collect();
        let mut script = Command::new("script");
        script.args(["-q", "-e", "-c", &line.join(" "), "/dev/null"]).uid(ANN).gid(ANN).current_dir("/");
        script.env_clear().envs(hotcell.get_envs().filter_map(|(name, value)| Some((name, value?))));
        script.env("TERM", "xterm").env("PAGER", "cat").env("SHELL", "/bin/sh");
        let mut child = script
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("script");
        let (keys, mut out) = (child.stdin.take(), child.stdout.take().unwrap());
        let shown = Arc::new(Mutex::new(String::new()));
        let copy = Arc::clone(&shown);
        let reader = std::thread::spawn(move || {
            let mut buffer = [0; 4096];
            while let Ok(got @ 1..) = out.read(&mut buffer) {
                copy.lock().unwrap().push_str(&String::from_utf8_lossy(&buffer[..got]));
            }
        });
        Self { child, keys, shown, reader }
    }

    /// Waits until the question has been asked so many times, and types.
    fn answer(&mut self, times: usize, keys: &str) {
        let until = Instant::now() + PATIENCE;
        while self.shown.lock().unwrap().matches("[d]iscard? ").count() < times {
            let ended = self.child.try_wait().unwrap();
            assert!(ended.is_none() && Instant::now() < until, "{ended:?}: {}", self.shown.lock().unwrap());
            std::thread::sleep(Duration::from_millis(20));
        }
        self.keys.as_mut().unwrap().write_all(keys.as_bytes()).unwrap();
    }

    /// What was shown, once the command has ended.
    fn end(mut self) -> String {
        let code = self.child.wait().unwrap().code();
        drop(self.keys);
        self.reader.join().unwrap();
        let shown = std::mem::take(&mut *self.shown.lock().unwrap());
        assert_eq!(code, Some(0), "{shown}");
        shown
    }
}

#[test]
fn at_a_terminal_the_person_is_asked_and_what_they_say_is_done() {
    let world = World::new(&script(&[("work", "echo more >>greeting.txt; echo new >new.txt")]));
    let dir = repository(&world, "repo", "echo hello >greeting.txt");
    let path = dir.display().to_string();
    let args = ["run", "work", "-w", &path, "--mode", "copy", "-p", "trusted"];
    let newest = |world: &World| world.sql("SELECT id FROM jobs ORDER BY rowid DESC LIMIT 1");
    let before = sh(&dir, ALL);

    // The end of the input, and a clear word: everything is kept, and it is said how to go on.
    for keys in ["\x04", "k\r"] {
        let mut terminal = Terminal::open(&world, &args);
        terminal.answer(1, keys);
        let (shown, id) = (terminal.end(), newest(&world));
        assert!(
            shown.contains("2 files changed, 2 insertions(+)")
                && shown.contains(&format!("hotcell apply {id}")),
            "{shown}"
        );
        assert_eq!(ann_json(&world, &["diff", &id, "--json"])["standing"], "open");
        assert_eq!(sh(&dir, ALL), before);
    }
    let mut terminal = Terminal::open(&world, &args);
    terminal.answer(1, "d\r");
    let (shown, id) = (terminal.end(), newest(&world));
    assert!(shown.contains("discarded"), "{shown}");
    assert_eq!(ann_json(&world, &["diff", &id, "--json"])["standing"], "discarded");
    assert_eq!(sh(&dir, ALL), before);

    // What makes no sense is asked again, showing too; then it is applied.
    let mut terminal = Terminal::open(&world, &args);
    terminal.answer(1, "yes please\r");
    terminal.answer(2, "s\r");
    terminal.answer(3, "a\r");
    let (shown, id) = (terminal.end(), newest(&world));
    assert!(shown.contains("+more") && shown.contains("2 changes applied"), "{shown}");
    assert_eq!(ann_json(&world, &["diff", &id, "--json"])["standing"], "applied");
    assert_eq!(sh(&dir, "cat greeting.txt new.txt"), "hello\nmore\nnew\n");
    world.end();
}
