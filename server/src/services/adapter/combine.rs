//! Several versions of one tenant added up into a new one, which remembers what it was made of.

use std::collections::BTreeMap;
use std::sync::Arc;

use espalier_adapters::combine::{Term, combine};
use espalier_adapters::peft;
use espalier_adapters::profile::ServingProfile;
use espalier_adapters::version::AdapterArtifact;
use espalier_proto::v1;
use prost::Message;
use tonic::Code;

use super::upload::BaseOf;
use super::{AdapterService, convert, profile_limits};
use crate::artifact_store::{ArtifactStore, Pin, StoreError};
use crate::names::AdapterRef;
use crate::registry::{AliasPlan, Combined, NewVersion, Parent, Provenance, Publish, summarize};
use crate::services::Call;
use crate::services::control::request_key;
use crate::status::Refusal;

/// A version's files and what they are multiplied by.
struct Source {
    parent: Parent,
    artifact: AdapterArtifact,
}

impl AdapterService {
    pub(super) async fn combine(
        &self,
        call: Call,
        message: v1::CombineAdaptersRequest,
    ) -> Result<v1::AdapterVersion, Refusal> {
        let adapter = Self::adapter_name(&call, "parent", &message.parent)?;
        let combination = convert::combination(&adapter.tenant, &message)?;
        let aliases = convert::aliases("set_aliases", &message.set_aliases)?;
        let payload = v1::CombineAdaptersRequest {
            request_id: String::new(),
            ..message.clone()
        };
        let request = request_key(
            "CombineAdapters",
            adapter.tenant.as_str(),
            &message.request_id,
            &payload.encode_to_vec(),
            &self.config.limits,
        )?;
        if let Some(key) = &request
            && let Some(version) = self.registry.published_before(key.clone()).await?
        {
            return Ok(convert::version(version));
        }
        if !message.create_if_missing {
            self.registry.get_adapter(adapter.clone()).await?;
        }
        let sources = self.sources(combination.terms).await?;
        let limits = profile_limits(&self.config);
        let profile = convert::profile("profile", message.profile, &limits)?;
        let (base, rank) = (Arc::clone(&self.base), combination.rank);
        let made = self
            .store
            .run(move |store| made(store, &sources, rank, &base))
            .await?;
        let (version, pin) = made?;
        let version = NewVersion { profile, ..version };
        let publish = Publish {
            adapter,
            create: message.create_if_missing.then_some(message.description),
            version,
            aliases: if aliases.is_empty() {
                AliasPlan::DefaultIfAbsent
            } else {
                AliasPlan::Set(aliases)
            },
            request,
        };
        let published = self.registry.publish(publish).await;
        drop(pin);
        Ok(convert::version(published?))
    }

    /// The stored files of every term, all made for the base that is served.
    async fn sources(&self, terms: Vec<(AdapterRef, f32)>) -> Result<Vec<Source>, Refusal> {
        let mut sources: Vec<Source> = Vec::with_capacity(terms.len());
        for (index, (reference, weight)) in terms.into_iter().enumerate() {
            let version = self.registry.get_version(reference).await?;
            self.base.fits(&version)?;
            let artifact = self.artifact(&version).await?;
            let digest = version.content.digest;
            if sources.iter().any(|source| source.parent.digest == digest) {
                let why = format!(
                    "is {} again, by another name or the same; add its weights",
                    version.name
                );
                return Err(Refusal::invalid_field(
                    format!("terms[{index}].adapter"),
                    why,
                ));
            }
            let parent = Parent {
                version: version.name.to_string(),
                digest,
                weight,
            };
            sources.push(Source { parent, artifact });
        }
        Ok(sources)
    }
}

/// Reads, adds up, writes and stores; what is published is what reads back.
fn made(
    store: &ArtifactStore,
    sources: &[Source],
    rank: Option<usize>,
    base: &BaseOf,
) -> Result<Result<(NewVersion, Pin), Refusal>, StoreError> {
    let (artifact, relative_error) = match sum(sources, rank, base) {
        Ok(sum) => sum,
        Err(refusal) => return Ok(Err(refusal)),
    };
    let (config, weights, report) = match peft::read(&artifact, &base.shape, &base.limits) {
        Ok(read) => read,
        Err(report) => return Ok(Err(Refusal::from(report))),
    };
    let version = NewVersion {
        digest: artifact.digest(),
        size: artifact.bytes() as u64,
        base_name: base.resource.clone(),
        base_digest: base.digest.clone(),
        profile: ServingProfile::default(),
        summary: summarize(&config, &weights, &artifact),
        report,
        provenance: Provenance::Combination(Combined {
            parents: sources.iter().map(|source| source.parent.clone()).collect(),
            rank: rank.map(|rank| rank as u32),
            relative_error,
        }),
        metrics: BTreeMap::new(),
    };
    Ok(Ok((version, store.put_artifact(&artifact)?)))
}

fn sum(
    sources: &[Source],
    rank: Option<usize>,
    base: &BaseOf,
) -> Result<(AdapterArtifact, f64), Refusal> {
    let mut read = Vec::with_capacity(sources.len());
    for source in sources {
        let (_, weights, _) = peft::read(&source.artifact, &base.shape, &base.limits)?;
        read.push(weights);
    }
    let terms: Vec<Term<'_>> = sources
        .iter()
        .zip(&read)
        .map(|(source, weights)| Term {
            name: &source.parent.version,
            weights,
            factor: source.parent.weight.into(),
        })
        .collect();
    let unsupported =
        |text: String| Refusal::new(Code::FailedPrecondition, "COMBINATION_UNSUPPORTED", text);
    let combined = combine(&terms, rank).map_err(|error| unsupported(error.to_string()))?;
    let most = combined.weights.max_rank();
    if most > base.limits.max_rank {
        let limit = base.limits.max_rank;
        let text = format!("the ranks add up to {most}, limit {limit}; name a rank to cut to");
        return Err(unsupported(text).with("value", most).with("limit", limit));
    }
    let written = peft::write(&combined.config, &combined.weights);
    let artifact = written.map_err(|error| unsupported(error.to_string()))?;
    Ok((artifact, combined.relative_error))
}
