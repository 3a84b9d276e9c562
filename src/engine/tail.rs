//! Keeps the end of a stream that nobody else reads: what PID 1 of a cell wrote to its standard error.
//! Bounded in memory and in how much is read at all; the content is the cell's and never to be trusted.

use std::collections::VecDeque;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};

/// Bytes of the end that are kept.
pub(super) const BYTES_MAX: usize = 4 * 1024;
/// After this many bytes reading stops: init is nearly silent, so more is a flood.
const READ_BYTES_MAX: usize = 1024 * 1024;

/// Reads to the end of the stream, or to the limit, and returns the last bytes as text.
pub(super) async fn collect(mut chunks: impl Stream<Item = Bytes> + Unpin) -> String {
    let mut kept: VecDeque<u8> = VecDeque::with_capacity(BYTES_MAX);
    let mut read = 0_usize;
    while let Some(chunk) = chunks.next().await {
        read += chunk.len();
        let end = &chunk[chunk.len().saturating_sub(BYTES_MAX)..];
        let excess = (kept.len() + end.len()).saturating_sub(BYTES_MAX);
        kept.drain(..excess);
        kept.extend(end);
        if read > READ_BYTES_MAX {
            break;
        }
    }
    String::from_utf8_lossy(kept.make_contiguous()).into_owned()
}

/// The message of a runtime whose `execve` of PID 1 failed after the container had started, if this is one.
/// runc writes it to the container's standard error and exits with 1.
pub(super) fn exec_failure(tail: &str) -> Option<String> {
    let line = tail.lines().next_back()?.trim();
    let failed = ["exec format error", "no such file or directory", "permission denied"];
    let ours = line.starts_with("exec ") || line.contains("exec user process caused");
    (ours && failed.iter().any(|end| line.ends_with(end))).then(|| line.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_end_is_kept() {
        let chunks = (0..100).map(|i| Bytes::from(format!("{i:0>100}")));
        let tail = collect(futures_util::stream::iter(chunks)).await;
        assert_eq!(tail.len(), BYTES_MAX);
        assert!(tail.ends_with("0099"));
        let large = Bytes::from(vec![b'x'; 3 * BYTES_MAX]);
        assert_eq!(collect(futures_util::stream::iter([large])).await.len(), BYTES_MAX);
    }

    #[tokio::test]
    async fn a_flood_is_not_read_for_ever() {
        let endless = futures_util::stream::repeat(Bytes::from(vec![b'x'; 64 * 1024]));
        assert_eq!(collect(endless).await.len(), BYTES_MAX);
    }

    #[test]
    fn a_failed_exec_is_recognised() {
        let line = "exec /.hotcell-init: exec format error";
        assert_eq!(exec_failure(&format!("{line}\n")).as_deref(), Some(line));
        assert_eq!(exec_failure("panicked at: permission denied"), None);
        assert_eq!(exec_failure(""), None);
    }
}
