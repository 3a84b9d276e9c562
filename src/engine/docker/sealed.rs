//! A build of a recipe that nobody trusts, and what builds leave behind. The commands of such a recipe run in containers
//! that the engine's own builder makes: what they are held by is in the request. It must never let them have the
//! engine's usual network, and never pull.

use std::collections::HashMap;

use super::client::query_parameters as query;
use super::images::{check_reference, file_stream};
use super::{ASK_MS_MAX, Docker};
use crate::engine::{EngineError, ImageInfo, LABEL_BUILD, LABEL_INSTANCE, Progress, SealedBuild};
use crate::job::{InstanceId, JobId};

/// The period that a quota of CPU time is for, in microseconds.
const CPU_PERIOD_US: i32 = 100_000;

impl Docker {
    pub(super) async fn build_apart(
        &self,
        build: SealedBuild,
        progress: &Progress,
    ) -> Result<ImageInfo, EngineError> {
        check_reference(&build.tag)?;
        let network = match &build.network {
            Some(container) => {
                check_reference(container.as_str())?;
                format!("container:{container}")
            }
            None => "none".to_owned(),
        };
        let labels: HashMap<String, String> = build.labels.into_iter().collect();
        let args: HashMap<String, String> = build.args.into_iter().collect();
        let memory = i32::try_from(build.memory_bytes).unwrap_or(i32::MAX);
        let quota = i32::try_from(u64::from(build.cpus_milli) * 100).unwrap_or(i32::MAX);
        let options = query::BuildImageOptionsBuilder::new()
            .dockerfile(&build.dockerfile)
            .t(&build.tag)
            .labels(&labels)
            .buildargs(&args)
            .networkmode(&network)
            .memory(memory)
            .memswap(memory)
            .cpuperiod(CPU_PERIOD_US)
            .cpuquota(quota.max(1000))
            // What another user's build made is not this one's.
            .nocache(true)
            .rm(true)
            .forcerm(true)
            .build();
        let steps = self.api.build_image(options, None, Some(file_stream(build.context.into())));
        self.follow(format!("build {}", build.tag), Box::pin(steps), progress).await?;
        self.made_image(&build.tag).await
    }

    pub(super) async fn list_loose(
        &self,
        instance: &InstanceId,
    ) -> Result<Vec<(String, Option<JobId>)>, EngineError> {
        let filters = HashMap::from([
            ("dangling", vec!["true".to_owned()]),
            ("label", vec![format!("{LABEL_INSTANCE}={instance}")]),
        ]);
        let options = query::ListImagesOptionsBuilder::new().filters(&filters).build();
        let rows = self.call("list images", ASK_MS_MAX, self.api.list_images(Some(options))).await?;
        let job =
            |labels: &HashMap<String, String>| labels.get(LABEL_BUILD).and_then(|text| text.parse().ok());
        Ok(rows.into_iter().map(|row| (row.id, job(&row.labels))).collect())
    }
}
