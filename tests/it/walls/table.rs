//! The table of `tests/zoo/README.md` against the sources: every threat has its row, every test that it names
//! exists, every resident of the zoo is named. Needs no engine.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::zoo;

/// Rows of the table of threats that must be there.
const ROWS: [std::ops::RangeInclusive<u32>; 5] = [1..=26, 30..=33, 35..=35, 37..=40, 43..=45];

/// What stands between backquotes.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

fn root(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// The text of the module `a::b`, in whichever file it stands; `tests` may stand in the file of its parent.
fn module(path: &[&str]) -> Option<String> {
    let (top, rest) = match path.split_first() {
        Some((&"it", rest)) => ("tests/it", rest),
        _ => ("src", path),
    };
    let own = std::fs::read_to_string(root(&format!("{top}/{}.rs", rest.join("/")))).ok();
    match rest.split_last() {
        Some((&"tests", parent)) if own.is_none() => {
            std::fs::read_to_string(root(&format!("{top}/{}.rs", parent.join("/")))).ok()
        }
        _ => own,
    }
}

/// A function of that name, marked as a test in the lines before it, or one of `proptest!`.
fn is_test(text: &str, name: &str) -> bool {
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let found = lines.iter().position(|line| {
        let line = line.strip_prefix("async ").unwrap_or(line);
        line.strip_prefix("fn ").is_some_and(|rest| rest.split('(').next() == Some(name))
    });
    found.is_some_and(|at| {
        lines[at.saturating_sub(4)..at]
            .iter()
            .any(|l| l.ends_with("test]") || l.starts_with("#[tokio::test("))
    })
}

#[test]
fn every_row_names_tests_that_exist_and_every_resident_is_named() {
    let readme = std::fs::read_to_string(zoo("README.md")).unwrap();
    let (_, threats) = readme.split_once("## Threats").expect("the table of threats");
    let mut rows = BTreeSet::new();
    for line in threats.lines() {
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        let &[row, _, who, tests] = cells.as_slice() else { continue };
        let Ok(row) = row.parse::<u32>() else { continue };
        assert!(rows.insert(row), "row {row} stands twice");
        for agent in quoted(who) {
            let file = agent.split(' ').next().unwrap();
            assert!(zoo(file).exists(), "row {row}: there is no {file}");
        }
        let somebody = quoted(who).count() > 0 || who == "the test's own lines";
        assert!(somebody, "row {row}: nobody tries it");
        for test in quoted(tests) {
            let parts: Vec<&str> = test.split("::").collect();
            let (name, path) = parts.split_last().unwrap();
            let text = module(path).unwrap_or_else(|| panic!("row {row}: no module for {test}"));
            assert!(is_test(&text, name), "row {row}: no test {test}");
        }
        assert!(quoted(tests).any(|test| test.starts_with("it::")), "row {row}: no test in a real cell");
    }
    assert_eq!(rows, ROWS.into_iter().flatten().collect());
    for kind in ["agents", "repos"] {
        for entry in std::fs::read_dir(zoo(kind)).unwrap().flatten() {
            let name = format!("{kind}/{}", entry.file_name().into_string().unwrap());
            assert!(name.contains("__pycache__") || readme.contains(&name), "{name} is not in the table");
        }
    }
}
