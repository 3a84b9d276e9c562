//! An image from another one: what a program of ours changes in a container of it, kept under a name.
//!
//! For recipes of hotcell's own alone. The container has no network and nothing of the host but one directory; it
//! is gone when this returns, whatever came of it.

use std::time::Duration;

use futures_util::StreamExt;
use serde_json::json;
use tokio::time::Instant;

use super::client::container::LogOutput;
use super::client::errors::Error as ApiError;
use super::client::models::ContainerConfig;
use super::client::query_parameters as query;
use super::images::{IMAGE_MS_MAX, PROGRESS_CHARS_MAX, check_reference, split_tag};
use super::{ASK_MS_MAX, CREATE_MS_MAX, Docker, START_MS_MAX, closed, parse_body};
use crate::engine::{ContainerId, EngineError, Extend, Progress, config, tail};

/// Writing a layer of some gigabytes.
const KEEP_MS_MAX: u64 = 600_000;

impl Docker {
    pub(super) async fn extend_image(&self, spec: &Extend, progress: &Progress) -> Result<(), EngineError> {
        config::check_image_id(&spec.image_id)?;
        check_reference(&spec.container)?;
        if let Some(tag) = &spec.keep_as {
            check_reference(tag)?;
        }
        let made = self.create_helper(spec).await?;
        // What a broken-off build left under this name was removed; ours goes whatever happens.
        let done = self.run_and_keep(&made, spec, progress).await;
        self.remove_container(&made).await?;
        done
    }

    async fn create_helper(&self, spec: &Extend) -> Result<ContainerId, EngineError> {
        let body = json!({
            "Image": spec.image_id,
            // Not as entry point, nor with a user: the image that is kept would have both.
            "Cmd": spec.command,
            "HostConfig": {
                "NetworkMode": "none",
                "Binds": [format!("{}:/mnt", spec.dir.display())],
                "SecurityOpt": ["no-new-privileges"],
            },
        });
        let name = ContainerId::new(spec.container.clone());
        let _permit = self.creates.acquire().await.map_err(closed)?;
        for left_over in [true, false] {
            let options = query::CreateContainerOptionsBuilder::new().name(name.as_str()).build();
            let call = self.api.create_container(Some(options), parse_body(body.clone())?);
            match self.call("create a container", CREATE_MS_MAX, call).await {
                Ok(made) => return Ok(ContainerId::new(made.id)),
                Err(EngineError::NotFound { .. }) => {
                    return Err(EngineError::ImageMissing { image: spec.image_id.clone() });
                }
                Err(EngineError::Conflict { what, message }) => {
                    let state = self.inspect(&name).await?.state.unwrap_or_default();
                    if state.running == Some(true) || !left_over {
                        return Err(EngineError::Conflict { what, message });
                    }
                    self.remove_container(&name).await?;
                }
                Err(e) => return Err(e),
            }
        }
        let message = format!("{name} is there again and again");
        Err(EngineError::Conflict { what: "create a container", message })
    }

    async fn run_and_keep(
        &self,
        made: &ContainerId,
        spec: &Extend,
        progress: &Progress,
    ) -> Result<(), EngineError> {
        let options =
            query::AttachContainerOptionsBuilder::new().stream(true).stdout(true).stderr(true).build();
        let call = self.api.attach_container(made.as_str(), Some(options));
        let attached = self.call("attach to a container", ASK_MS_MAX, call).await?;
        let call = self.api.start_container(made.as_str(), None::<query::StartContainerOptions>);
        self.call("start a container", START_MS_MAX, call).await?;
        let heard = |frame: Result<LogOutput, ApiError>| {
            let bytes = frame.map(LogOutput::into_bytes).ok();
            let text = bytes.as_deref().map(String::from_utf8_lossy).unwrap_or_default();
            for line in text.lines().filter(|line| !line.trim().is_empty()) {
                // Full or closed: whoever watches is not to slow this down.
                let _ = progress.try_send(line.chars().take(PROGRESS_CHARS_MAX).collect());
            }
            drop(text);
            std::future::ready(bytes)
        };
        // An error of the stream ends it; how the container ended is asked below.
        let chunks = Box::pin(attached.output.scan((), move |(), frame| heard(frame)));
        let deadline = Instant::now() + Duration::from_millis(IMAGE_MS_MAX);
        let late = |_| EngineError::Timeout { what: "make the image", after_ms: IMAGE_MS_MAX };
        let said = tokio::time::timeout_at(deadline, tail::collect(chunks)).await.map_err(late)?;
        let exit = tokio::time::timeout_at(deadline, self.wait_for_exit(made)).await.map_err(late)??;
        let what = format!("run the recipe of {}", spec.container);
        if exit.code != 0 {
            let said = exit.error.unwrap_or(said);
            let message = format!("exit code {}; the end of its output:\n{}", exit.code, said.trim_end());
            return Err(EngineError::ImageFailed { what, message });
        }
        let Some(tag) = &spec.keep_as else { return Ok(()) };
        let (repo, label) = split_tag(tag);
        let changes = spec.changes.join("\n");
        let options = query::CommitContainerOptionsBuilder::new()
            .container(made.as_str())
            .repo(repo)
            .tag(label)
            .changes(&changes)
            .build();
        let call = self.api.commit_container(options, ContainerConfig::default());
        self.call("keep a container as an image", KEEP_MS_MAX, call).await.map(drop)
    }
}
