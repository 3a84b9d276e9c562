//! What happens behind an answered CONNECT: TLS passes through once its ClientHello names the same host, or ends
//! here and is served request by request. It must never send a byte to the host before the name was compared.

use std::convert::Infallible;
use std::sync::Arc;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use tokio::io::AsyncWriteExt;
use tokio_rustls::TlsAcceptor;

use super::EgressRecord;
use super::door::{Admitted, Shared};
use super::exchange::Origin;
use super::forward;
use super::route::Stream;
use super::telling::Telling;
use super::wire::{self, Prefixed};

/// A fatal TLS alert, `unrecognized_name`: what a client shows as its reason.
const WRONG_NAME: [u8; 7] = [21, 3, 3, 0, 2, 2, 112];

/// Carries TLS between the cell and a host, unseen but for its beginning.
pub(super) async fn pass(shared: Arc<Shared>, upgrade: OnUpgrade, admitted: Admitted, host: Box<dyn Stream>) {
    let work = async {
        let Ok(cell) = upgrade.await else { return (true, Some("the cell left".to_owned())) };
        let mut cell = TokioIo::new(cell);
        let limits = &shared.spec.egress.limits;
        match wire::read_hello(&mut cell, &admitted.host, limits.head_wait).await {
            Err(reason) => {
                let _ = cell.write_all(&WRONG_NAME).await;
                let _ = cell.shutdown().await;
                (false, Some(reason))
            }
            Ok(hello) => {
                let cell = Prefixed::new(hello, cell);
                (true, wire::copy(cell, host, &admitted.meter, limits.idle, limits.total).await)
            }
        }
    };
    let mut telling = telling(&admitted);
    let (allowed, reason) = tokio::select! {
        ended = work => ended,
        () = shared.revoked.cancelled() => (true, Some("the job was stopped".to_owned())),
        never = telling.while_open(&shared, &admitted.meter) => match never {},
    };
    finish(&shared, admitted, telling, allowed, reason).await;
}

/// Ends TLS here, with the cell's own authority, and judges each request in it.
pub(super) async fn inspect(
    shared: Arc<Shared>,
    upgrade: OnUpgrade,
    admitted: Admitted,
    tls: Arc<ServerConfig>,
) {
    let limits = shared.spec.egress.limits.clone();
    let begun = async {
        let cell = upgrade.await.map_err(|_| (true, "the cell left".to_owned()))?;
        let mut cell = TokioIo::new(cell);
        match wire::read_hello(&mut cell, &admitted.host, limits.head_wait).await {
            Err(reason) => {
                let _ = cell.write_all(&WRONG_NAME).await;
                let _ = cell.shutdown().await;
                Err((false, reason))
            }
            Ok(hello) => {
                let accepting = TlsAcceptor::from(tls).accept(Prefixed::new(hello, cell));
                match tokio::time::timeout(limits.head_wait, accepting).await {
                    Ok(Ok(stream)) => Ok(stream),
                    Ok(Err(error)) => {
                        Err((true, format!("the cell does not speak TLS with its own authority: {error}")))
                    }
                    Err(_) => Err((true, "TLS with the cell did not begin in time".to_owned())),
                }
            }
        }
    };
    let begun = tokio::select! {
        begun = begun => begun,
        () = shared.revoked.cancelled() => Err((true, "the job was stopped".to_owned())),
    };
    let stream = match begun {
        Ok(stream) => stream,
        Err((allowed, reason)) => {
            let telling = telling(&admitted);
            return finish(&shared, admitted, telling, allowed, Some(reason)).await;
        }
    };
    let Admitted { host, port, line, meter, .. } = admitted;
    // Each request has its own event; the tunnel itself has none.
    let origin = Arc::new(Origin::new(host, port, line, meter));
    let service = service_fn(|request| {
        let (shared, origin) = (Arc::clone(&shared), Arc::clone(&origin));
        async move { Ok::<_, Infallible>(forward::inspected(&shared, &origin, request).await) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.idle)
        .max_buf_size(limits.head_bytes_max)
        .serve_connection(TokioIo::new(stream), service);
    tokio::select! {
        served = serving => if let Err(error) = served {
            tracing::debug!(%error, cell = %shared.cell, "an inspected connection ended");
        },
        () = shared.revoked.cancelled() => {}
        () = tokio::time::sleep(limits.total) => {}
    }
}

fn telling(admitted: &Admitted) -> Telling {
    let event = EgressRecord {
        host: admitted.host.to_string(),
        port: admitted.port,
        allowed: true,
        rule: admitted.terms.permit.rule().to_owned(),
        ..EgressRecord::default()
    };
    Telling::new(event, (0, 0), admitted.began)
}

async fn finish(
    shared: &Shared,
    admitted: Admitted,
    mut telling: Telling,
    allowed: bool,
    reason: Option<String>,
) {
    if !allowed {
        telling.refused("egress.tls");
    }
    telling.end(shared, admitted.meter, reason).await;
}
