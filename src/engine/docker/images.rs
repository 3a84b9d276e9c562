//! The image half of `Docker`: looking up, pulling, building, importing, and looking for paths in an image
//! without running anything of it. References are checked before they become part of a request.

use std::collections::HashMap;
use std::path::Path;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use serde_json::json;
use tokio::time::Instant;

use super::client::errors::Error as ApiError;
use super::client::models::{BuildInfo, CreateImageInfo, ImageInspect};
use super::client::{body_full, body_try_stream, query_parameters as query};
use super::{ASK_MS_MAX, CREATE_MS_MAX, Docker, closed, parse_body, translate};
use crate::engine::{
    BuildContext, BuildSpec, ContainerId, EngineError, ImageInfo, LABEL_INSTANCE, Progress, config,
    normalise_arch,
};
use crate::job::InstanceId;

/// An image removal may delete gigabytes.
const IMAGE_REMOVE_MS_MAX: u64 = 120_000;
/// Pull, build or import of one image.
pub(super) const IMAGE_MS_MAX: u64 = 45 * 60_000;
/// Symlinks followed by `probe_paths`.
const LINKS_MAX: usize = 8;
/// One line of progress, in characters.
pub(super) const PROGRESS_CHARS_MAX: usize = 2_000;

impl Docker {
    pub(super) async fn find_image(&self, reference: &str) -> Result<Option<ImageInfo>, EngineError> {
        check_reference(reference)?;
        match self.call("inspect an image", ASK_MS_MAX, self.api.inspect_image(reference)).await {
            Ok(found) => image_info(found).map(Some),
            Err(EngineError::NotFound { .. }) => Ok(None),
            Err(e) => Err(e),
        }
    }

    pub(super) async fn made_image(&self, reference: &str) -> Result<ImageInfo, EngineError> {
        let missing = || EngineError::ImageMissing { image: reference.to_owned() };
        self.find_image(reference).await?.ok_or_else(missing)
    }

    /// Follows a pull, build or import to its end.
    pub(super) async fn follow<T: Step>(
        &self,
        what: String,
        mut steps: impl Stream<Item = Result<T, ApiError>> + Unpin,
        progress: &Progress,
    ) -> Result<(), EngineError> {
        let deadline = Instant::now() + Duration::from_millis(IMAGE_MS_MAX);
        loop {
            let Ok(step) = tokio::time::timeout_at(deadline, steps.next()).await else {
                return Err(EngineError::Timeout { what: "make the image", after_ms: IMAGE_MS_MAX });
            };
            let step = match step {
                None => return Ok(()),
                Some(Ok(step)) => step,
                Some(Err(ApiError::DockerStreamError { error: message })) => {
                    return Err(EngineError::ImageFailed { what, message });
                }
                Some(Err(e)) => return Err(translate(&self.address, "make the image", e)),
            };
            if let Some(message) = step.failure() {
                return Err(EngineError::ImageFailed { what, message });
            }
            for line in step.text().lines().filter(|line| !line.trim().is_empty()) {
                // Full or closed: whoever watches is not to slow this down.
                let _ = progress.try_send(line.chars().take(PROGRESS_CHARS_MAX).collect());
            }
        }
    }

    pub(super) async fn pull_image(
        &self,
        reference: &str,
        progress: &Progress,
    ) -> Result<ImageInfo, EngineError> {
        check_reference(reference)?;
        // Without a tag the engine would fetch every tag there is.
        let reference = with_tag(reference);
        let options = query::CreateImageOptionsBuilder::new().from_image(&reference).build();
        let steps = self.api.create_image(Some(options), None, None);
        self.follow(format!("pull {reference}"), steps, progress).await?;
        self.made_image(&reference).await
    }

    pub(super) async fn build_image(
        &self,
        spec: &BuildSpec,
        progress: &Progress,
    ) -> Result<ImageInfo, EngineError> {
        check_reference(&spec.tag)?;
        let body = match &spec.context {
            BuildContext::Bytes(bytes) => body_full(bytes.clone()),
            BuildContext::File(path) => file_body(path).await?,
        };
        let labels: HashMap<String, String> = spec.labels.clone().into_iter().collect();
        let args: HashMap<String, String> = spec.build_args.clone().into_iter().collect();
        let options = query::BuildImageOptionsBuilder::new()
            .dockerfile(&spec.dockerfile)
            .t(&spec.tag)
            .labels(&labels)
            .buildargs(&args)
            .rm(true)
            .forcerm(true)
            .build();
        let steps = self.api.build_image(options, None, Some(body));
        self.follow(format!("build {}", spec.tag), Box::pin(steps), progress).await?;
        self.made_image(&spec.tag).await
    }

