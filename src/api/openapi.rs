//! `GET /v1/openapi.json`: the API's own description, OpenAPI 3.1, its schemas made from the wire types.

use axum::Json;
use serde_json::{Value, json};

use super::cache::{CacheRemoved, CacheView};
use super::changes::ChangesView;
use super::cost::{BudgetList, CostReport};
use super::daemon::{EndingView, PauseView};
use super::gc::GcView;
use super::notices::{NoticesView, TestView};
use super::queue::QueueView;
use super::wire::{AttackRequest, Doctor, ErrorBody, Health, JobList, JobView, WhoAmI};
use crate::audit::Record;
use crate::change::decision::{ApplyAnswer, ApplyRequest, CheckoutAnswer, CheckoutRequest};
use crate::job::{JobSpec, State as JobState};

/// Answers with the document.
pub async fn document() -> Json<Value> {
    Json(openapi())
}

/// The JSON Schema of a job spec, as `hotcell schema` prints it.
pub fn job_spec_schema() -> Value {
    schemars::schema_for!(JobSpec).to_value()
}

/// The document.
pub fn openapi() -> Value {
    let mut generator = schemars::generate::SchemaSettings::openapi3()
        .with(|s| s.definitions_path = "/components/schemas".into())
        .into_generator();
    for _ in [
        generator.subschema_for::<JobSpec>(),
        generator.subschema_for::<JobView>(),
        generator.subschema_for::<JobList>(),
        generator.subschema_for::<CostReport>(),
        generator.subschema_for::<BudgetList>(),
        generator.subschema_for::<CacheView>(),
        generator.subschema_for::<CacheRemoved>(),
        generator.subschema_for::<GcView>(),
        generator.subschema_for::<NoticesView>(),
        generator.subschema_for::<TestView>(),
        generator.subschema_for::<ChangesView>(),
        generator.subschema_for::<ApplyRequest>(),
        generator.subschema_for::<ApplyAnswer>(),
        generator.subschema_for::<CheckoutRequest>(),
        generator.subschema_for::<CheckoutAnswer>(),
        generator.subschema_for::<EndingView>(),
        generator.subschema_for::<PauseView>(),
        generator.subschema_for::<QueueView>(),
        generator.subschema_for::<Health>(),
        generator.subschema_for::<Doctor>(),
        generator.subschema_for::<AttackRequest>(),
        generator.subschema_for::<WhoAmI>(),
        generator.subschema_for::<Record>(),
        generator.subschema_for::<ErrorBody>(),
    ] {}
    let schemas = generator.take_definitions(true);
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "hotcell",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Coding agents in disposable containers. HTTP/1.1 on a unix socket; who asks is told by the kernel.",
        },
        "paths": paths(),
        "components": { "schemas": schemas },
    })
}

fn content(name: &str) -> Value {
    json!({ "application/json": { "schema": { "$ref": format!("#/components/schemas/{name}") } } })
}

fn answer(description: &str, name: &str) -> Value {
    json!({ "description": description, "content": content(name) })
}

fn query(name: &str, description: &str) -> Value {
    json!({ "name": name, "in": "query", "required": false, "description": description, "schema": { "type": "string" } })
}

/// A stream of records, and the parameters that choose them.
fn audit(operation: &str, summary: &str, more: Vec<Value>) -> Value {
    let common = [
        query("follow", "1: wait for more"),
        query(
            "kind",
            "tool, egress, request, charge, refused, budget, stop, limit, end, credential; several with commas",
        ),
        query("denied", "1: only what was denied or refused"),
        query("since_ms", "at or after, in milliseconds since 1970"),
    ];
    let parameters: Vec<Value> = more.into_iter().chain(common).collect();
    let records = json!({ "application/x-ndjson": { "schema": { "$ref": "#/components/schemas/Record" } } });
    json!({ "get": {
        "operationId": operation, "summary": summary, "parameters": parameters,
        "responses": {
            "200": { "description": "One record a line", "content": records },
            "default": answer("What went wrong, whose fault it is, and what to do", "ErrorBody"),
        },
    } })
}

fn paths() -> Value {
    let mut all = serde_json::Map::new();
    for paths in
        [jobs(), one_job(), changes_of_jobs(), told_of_jobs(), of_the_daemon(), to_the_daemon(), cache()]
    {
        if let Value::Object(paths) = paths {
            all.extend(paths);
        }
    }
    all.into()
}

