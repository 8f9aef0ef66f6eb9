//! The engine inside this process, as a library user would start it: a model, adapters from PEFT directories, rows that
//! are submitted together. What the shell around it costs is the difference to `daemon`.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use espalier_adapters::ops::Backend;
use espalier_adapters::version::{AdapterArtifact, VersionDigest};
use espalier_engine::adapter_loader::{AdapterSource, SourceError};
use espalier_engine::config::EngineConfig;
use espalier_engine::handle::EngineHandle;
use espalier_engine::model::Dtype;
use espalier_engine::request::{
    Event, Generate, Priority, Request, RequestKind, StopConditions, TargetVersion,
};
use rand::{Rng, SeedableRng};
use tokio::sync::mpsc;

use crate::Fallible;

/// Artifacts read from directories and named by their digests.
struct Directories(Vec<(VersionDigest, AdapterArtifact)>);

impl AdapterSource for Directories {
    fn fetch(&self, digest: &VersionDigest, _: Vec<u8>) -> Result<AdapterArtifact, SourceError> {
        let found = self.0.iter().find(|(known, _)| known == digest);
        found
            .map(|(_, artifact)| artifact.clone())
            .ok_or(SourceError::NotFound)
    }
}

/// One row: its adapter (none is the base) and its prompt.
pub type Row = (Option<VersionDigest>, Vec<u32>);

/// Random prompts of `tokens` ids, no two alike at their beginning. The range is the peer scripts' own.
#[must_use]
pub fn prompts(rows: usize, tokens: usize, seed: u64) -> Vec<Vec<u32>> {
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    let prompt = |_| {
        (0..tokens)
            .map(|_| random.random_range(100..40_000))
            .collect()
    };
    (0..rows).map(prompt).collect()
}

/// Starts an engine that knows these adapters; says their digests in the order of the directories.
///
/// # Errors
/// Files that cannot be read, or a model that cannot be loaded.
pub fn start(
    model: &str,
    dtype: Dtype,
    config: EngineConfig,
    directories: &[PathBuf],
) -> Fallible<(EngineHandle, Vec<VersionDigest>)> {
    let artifacts: Vec<_> = directories
        .iter()
        .map(|path| read_artifact(path))
        .collect::<Fallible<_>>()?;
    let digests = artifacts.iter().map(|(digest, _)| *digest).collect();
    let source = Arc::new(Directories(artifacts));
    let engine = EngineHandle::start(
        config,
        Backend::default(),
        espalier_engine::model::load_as(model, dtype)?,
        source,
    )?;
    Ok((engine, digests))
}

/// Seconds until every row has its `new` tokens, all submitted at once.
///
/// # Errors
/// A row that fails, or that ends with another number of tokens.
pub async fn batch(engine: &EngineHandle, rows: &[Row], new: usize) -> Fallible<f64> {
    let begin = Instant::now();
    let mut streams = Vec::new();
    for (i, (digest, prompt)) in rows.iter().enumerate() {
        let target = digest.map(|digest| TargetVersion {
            digest,
            weight: 1.0,
        });
        streams.push(engine.submit(Request {
            id: format!("row-{i}"),
            tenant: Arc::from("bench"),
            target: target.into_iter().collect(),
            require_resident: false,
            priority: Priority::Interactive,
            kind: RequestKind::Generate(Generate {
                prompt: prompt.clone(),
                stop: StopConditions {
                    max_tokens: Some(new),
                    ignore_eos: true,
                    ..StopConditions::default()
                },
                ..Generate::default()
            }),
            deadline: None,
            received: begin,
        })?);
    }
    // Side by side: a row whose events nobody takes pauses.
    futures::future::try_join_all(streams.into_iter().map(|stream| finish(stream, new))).await?;
    Ok(begin.elapsed().as_secs_f64())
}

async fn finish(mut stream: mpsc::Receiver<Event>, new: usize) -> Fallible<()> {
    loop {
        match stream.recv().await.ok_or("the engine stopped")? {
            Event::Done { usage, .. } if usage.output_tokens == new => return Ok(()),
            Event::Done { usage, .. } => {
                return Err(format!("{} tokens instead of {new}", usage.output_tokens).into());
            }
            Event::Failed(error) => return Err(error.into()),
            _ => {}
        }
    }
}

fn read_artifact(path: &Path) -> Fallible<(VersionDigest, AdapterArtifact)> {
    let artifact = AdapterArtifact {
        config_json: std::fs::read(path.join(AdapterArtifact::CONFIG_FILE))?,
        safetensors: std::fs::read(path.join(AdapterArtifact::WEIGHTS_FILE))?,
        labels_json: None,
        head_json: None,
    };
    Ok((artifact.digest(), artifact))
}
