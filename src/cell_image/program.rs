//! Programs of this machine at work for an image: `mmdebstrap`, `apt-get`.
//!
//! Never waits longer than it was told, never keeps more of their output than the end, and never leaves one running.

use std::collections::VecDeque;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};

use super::{ImageError, OnProgress, Progress};

const LINES_KEPT: usize = 15;
const LINE_BYTES_MAX: usize = 500;

/// Runs `program` to its end; its lines on standard error are its progress.
pub(super) async fn run(
    program: &'static str,
    mut command: Command,
    time_max: Duration,
    on_progress: OnProgress<'_>,
) -> Result<(), ImageError> {
    let io = |doing| ImageError::io(doing, Path::new(program));
    let mut child = command.spawn().map_err(io("start"))?;
    let mut last = VecDeque::new();
    let read = read_lines(&mut child, &mut last, on_progress);
    let ended = tokio::time::timeout(time_max, read).await;
    let why = match ended {
        Ok(Ok(status)) if status.success() => return Ok(()),
        Ok(Ok(status)) => status.to_string(),
        Ok(Err(source)) => {
            stop(&mut child).await;
            return Err(io("follow")(source));
        }
        Err(_) => {
            stop(&mut child).await;
            format!("not done after {} minutes", time_max.as_secs() / 60)
        }
    };
    Err(ImageError::Program { program, why, last: Vec::from(last).join("\n") })
}

async fn stop(child: &mut Child) {
    if let Err(error) = child.kill().await {
        tracing::warn!(%error, "cannot kill a program of an image build");
    }
}

async fn read_lines(
    child: &mut Child,
    last: &mut VecDeque<String>,
    on_progress: OnProgress<'_>,
) -> io::Result<std::process::ExitStatus> {
    if let Some(stderr) = child.stderr.take() {
        let mut reader = BufReader::new(stderr);
        let mut line = Vec::new();
        loop {
            // A progress bar has no line ends; a part of it is then shown as a line.
            line.clear();
            let mut limited = tokio::io::AsyncReadExt::take(&mut reader, LINE_BYTES_MAX as u64);
            if limited.read_until(b'\n', &mut line).await? == 0 {
                break;
            }
            let text = String::from_utf8_lossy(&line);
            let text = text.trim_end().rsplit('\r').next().unwrap_or_default();
            if text.is_empty() {
                continue;
            }
            on_progress(Progress::Line(text));
            if last.len() == LINES_KEPT {
                last.pop_front();
            }
            last.push_back(text.to_owned());
        }
    }
    child.wait().await
}

/// Where it is, by the `PATH` of this process.
pub(super) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}
