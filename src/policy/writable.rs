//! `[workspace] writable`: what of a workspace can be written while the rest cannot. Pure: whether the paths can
//! be meant at all. That they exist is seen when a job's workspace is opened.

use std::path::{Component, PathBuf};

/// Most paths of one policy; each is a mount in the cell.
pub const PATHS_MAX: usize = 64;

/// Key and problem of the first path that cannot be.
pub(super) fn check(paths: Option<&[PathBuf]>) -> Result<(), (String, String)> {
    let paths = paths.unwrap_or_default();
    if paths.len() > PATHS_MAX {
        let problem = format!("{} paths; at most {PATHS_MAX} can be writable", paths.len());
        return Err(("workspace.writable".into(), problem));
    }
    let bad_at = |index: usize, problem: &str| {
        Err((format!("workspace.writable[{index}]"), format!("{}: {problem}", paths[index].display())))
    };
    for (index, path) in paths.iter().enumerate() {
        let bad = |problem: &str| bad_at(index, problem);
        let text = path.to_string_lossy();
        let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
        if text.is_empty() || !plain || text.contains(char::is_control) {
            return bad("must be a path below the workspace, without `.` and `..`");
        }
        if path.components().any(|part| part.as_os_str().eq_ignore_ascii_case(".git")) {
            return bad("is in a .git directory: what is written there would run on the host");
        }
    }
    for (index, path) in paths.iter().enumerate() {
        if paths.iter().enumerate().any(|(other, outer)| other != index && path.starts_with(outer)) {
            return bad_at(index, "lies in another one of the list");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(paths: &[&str]) -> Option<(String, String)> {
        let paths: Vec<PathBuf> = paths.iter().map(PathBuf::from).collect();
        check(Some(&paths)).err()
    }

    #[test]
    fn paths_are_plain_below_the_workspace_and_do_not_overlap() {
        assert_eq!(check(None), Ok(()));
        assert_eq!(problem(&[]), None);
        assert_eq!(problem(&["src", "docs/api", "REPORT.md", "srcs"]), None);
        for bad in ["", ".", "..", "/src", "src/..", "../x", ".git", "sub/.git/hooks", ".GIT", "a\nb"] {
            let (key, problem) = problem(&["ok", bad]).expect(bad);
            assert!(key == "workspace.writable[1]" && problem.contains(bad), "{key}: {problem}");
        }
        assert!(problem(&["src", "src/lib"]).is_some_and(|(key, _)| key == "workspace.writable[1]"));
        assert!(problem(&["src", "src"]).is_some());
        let many: Vec<String> = (0..=PATHS_MAX).map(|n| format!("d{n}")).collect();
        assert!(problem(&many.iter().map(String::as_str).collect::<Vec<_>>()).is_some());
    }
}
