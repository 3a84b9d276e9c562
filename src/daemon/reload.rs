//! SIGHUP: policies, prices and credentials are read again. What cannot be read keeps what was there, and is told in
//! the log and among the daemon's problems until it can. It must never leave the daemon without any of them.

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};

use tokio::signal::unix::Signal;
use tokio_util::sync::CancellationToken;

use super::systemd;
use crate::api::Api;

/// Reads again at each hang-up until `close`.
pub(super) async fn run(
    api: Arc<Api>,
    mut hangup: Option<Signal>,
    prices_file: Option<PathBuf>,
    close: CancellationToken,
) {
    let next = async |hangup: &mut Option<Signal>| match hangup {
        Some(signal) => signal.recv().await,
        None => None,
    };
    loop {
        tokio::select! {
            () = close.cancelled() => return,
            Some(()) = next(&mut hangup) => {
                systemd::reloading();
                once(&api, prices_file.clone()).await;
                systemd::reloaded();
            }
            else => return close.cancelled().await,
        }
    }
}

async fn once(api: &Api, prices_file: Option<PathBuf>) {
    let mut wrong = Vec::new();
    // The shelf keeps and tells what is wrong with a policy itself.
    if let Err(error) = api.policies().await {
        wrong.push(format!("policies not read again: {}", error.0.message));
    }
    if let Some(path) = prices_file {
        let read = tokio::task::spawn_blocking(move || super::prices(Some(&path))).await;
        match read.unwrap_or_else(|error| Err(error.into())) {
            Ok(prices) => api.parts.gateway.set_prices(prices),
            Err(error) => wrong.push(format!("prices not read, the last good ones stay: {error:#}")),
        }
    }
    let credentials = api.parts.gateway.credentials().reload().await;
    wrong.extend(
        credentials.into_iter().map(|why| format!("credential not read, the last good one stays: {why}")),
    );
    for problem in &wrong {
        tracing::warn!(problem, "SIGHUP");
    }
    let mut problems = super::problems(&api.parts);
    let wrong_count = wrong.len();
    problems.extend(wrong);
    *api.problems.write().unwrap_or_else(PoisonError::into_inner) = problems;
    tracing::info!(wrong = wrong_count, "SIGHUP: done: policies, prices and credentials were read again");
}