    pub(super) async fn import_image(
        &self,
        rootfs_tar: &Path,
        tag: &str,
        changes: &[String],
        progress: &Progress,
    ) -> Result<ImageInfo, EngineError> {
        check_reference(tag)?;
        let body = file_body(rootfs_tar).await?;
        let (repo, label) = split_tag(tag);
        let options = query::CreateImageOptionsBuilder::new()
            .from_src("-")
            .repo(repo)
            .tag(label)
            .changes(changes.to_vec())
            .build();
        let steps = self.api.create_image(Some(options), Some(body), None);
        self.follow(format!("import {tag}"), steps, progress).await?;
        self.made_image(tag).await
    }

    pub(super) async fn tag_image(&self, image: &str, reference: &str) -> Result<(), EngineError> {
        check_reference(image)?;
        check_reference(reference)?;
        let (repo, tag) = split_tag(reference);
        let options = query::TagImageOptionsBuilder::new().repo(repo).tag(tag).build();
        self.call("tag an image", ASK_MS_MAX, self.api.tag_image(image, Some(options))).await
    }

    pub(super) async fn forget_image(&self, reference: &str) -> Result<(), EngineError> {
        check_reference(reference)?;
        let options = query::RemoveImageOptionsBuilder::new().build();
        let call = self.api.remove_image(reference, Some(options), None);
        match self.call("remove an image", IMAGE_REMOVE_MS_MAX, call).await {
            Ok(_) | Err(EngineError::NotFound { .. }) => Ok(()),
            Err(e) => Err(e),
        }
    }

    pub(super) async fn probe(
        &self,
        instance: &InstanceId,
        image_id: &str,
        paths: &[&str],
    ) -> Result<Vec<bool>, EngineError> {
        config::check_image_id(image_id)?;
        let body = parse_body(json!({
            "Image": image_id,
            "Entrypoint": ["/.hotcell-never-started"],
            "Labels": { LABEL_INSTANCE: instance.as_str() },
            "HostConfig": { "NetworkMode": "none", "ReadonlyRootfs": true, "CapDrop": ["ALL"] },
        }))?;
        let helper = {
            let _permit = self.creates.acquire().await.map_err(closed)?;
            let call = self.api.create_container(None, body);
            match self.call("create a container", CREATE_MS_MAX, call).await {
                Ok(made) => ContainerId::new(made.id),
                Err(EngineError::NotFound { .. }) => {
                    return Err(EngineError::ImageMissing { image: image_id.to_owned() });
                }
                Err(e) => return Err(e),
            }
        };
        let mut found = Vec::with_capacity(paths.len());
        let mut failure = None;
        for path in paths {
            match self.path_exists(&helper, path).await {
                Ok(exists) => found.push(exists),
                Err(e) => {
                    failure = Some(e);
                    break;
                }
            }
        }
        self.remove_container(&helper).await?;
        failure.map_or(Ok(found), Err)
    }

    async fn path_exists(&self, container: &ContainerId, path: &str) -> Result<bool, EngineError> {
        let mut path = path.to_owned();
        for _ in 0..LINKS_MAX {
            let options = query::ContainerArchiveInfoOptionsBuilder::new().path(&path).build();
            let call = self.api.get_container_archive_info(container.as_str(), Some(options));
            match self.call("look for a path", ASK_MS_MAX, call).await {
                Ok(stat) if stat.link_target.is_empty() || stat.link_target == path => return Ok(true),
                Ok(stat) => path = stat.link_target,
                Err(EngineError::NotFound { .. }) => return Ok(false),
                Err(e) => return Err(e),
            }
        }
        Ok(false)
    }
}

/// One step of a pull, build or import, as the engine reports it.
pub(super) trait Step {
    fn failure(&self) -> Option<String>;
    fn text(&self) -> String;
}

impl Step for CreateImageInfo {
    fn failure(&self) -> Option<String> {
        self.error_detail.as_ref().map(|detail| detail.message.clone().unwrap_or_default())
    }
    fn text(&self) -> String {
        let part = |text: &Option<String>| text.clone().unwrap_or_default();
        // Byte counts of a layer come many times a second and say little.
        let counting = self.progress_detail.as_ref().is_some_and(|p| p.current.is_some());
        if counting {
            String::new()
        } else {
            format!("{} {}", part(&self.id), part(&self.status)).trim().to_owned()
        }
    }
}