fn id() -> Value {
    json!({ "name": "id", "in": "path", "required": true, "schema": { "type": "string" } })
}

fn error() -> Value {
    answer("What went wrong, whose fault it is, and what to do", "ErrorBody")
}

/// Submitting and listing.
fn jobs() -> Value {
    json!({
        "/v1/jobs": {
            "post": {
                "operationId": "submitJob",
                "summary": "Submit a job",
                "parameters": [{
                    "name": "Idempotency-Key", "in": "header", "required": false,
                    "description": "Counts per user: the same key with the same spec is the same job, with another spec a conflict.",
                    "schema": { "type": "string", "maxLength": 255 },
                }],
                "requestBody": { "required": true, "content": content("JobSpec") },
                "responses": {
                    "201": answer("The new job", "JobView"),
                    "200": answer("The job that this key submitted before", "JobView"),
                    "default": error(),
                },
            },
            "get": {
                "operationId": "listJobs",
                "summary": "List jobs, newest first",
                "parameters": [
                    query("state", &format!("{}; several with commas", JobState::NAMES.join(", "))),
                    query("label", "name=value; may be given more than once"),
                    query("policy", "name of the policy"),
                    query("model", "name of the model"),
                    query("since_ms", "submitted at or after, in milliseconds since 1970"),
                    query("until_ms", "submitted before, in milliseconds since 1970"),
                    query("limit", "jobs of a page, 1 to 1000"),
                    query("cursor", "next_cursor of the page before"),
                    query("all", "1: jobs of all users, for admins"),
                ],
                "responses": { "200": answer("A page of jobs", "JobList"), "default": error() },
            },
        },
    })
}

/// Showing, stopping, deleting.
fn one_job() -> Value {
    json!({
        "/v1/jobs/{id}": {
            "get": {
                "operationId": "showJob", "summary": "Show a job", "parameters": [id()],
                "responses": { "200": answer("The job", "JobView"), "default": error() },
            },
            "delete": {
                "operationId": "deleteJob", "summary": "Delete a job that is over, with its events; its audit is kept",
                "parameters": [id()],
                "responses": { "204": { "description": "It is gone" }, "default": error() },
            },
        },
        "/v1/jobs/{id}/attach": {
            "post": {
                "operationId": "attachJob",
                "summary": "Take part in the command of a job: input, output, terminal and signals as frames on the same connection",
                "description": "Asks for `Upgrade: hotcell-attach`. A frame is a byte for its kind, the payload's length in four bytes (little endian), and the payload. From the daemon: 1 stdout, 2 stderr, 3 exit code (4 bytes, the last frame). From the client: 16 stdin, 17 end of input, 18 terminal size (rows and cols, 2 bytes each), 19 signal (1 byte). A client that leaves ends the command.",
                "parameters": [id()],
                "responses": { "101": { "description": "Frames follow" }, "default": error() },
            },
        },
        "/v1/jobs/{id}/cancel": {
            "post": {
                "operationId": "cancelJob", "summary": "Stop a job; harmless when it is over", "parameters": [id()],
                "responses": {
                    "202": answer("It is being stopped", "JobView"),
                    "200": answer("It is over", "JobView"),
                    "default": error(),
                },
            },
        },
        "/v1/jobs/{id}/unpark": {
            "post": {
                "operationId": "unparkJob", "summary": "Let a parked job go on before its time", "parameters": [id()],
                "responses": { "200": answer("It waits for a slot", "JobView"), "default": error() },
            },
        },
        "/v1/jobs/{id}/retry": {
            "post": {
                "operationId": "retryJob", "summary": "Submit the task of a job that is over once more", "parameters": [id()],
                "responses": {
                    "200": answer("The same key came before: that job", "JobView"),
                    "201": answer("The new job", "JobView"),
                    "default": error(),
                },
            },
        },
    })
}

