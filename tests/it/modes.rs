//! The permission modes of the CLI below the policy of hotcell: the same calls, in every mode, under rules and under a
//! project's own settings, by the bare CLI and in a cell; and the race of a repository's hooks against the gate.

mod bare;
mod races;
mod table;

use serde_json::json;

use crate::world::World;

#[test]
fn auto_is_refused_by_name() {
    let world = World::new("[default]\ntext = \"done\"\n");
    let answer =
        world.call("POST", "/v1/jobs", &json!({ "prompt": "x", "permission_mode": "auto" }).to_string());
    assert_eq!(answer.status, 400, "{}", answer.body);
    assert!(
        answer.body.contains("auto")
            && answer.body.contains("permission_mode") | answer.body.contains("variant"),
        "{}",
        answer.body
    );
    assert!(answer.body.contains("bypassPermissions"), "what there is instead: {}", answer.body);
    world.end();
}
