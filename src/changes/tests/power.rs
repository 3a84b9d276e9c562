//! The power goes: what a recorded change set names is on the disk and whole, and no name on a shelf is ever half a
//! content.

use std::io::Read;

use crate::change::{BlobId, Node};
use crate::changes::JobShelf;
use crate::changes::testing::{Disk, entry, set};
use crate::changes::trees::shelf_in;

/// Contents of all lengths, none like another.
fn contents() -> Vec<Vec<u8>> {
    (0..60u32).map(|n| n.to_le_bytes().repeat((n * n * 20) as usize)).collect()
}

fn names(shelf: &JobShelf) -> Vec<String> {
    let list = std::fs::read_dir(shelf.dir().join("blobs")).expect("list");
    list.map(|entry| entry.expect("entry").file_name().into_string().expect("text")).collect()
}

fn whole(shelf: &JobShelf, id: &BlobId) -> Vec<u8> {
    use sha2::Digest;
    let mut bytes = Vec::new();
    shelf.blob(id).expect("there").read_to_end(&mut bytes).expect("read");
    let digest = sha2::Sha256::digest(&bytes).into();
    assert_eq!(BlobId::of_digest(digest), *id, "{} bytes", bytes.len());
    bytes
}

#[test]
fn a_power_cut_takes_what_was_not_put_on_the_disk() {
    let disk = Disk::new();
    disk.flush();
    let (fresh, path) = (disk.path().join("fresh"), disk.path().join("file"));
    std::fs::write(&fresh, "x".repeat(5000)).expect("written");
    std::fs::rename(&fresh, &path).expect("renamed");
    disk.cut_power();
    let left = match std::fs::read(&path) {
        Ok(bytes) => bytes.len(),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => 0,
        Err(error) => panic!("{error}"),
    };
    assert_eq!(left, 0, "the other tests here prove nothing");
}

#[test]
fn what_a_recorded_change_set_names_outlives_a_power_cut() {
    let disk = Disk::new();
    let shelf = shelf_in(&disk.path());
    let (mut batch, contents) = (shelf.batch(), contents());
    let mut put = |(number, content): (usize, &Vec<u8>)| {
        let (id, bytes, _) = batch.put(&mut &content[..], u64::MAX, 0).expect("taken").expect("short");
        let node = Node::File { mode: 0o644, bytes, blob: Some(id) };
        entry(format!("file{number:02}"), None, Some(node))
    };
    let entries = contents.iter().enumerate().map(&mut put).collect();
    batch.keep().expect("kept");
    let changes = set(entries, None);
    let hash = shelf.put_changes(&changes).expect("recorded");
    disk.cut_power();
    assert_eq!(shelf.changes().expect("read"), Some((changes.clone(), hash)));
    for (entry, content) in changes.entries.iter().zip(&contents) {
        let Some(Node::File { blob: Some(id), .. }) = &entry.after else { panic!("no content") };
        assert_eq!(&whole(&shelf, id), content);
    }
    assert_eq!(names(&shelf).len(), contents.len());
}

#[test]
fn a_power_cut_before_the_change_set_leaves_no_half_content_under_a_name() {
    for keep in [false, true] {
        let disk = Disk::new();
        let shelf = shelf_in(&disk.path());
        disk.flush();
        let mut batch = shelf.batch();
        for content in contents() {
            batch.put(&mut &content[..], u64::MAX, 0).expect("taken").expect("short");
        }
        if keep {
            batch.keep().expect("kept");
        } else {
            // It cannot tidy up after itself.
            disk.off().now();
        }
        drop(batch);
        disk.cut_power();
        assert!(shelf.changes().expect("read").is_none());
        shelf.tidy().expect("tidied");
        for name in names(&shelf) {
            whole(&shelf, &serde_json::from_value(name.into()).expect("a content's name"));
        }
    }
}