/// What a job did and left.
/// What a job changed, and what becomes of it.
fn changes_of_jobs() -> Value {
    let bytes =
        |kind: &str| json!({ "200": { "description": "It", "content": { kind: {} } }, "default": error() });
    let post = |operation: &str, summary: &str, asks: Option<&str>, gives: &str| {
        let mut of = json!({
            "operationId": operation, "summary": summary, "parameters": [id()],
            "responses": { "200": answer("What was done", gives), "default": error() },
        });
        if let Some(asks) = asks {
            of["requestBody"] = json!({ "required": true, "content": content(asks) });
        }
        json!({ "post": of })
    };
    json!({
        "/v1/jobs/{id}/changes": { "get": {
            "operationId": "jobChanges", "summary": "What the job changed in its copy of the workspace",
            "parameters": [id()],
            "responses": { "200": answer("The change set", "ChangesView"), "default": error() },
        } },
        "/v1/jobs/{id}/diff": { "get": {
            "operationId": "jobDiff", "summary": "The same as text",
            "parameters": [
                id(), query("form", "patch, stat or name-only"),
                query("only", "a pattern as in .gitignore; may be given more than once"),
            ],
            "responses": bytes("text/plain"),
        } },
        "/v1/jobs/{id}/export": { "get": {
            "operationId": "exportChanges", "summary": "The same for other tools",
            "parameters": [id(), query("format", "patch, tar or bundle")],
            "responses": bytes("application/octet-stream"),
        } },
        "/v1/jobs/{id}/apply": post(
            "applyChanges", "Apply it to its submitter's files, all or nothing", Some("ApplyRequest"), "ApplyAnswer",
        ),
        "/v1/jobs/{id}/checkout": post(
            "checkoutChanges", "Write the workspace as the job left it to a new directory",
            Some("CheckoutRequest"), "CheckoutAnswer",
        ),
        "/v1/jobs/{id}/discard": post("discardChanges", "Note that nobody wants it", None, "JobView"),
    })
}

fn told_of_jobs() -> Value {
    json!({
        "/v1/jobs/{id}/support": {
            "get": {
                "operationId": "jobSupport",
                "summary": "What helps to find out what went wrong: an archive (tar, gzip) with a manifest, without secrets",
                "parameters": [
                    id(),
                    query("with_prompt", "1: with prompts and what the agent said"),
                    query("with_contents", "1: with what tools got and gave, and contents of files"),
                ],
                "responses": {
                    "200": { "description": "The archive", "content": { "application/gzip": {} } },
                    "default": error(),
                },
            },
        },
        "/v1/jobs/{id}/report": {
            "get": {
                "operationId": "jobReport",
                "summary": "The file that the job's policy keeps; not_found where there is none, or not yet",
                "parameters": [id()],
                "responses": {
                    "200": { "description": "The file's bytes, as the agent wrote them",
                             "content": { "application/octet-stream": {} } },
                    "default": error(),
                },
            },
        },
        "/v1/jobs/{id}/events": {
            "get": {
                "operationId": "followJob",
                "summary": "A job's events as NDJSON, or as server-sent events where Accept says text/event-stream",
                "parameters": [id(), query("from", "first number wanted"), query("follow", "1: wait for more until the job is over")],
                "responses": {
                    "200": { "description": "One event a line: seq, at_ms, origin, type and what belongs to it",
                             "content": { "application/x-ndjson": {}, "text/event-stream": {} } },
                    "default": error(),
                },
            },
        },
        "/v1/jobs/{id}/audit": audit(
            "auditJob",
            "What was decided in a job, removed ones too",
            vec![id(), query("after_seq", "number of the last event that is known")],
        ),
        "/v1/audit": audit(
            "audit",
            "What was decided in all jobs of the user, for admins in those of all users",
            vec![query("after", "JOB:SEQ, the last event of a job that is known; may be given more than once")],
        ),
    })
}

/// What is kept of package hosts.
fn cache() -> Value {
    let which = || {
        [query("policy", "only of this policy"), query("prefix", "only where the URL begins so; for admins")]
    };
    let mut of_delete = which().to_vec();
    of_delete.push(query("all", "1: all of it, where nothing else is named"));
    json!({
        "/v1/gc": { "post": {
            "operationId": "collectGarbage",
            "summary": "Remove what is older or more than [retention] keeps; for admins and the daemon's own user",
            "parameters": [query("dry_run", "1: remove nothing, only tell what would go")],
            "responses": { "200": answer("What goes, with its reason", "GcView"), "default": error() },
        } },
        "/v1/notices": { "get": {
            "operationId": "listNotices", "summary": "Who is told of what happens to jobs, and what waits; for admins",
            "responses": { "200": answer("Targets and notices", "NoticesView"), "default": error() },
        } },
        "/v1/notices/test": { "post": {
            "operationId": "testNotices", "summary": "Tell each target a word, now and once; for admins",
            "responses": { "200": answer("What became of it, a line for each target", "TestView"), "default": error() },
        } },
        "/v1/cache": {
            "get": {
                "operationId": "showCache",
                "summary": "What is kept of package hosts: for admins each entry, for others sizes by policy",
                "parameters": which(),
                "responses": { "200": answer("The cache", "CacheView"), "default": error() },
            },
            "delete": {
                "operationId": "clearCache", "summary": "Remove entries; for admins", "parameters": of_delete,
                "responses": { "200": answer("What is gone", "CacheRemoved"), "default": error() },
            },
        },
    })
}

