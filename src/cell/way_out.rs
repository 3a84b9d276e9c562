//! A cell's way out, on the host's side: its certificate authority, made once and found again after a restart, and
//! the files by which its tools trust it. The key lies beside the directory that the cell sees, never in it, and
//! goes with the cell's directory.

use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;

use super::Parts;
use super::prepare::{PrepareError, failed};
use crate::agent::trust_store;
use crate::agent::way_out::{ALL_AUTHORITIES, JAVA_AUTHORITIES, MORE_AUTHORITIES};
use crate::gateway::EgressSpec;
use crate::gateway::egress::{CellCa, Tally, UserCredentials};
use crate::job::{FailReason, Identity, JobId};
use crate::policy::Plan;

/// The authority's key, in the cell's private directory.
const KEY_FILE: &str = "ca.key";

/// What the job has used of its way out, beside its journal: it outlives the cell.
const SUMS_FILE: &str = "egress.json";

/// The way out of a plan's cell in `dir`. It is there where nothing may be reached too: what is tried is refused in
/// words, and told.
pub(super) async fn make(
    parts: &Parts,
    plan: &Plan,
    who: &Identity,
    dir: &Path,
    job: &JobId,
) -> Result<EgressSpec, PrepareError> {
    let trusts = has_authorities(parts, plan);
    let (egress, dir, inspects) = (Arc::clone(&parts.egress), dir.to_owned(), plan.cell_inspects_egress());
    let filler = job.clone();
    let sums = parts.settings.journal_dir(job).join(SUMS_FILE);
    let credentials = Arc::new(UserCredentials { gateway: Arc::clone(&parts.gateway), who: who.clone() });
    let made = tokio::task::spawn_blocking(move || {
        let ca = if inspects { Some(Arc::new(authority(&dir)?)) } else { None };
        if trusts {
            let bundle = egress.bundle(ca.as_deref());
            let run = dir.join("run");
            for (name, text) in [(ALL_AUTHORITIES, &bundle.all), (MORE_AUTHORITIES, &bundle.more)] {
                put_readable(&run.join(name), text.as_bytes())?;
            }
            put_readable(&run.join(JAVA_AUTHORITIES), &trust_store::pkcs12(&bundle.all))?;
        }
        let tally = Arc::new(Tally::open(&sums)?);
        Ok::<_, std::io::Error>(EgressSpec { egress, job: filler, ca, credentials, tally })
    });
    let made = made.await.map_err(|e| failed(FailReason::Internal, e))?;
    made.map_err(|e| failed(FailReason::Internal, format!("cannot prepare the way out: {e}")))
}

/// Whether a cell of this plan finds the files of authorities.
pub(super) fn has_authorities(parts: &Parts, plan: &Plan) -> bool {
    plan.cell_has_egress() && (plan.cell_inspects_egress() || parts.egress.has_extra_roots())
}

fn authority(dir: &Path) -> std::io::Result<CellCa> {
    let path = dir.join(KEY_FILE);
    match std::fs::read_to_string(&path) {
        Ok(key) => CellCa::from_key_pem(&key).map_err(std::io::Error::other),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let ca = CellCa::generate().map_err(std::io::Error::other)?;
            let mut file = std::fs::File::options().write(true).create_new(true).mode(0o600).open(&path)?;
            file.write_all(ca.key_pem().as_bytes())?;
            Ok(ca)
        }
        Err(error) => Err(error),
    }
}

/// Whole or not at all: after a restart the cell may be reading it.
fn put_readable(path: &Path, text: &[u8]) -> std::io::Result<()> {
    let new = path.with_extension("new");
    std::fs::write(&new, text)?;
    std::fs::set_permissions(&new, std::fs::Permissions::from_mode(0o644))?;
    std::fs::rename(&new, path)
}