impl Step for BuildInfo {
    fn failure(&self) -> Option<String> {
        self.error_detail.as_ref().map(|detail| detail.message.clone().unwrap_or_default())
    }
    fn text(&self) -> String {
        let status = self.status.clone().filter(|_| self.progress_detail.is_none());
        self.stream.clone().or(status).unwrap_or_default()
    }
}

fn image_info(found: ImageInspect) -> Result<ImageInfo, EngineError> {
    let incomplete = || EngineError::Protocol { what: "inspect an image", detail: "it has no id".to_owned() };
    let config = found.config.unwrap_or_default();
    let variable =
        |text: &String| text.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()));
    let env = config.env.unwrap_or_default().iter().filter_map(variable).collect();
    Ok(ImageInfo {
        id: found.id.ok_or_else(incomplete)?,
        arch: normalise_arch(&found.architecture.unwrap_or_default()),
        os: found.os.unwrap_or_default(),
        labels: config.labels.unwrap_or_default().into_iter().collect(),
        env,
        size_bytes: found.size.unwrap_or(0).max(0).unsigned_abs(),
        volumes: config.volumes.unwrap_or_default(),
        on_build: config.on_build.is_some_and(|lines| !lines.is_empty()),
    })
}

/// The request body of the client library, which gives it no public name.
pub(super) type Body =
    http_body_util::Either<http_body_util::Full<Bytes>, http_body_util::StreamBody<Frames>>;
type Frames = Pin<Box<dyn Stream<Item = Result<hyper::body::Frame<Bytes>, std::io::Error>> + Send>>;

/// A file as a request body, read as it is sent.
async fn file_body(path: &Path) -> Result<Body, EngineError> {
    let unreadable = |e: std::io::Error| EngineError::File { path: path.to_owned(), detail: e.to_string() };
    Ok(file_stream(tokio::fs::File::open(path).await.map_err(unreadable)?))
}

/// What is left of an open file, likewise.
pub(super) fn file_stream(file: tokio::fs::File) -> Body {
    body_try_stream(tokio_util::io::ReaderStream::with_capacity(file, 256 * 1024))
}

/// References go into request paths: only what a reference may hold.
pub(super) fn check_reference(reference: &str) -> Result<(), EngineError> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-' | b'/' | b':' | b'@');
    let bad = reference.is_empty()
        || reference.len() > 512
        || !reference.bytes().all(plain)
        || reference.contains("..");
    if bad || reference.starts_with(['/', '-', '.']) {
        let shown: String = reference.chars().take(80).collect();
        return Err(EngineError::BadSpec { reason: format!("{shown:?} is no image reference") });
    }
    Ok(())
}

/// Name and tag; no tag for a digest, `latest` where there is none.
pub(super) fn split_tag(reference: &str) -> (&str, &str) {
    match reference.rsplit_once(':') {
        _ if reference.contains('@') => (reference, ""),
        Some((name, tag)) if !tag.contains('/') => (name, tag),
        _ => (reference, "latest"),
    }
}

fn with_tag(reference: &str) -> String {
    match split_tag(reference) {
        (name, "") => name.to_owned(),
        (name, tag) => format!("{name}:{tag}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn references_are_split_at_the_tag_and_not_at_the_port() {
        assert_eq!(split_tag("hotcell/cell"), ("hotcell/cell", "latest"));
        assert_eq!(split_tag("127.0.0.1:5000/cell"), ("127.0.0.1:5000/cell", "latest"));
        assert_eq!(split_tag("127.0.0.1:5000/cell:v1"), ("127.0.0.1:5000/cell", "v1"));
        assert_eq!(with_tag("cell"), "cell:latest");
        let digest = format!("cell@sha256:{}", "0".repeat(64));
        assert_eq!(with_tag(&digest), digest);
    }

    #[test]
    fn a_reference_cannot_leave_its_place_in_a_request() {
        for bad in ["", "../info", "a/../b", "/x", "a?b", "a b", "a%2fb", "-x", "a\nb"] {
            assert!(matches!(check_reference(bad), Err(EngineError::BadSpec { .. })), "{bad:?}");
        }
        let id = format!("sha256:{}", "0".repeat(64));
        for good in ["node:22-bookworm-slim", "127.0.0.1:5000/a/b_c.d:v1", id.as_str()] {
            assert_eq!(check_reference(good), Ok(()));
        }
    }
}