/// What waits, and how the daemon is held or ended.
fn to_the_daemon() -> Value {
    let post = |operation: &str, summary: &str, status: &str, gives: &str| {
        json!({ "post": {
            "operationId": operation, "summary": format!("{summary}; for admins and the user it runs as"),
            "responses": { status: answer("What it does now", gives), "default": error() },
        } })
    };
    json!({
        "/v1/queue": { "get": {
            "operationId": "queue",
            "summary": "What waits, in the order in which it would start; others' jobs are shown to admins only",
            "responses": { "200": answer("The queue", "QueueView"), "default": error() },
        } },
        "/v1/daemon/drain": post(
            "drainDaemon", "End the daemon when running jobs have ended, within the drain limit", "202", "EndingView",
        ),
        "/v1/daemon/detach": post(
            "detachDaemon", "End the daemon; its cells go on and the next one adopts them", "202", "EndingView",
        ),
        "/v1/daemon/pause": post("pauseDaemon", "Start nothing, over a restart too", "200", "PauseView"),
        "/v1/daemon/resume": post("resumeDaemon", "Start again what waits", "200", "PauseView"),
    })
}

/// Who asks, what was spent, and how the daemon is.
fn of_the_daemon() -> Value {
    json!({
        "/v1/whoami": { "get": {
            "operationId": "whoami", "summary": "Who asks, and what they may do",
            "responses": { "200": answer("The user", "WhoAmI"), "default": error() },
        } },
        "/v1/cost": { "get": {
            "operationId": "cost", "summary": "What was spent; admins see everybody's, others their own",
            "parameters": [
                query("since", "a date (from its beginning, in the daemon's time zone) or an RFC 3339 time"),
                query("until", "a date (to its end) or an RFC 3339 time, which is not included"),
                query("by", "job, user, model (the default), policy, label, batch, credential, day or month"),
                query("label", "with by=label: the label whose values are added up"),
            ],
            "responses": { "200": answer("Sums by key, and their total", "CostReport"), "default": error() },
        } },
        "/v1/budgets": { "get": {
            "operationId": "budgets", "summary": "How the budgets of the asker's day, of the day and of the month stand",
            "responses": { "200": answer("The budgets that have a limit", "BudgetList"), "default": error() },
        } },
        "/v1/openapi.json": { "get": {
            "operationId": "openapi", "summary": "This document", "responses": { "200": { "description": "OpenAPI 3.1" } },
        } },
        "/v1/doctor": { "get": {
            "operationId": "doctor", "summary": "All that jobs need of this machine, and what to do where it is missing",
            "responses": { "200": answer("The checks", "Doctor"), "default": error() },
        }, "post": {
            "operationId": "attack",
            "summary": "The same, then real attacks from inside a cell under a policy: an ordinary job of the asker's",
            "requestBody": { "required": false, "content": content("AttackRequest") },
            "responses": { "200": answer("The checks, and each promise of the cell", "Doctor"), "default": error() },
        } },
        "/healthz": { "get": {
            "operationId": "health", "summary": "What works and what does not",
            "responses": { "200": answer("Health", "Health") },
        } },
        "/metrics": { "get": {
            "operationId": "metrics", "summary": "Prometheus metrics, text format 0.0.4",
            "responses": { "200": { "description": "Metrics", "content": { "text/plain": {} } } },
        } },
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reference_has_its_schema() {
        let document = openapi();
        let text = document.to_string();
        for part in text.split("#/components/schemas/").skip(1) {
            let name: String = part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            assert!(document["components"]["schemas"].get(&name).is_some(), "no schema {name}");
        }
    }

    #[test]
    fn the_schema_of_a_spec_refuses_unknown_keys() {
        assert_eq!(job_spec_schema()["additionalProperties"], false);
    }
}
