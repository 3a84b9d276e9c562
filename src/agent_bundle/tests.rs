//! Bundles on disk; the registry is left to `tests/it/image.rs`.

use std::fs;

use super::*;

fn put(bundles: &Bundles, version: &str, platform: Platform) -> Version {
    let version: Version = version.parse().unwrap();
    let dir = bundles.bundle_dir(&version, platform);
    fs::create_dir_all(&dir).unwrap();
    fs::write(dir.join("claude"), b"x").unwrap();
    let bundle = Bundle {
        version: version.clone(),
        platform,
        sha256: "0".repeat(64),
        size_bytes: 1,
        package: platform.package().to_owned(),
        integrity: "sha512-x".to_owned(),
        installed_at_ms: 0,
        state: Qualification::Installed,
    };
    files::write_json(&dir.join("bundle.json"), &bundle).unwrap();
    version
}

const X64: Platform = Platform { arch: Arch::X64, libc: Libc::Gnu };
const MUSL: Platform = Platform { arch: Arch::X64, libc: Libc::Musl };

fn report() -> Report {
    Report { at_ms: 0, duration_ms: 5, checks: vec!["initialize".to_owned()] }
}

#[test]
fn only_a_version_that_passed_its_test_can_be_used() {
    let state = tempfile::tempdir().unwrap();
    let bundles = Bundles::new(state.path());
    assert_eq!(bundles.active().unwrap().as_str(), PINNED_VERSION);
    let version = put(&bundles, "2.2.0", X64);
    put(&bundles, "2.2.0", MUSL);
    assert!(matches!(bundles.set_active(&version), Err(BundleError::NotQualified { .. })));
    bundles.record_qualification(&version, X64, Err("no can_use_tool".to_owned())).unwrap();
    let refused = bundles.set_active(&version).unwrap_err().to_string();
    assert!(refused.contains("no can_use_tool"), "{refused}");
    bundles.record_qualification(&version, X64, Ok(report())).unwrap();
    bundles.set_active(&version).unwrap();
    assert_eq!(bundles.active().unwrap(), version);
    assert!(matches!(bundles.remove(&version), Err(BundleError::Active(_))));
    let missing: Version = "2.3.0".parse().unwrap();
    assert!(matches!(bundles.set_active(&missing), Err(BundleError::Unknown(_))));
}

#[test]
fn removing_a_version_removes_all_its_platforms_and_nothing_else() {
    let state = tempfile::tempdir().unwrap();
    let bundles = Bundles::new(state.path());
    let old = put(&bundles, "2.1.9", X64);
    put(&bundles, "2.1.9", MUSL);
    let new = put(&bundles, "2.1.10", X64);
    let versions = |bundles: &Bundles| -> Vec<String> {
        bundles.ls().unwrap().iter().map(|bundle| format!("{}-{}", bundle.version, bundle.platform)).collect()
    };
    assert_eq!(versions(&bundles), ["2.1.9-x64-gnu", "2.1.9-x64-musl", "2.1.10-x64-gnu"]);
    bundles.remove(&old).unwrap();
    assert_eq!(versions(&bundles), ["2.1.10-x64-gnu"]);
    assert!(bundles.path_for(&new, X64).unwrap().ends_with("agents/2.1.10-x64-gnu/claude"));
    assert!(matches!(bundles.path_for(&old, X64), Err(BundleError::NotInstalled { .. })));
    assert_eq!(fs::read_dir(state.path().join("agents")).unwrap().count(), 1);
}

#[test]
fn a_version_is_never_a_path() {
    for text in ["", "latest", "1.2", "1.2.3/..", "../1.2.3", "1.2.3-", "1.2.x", "1.2.3-a/b", "1.2.3 "] {
        assert!(text.parse::<Version>().is_err(), "{text:?}");
    }
    assert!("2.1.197".parse::<Version>().is_ok());
    assert!("2.2.0-beta.1".parse::<Version>().is_ok());
    assert!(PINNED_VERSION.parse::<Version>().is_ok());
}

#[test]
fn a_damaged_record_is_reported_by_path_and_does_not_hide_the_others() {
    let state = tempfile::tempdir().unwrap();
    let bundles = Bundles::new(state.path());
    let version = put(&bundles, "2.2.0", X64);
    put(&bundles, "2.2.0", MUSL);
    fs::write(bundles.bundle_dir(&version, X64).join("bundle.json"), b"{").unwrap();
    let error = bundles.get(&version, X64).unwrap_err().to_string();
    assert!(error.contains("2.2.0-x64-gnu/bundle.json"), "{error}");
    assert_eq!(bundles.ls().unwrap().len(), 1);
}
