//! An adapter's upload: announced, received piece by piece in bounded memory, checked in full, and then published.

use std::collections::BTreeMap;
use std::sync::Arc;

use espalier_adapters::config::BaseShape;
use espalier_adapters::gguf::LoraBase;
use espalier_adapters::peft;
use espalier_adapters::report::{Report, Rule, Severity};
use espalier_adapters::version::AdapterArtifact;
use espalier_proto::v1;
use prost::Message;
use tonic::{Code, Streaming};

use super::{AdapterService, convert, profile_limits};
use crate::config::Config;
use crate::database::RequestKey;
use crate::names::{AdapterName, TenantId, VersionName, VersionNumber};
use crate::registry::{
    AliasPlan, NewVersion, Provenance, Publish, Serving, Version, VersionState, summarize,
};
use crate::services::Call;
use crate::services::control::{Incoming, next_message, request_key};
use crate::status::Refusal;

/// What an upload is checked against.
pub(super) struct BaseOf {
    pub(super) name: String,
    pub(super) resource: String,
    pub(super) digest: String,
    pub(super) shape: BaseShape,
    pub(super) gguf: LoraBase,
    pub(super) limits: peft::Limits,
}

impl BaseOf {
    /// Refuses a version of another base: what is made of it here would be wrong in silence.
    pub(super) fn fits(&self, version: &Version) -> Result<(), Refusal> {
        let found = &version.content.base_digest;
        if *found == self.digest {
            return Ok(());
        }
        let name = &version.name;
        let message = format!("{name} was made for another base model than the one served here");
        Err(
            Refusal::new(Code::FailedPrecondition, "ADAPTER_INCOMPATIBLE", message)
                .with("adapter_version", name)
                .with("expected", &self.digest)
                .with("found", found),
        )
    }
}

/// Uploads that are open, by tenant.
#[derive(Clone)]
pub(super) struct Uploads {
    pub(super) open: Arc<dashmap::DashMap<TenantId, usize>>,
    pub(super) limit: usize,
}

/// An open upload's place.
struct UploadPlace(Uploads, TenantId);

impl Uploads {
    fn enter(&self, tenant: &TenantId) -> Result<UploadPlace, Refusal> {
        let mut open = self.open.entry(tenant.clone()).or_insert(0);
        if *open >= self.limit {
            let message = format!(
                "tenants/{tenant} has {open} uploads open, the limit is {}",
                self.limit,
                open = *open
            );
            let subject = format!("tenants/{tenant}");
            return Err(
                Refusal::quota("RATE_LIMIT_EXCEEDED", subject, message, None)
                    .with("limit", self.limit),
            );
        }
        *open += 1;
        Ok(UploadPlace(self.clone(), tenant.clone()))
    }
}

impl Drop for UploadPlace {
    fn drop(&mut self) {
        if let Some(mut open) = self.0.open.get_mut(&self.1) {
            *open -= 1;
        }
        self.0.open.remove_if(&self.1, |_, open| *open == 0);
    }
}

impl AdapterService {
    pub(super) async fn upload(
        &self,
        call: Call,
        mut stream: Streaming<v1::UploadAdapterVersionRequest>,
    ) -> Result<v1::UploadAdapterVersionResponse, Refusal> {
        use v1::upload_adapter_version_request::Payload;
        let idle = self.config.adapters.upload_idle_timeout;
        let metadata = match next_message(&mut stream, idle)
            .await?
            .and_then(|m| m.payload)
        {
            Some(Payload::Metadata(metadata)) => metadata,
            _ => {
                return Err(Refusal::invalid_field(
                    "metadata",
                    "the first message must be the metadata",
                ));
            }
        };
        let name = Self::adapter_name(&call, "metadata.parent", &metadata.parent)?;
        let _place = self.uploads.enter(&name.tenant)?;
        let upload = Upload::plan(&metadata, name, &self.config)?;
        if !metadata.create_if_missing {
            self.registry.get_adapter(upload.name.clone()).await?;
        }
        if let Some(key) = &upload.request
            && !metadata.validate_only
            && let Some(version) = self.registry.published_before(key.clone()).await?
        {
            let report = convert::report(&version.content.report);
            return Ok(v1::UploadAdapterVersionResponse {
                version: Some(convert::version(version)),
                report: Some(report),
            });
        }
        let artifact = self
            .receive(&mut stream, upload.parts.as_slice(), &metadata)
            .await?;
        self.finish(upload, metadata, artifact).await
    }

    /// Takes the files' pieces in the announced order.
    async fn receive(
        &self,
        stream: &mut Streaming<v1::UploadAdapterVersionRequest>,
        parts: &[v1::ArtifactPart],
        metadata: &v1::UploadAdapterVersionMetadata,
    ) -> Result<AdapterArtifact, Refusal> {
        use v1::upload_adapter_version_request::Payload;
        let adapters = &self.config.adapters;
        let mut files: Vec<Vec<u8>> = Vec::new();
        for (part, info) in parts.iter().zip(&metadata.parts) {
            let limit = match part {
                v1::ArtifactPart::Weights => adapters.max_adapter_bytes.0,
                _ => adapters.max_config_bytes.0,
            };
            let mut file = Incoming::expect(
                file_name(*part),
                "metadata.parts",
                info.size_bytes,
                &info.sha256,
                limit,
            )?;
            while !file.is_complete() {
                let message = next_message(stream, adapters.upload_idle_timeout).await?;
                let piece = match message.map(|m| m.payload) {
                    Some(Some(Payload::Chunk(piece))) => piece,
                    Some(_) => {
                        return Err(Refusal::invalid_field(
                            "chunk",
                            "only chunks follow the metadata",
                        ));
                    }
                    None => break,
                };
                if piece.part != info.part {
                    return Err(Refusal::invalid_field(
                        "chunk.part",
                        format!(
                            "{} is not complete: its chunks come first",
                            file_name(*part)
                        ),
                    ));
                }
                file.take(piece.offset, &piece.data, adapters.max_chunk_bytes.0)?;
            }
            files.push(file.finish()?);
        }
        if next_message(stream, adapters.upload_idle_timeout)
            .await?
            .is_some()
        {
            return Err(Refusal::invalid_field(
                "chunk",
                "the announced files are complete, yet more came",
            ));
        }
        let mut artifact = AdapterArtifact {
            config_json: Vec::new(),
            safetensors: Vec::new(),
            labels_json: None,
            head_json: None,
        };
        for (part, bytes) in parts.iter().zip(files) {
            match part {
                v1::ArtifactPart::Config => artifact.config_json = bytes,
                v1::ArtifactPart::Weights => artifact.safetensors = bytes,
                v1::ArtifactPart::Head => artifact.head_json = Some(bytes),
                _ => artifact.labels_json = Some(bytes),
            }
        }
        Ok(artifact)
    }

    /// Checks the artifact and publishes it.
    async fn finish(
        &self,
        upload: Upload,
        metadata: v1::UploadAdapterVersionMetadata,
        artifact: AdapterArtifact,
    ) -> Result<v1::UploadAdapterVersionResponse, Refusal> {
        let profile = convert::profile(
            "metadata.profile",
            metadata.profile,
            &profile_limits(&self.config),
        )?;
        let base = Arc::clone(&self.base);
        let keep = !metadata.validate_only;
        let checked = self
            .store
            .run(move |store| {
                let read = peft::read(&artifact, &base.shape, &base.limits);
                let (config, weights, mut report) = match read {
                    Ok(read) => read,
                    Err(report) => return Ok(Err(report)),
                };
                if let Some(warning) = peft::base_name_warning(&config, &base.name) {
                    report.push(warning, base.limits.max_findings);
                }
                let version = NewVersion {
                    digest: artifact.digest(),
                    size: artifact.bytes() as u64,
                    base_name: base.resource.clone(),
                    base_digest: base.digest.clone(),
                    profile,
                    summary: summarize(&config, &weights, &artifact),
                    report,
                    provenance: Provenance::Upload,
                    metrics: BTreeMap::new(),
                };
                let pin = if keep {
                    Some(store.put_artifact(&artifact)?)
                } else {
                    None
                };
                Ok(Ok((version, pin)))
            })
            .await?;
        let (version, pin) = match checked {
            Ok(checked) => checked,
            Err(report) if metadata.validate_only => {
                return Ok(v1::UploadAdapterVersionResponse {
                    version: None,
                    report: Some(convert::report(&report)),
                });
            }
            Err(report) => return Err(refused(&report)),
        };
        let report = convert::report(&version.report);
        let published = if metadata.validate_only {
            unpublished(&upload.name, version)
        } else {
            let publish = Publish {
                adapter: upload.name,
                create: metadata.create_if_missing.then_some(metadata.description),
                version,
                aliases: upload.aliases,
                request: upload.request,
            };
            let published = self.registry.publish(publish).await;
            drop(pin);
            convert::version(published?)
        };
        Ok(v1::UploadAdapterVersionResponse {
            version: Some(published),
            report: Some(report),
        })
    }
}

/// An upload as its metadata plans it.
struct Upload {
    name: AdapterName,
    parts: Vec<v1::ArtifactPart>,
    aliases: AliasPlan,
    request: Option<RequestKey>,
}

impl Upload {
    fn plan(
        metadata: &v1::UploadAdapterVersionMetadata,
        name: AdapterName,
        config: &Config,
    ) -> Result<Self, Refusal> {
        let mut parts = Vec::new();
        for info in &metadata.parts {
            let part = match v1::ArtifactPart::try_from(info.part) {
                Ok(v1::ArtifactPart::Gguf) => {
                    return Err(Refusal::invalid_field(
                        "metadata.parts",
                        "a GGUF is a format of downloads; upload the adapter as PEFT saves it",
                    ));
                }
                Ok(part) if part != v1::ArtifactPart::Unspecified => part,
                _ => {
                    return Err(Refusal::invalid_field(
                        "metadata.parts",
                        format!("{} is no part", info.part),
                    ));
                }
            };
            if parts.contains(&part) {
                return Err(Refusal::invalid_field(
                    "metadata.parts",
                    format!("{} is listed twice", file_name(part)),
                ));
            }
            parts.push(part);
        }
        for part in [v1::ArtifactPart::Config, v1::ArtifactPart::Weights] {
            if !parts.contains(&part) {
                return Err(Refusal::new(
                    Code::InvalidArgument,
                    "ARTIFACT_MALFORMED",
                    format!("metadata.parts: {} is missing", file_name(part)),
                ));
            }
        }
        let total: u64 = metadata
            .parts
            .iter()
            .fold(0, |sum, info| sum.saturating_add(info.size_bytes));
        let limit = config.adapters.max_adapter_bytes.0;
        if total > limit {
            return Err(Refusal::new(
                Code::InvalidArgument,
                "ARTIFACT_TOO_LARGE",
                format!(
                    "metadata.parts: the files have {total} bytes together, the limit is {limit}"
                ),
            )
            .with("value", total)
            .with("limit", limit));
        }
        let aliases = convert::aliases("metadata.set_aliases", &metadata.set_aliases)?;
        let payload = v1::UploadAdapterVersionMetadata {
            request_id: String::new(),
            ..metadata.clone()
        };
        let request = request_key(
            "UploadAdapterVersion",
            name.tenant.as_str(),
            &metadata.request_id,
            &payload.encode_to_vec(),
            &config.limits,
        )?;
        Ok(Self {
            name,
            parts,
            aliases: if aliases.is_empty() {
                AliasPlan::DefaultIfAbsent
            } else {
                AliasPlan::Set(aliases)
            },
            request,
        })
    }
}

fn file_name(part: v1::ArtifactPart) -> &'static str {
    match part {
        v1::ArtifactPart::Config => AdapterArtifact::CONFIG_FILE,
        v1::ArtifactPart::Weights => AdapterArtifact::WEIGHTS_FILE,
        v1::ArtifactPart::Labels => AdapterArtifact::LABELS_FILE,
        v1::ArtifactPart::Head => AdapterArtifact::HEAD_FILE,
        v1::ArtifactPart::Gguf | v1::ArtifactPart::Unspecified => "nothing",
    }
}

/// What a version would be, without a name.
fn unpublished(adapter: &AdapterName, content: NewVersion) -> v1::AdapterVersion {
    let version = Version {
        // Any number: the name is taken off again below.
        name: VersionName::new(adapter.clone(), VersionNumber::FIRST),
        state: VersionState::Active,
        error: None,
        content,
        aliases: Vec::new(),
        serving: Serving::default(),
        create_time: 0,
    };
    v1::AdapterVersion {
        name: String::new(),
        create_time: None,
        ..convert::version(version)
    }
}

/// Why an artifact was refused: files that are no adapter are the sender's fault, an adapter for another base is not. Every
/// finding is a field violation.
fn refused(report: &Report) -> Refusal {
    let errors: Vec<_> = report
        .findings
        .iter()
        .filter(|finding| finding.severity == Severity::Error)
        .collect();
    let any = |rules: &[Rule]| errors.iter().any(|finding| rules.contains(&finding.rule));
    if any(&[Rule::FileFormat]) {
        return Refusal::new(
            Code::InvalidArgument,
            "ARTIFACT_FORMAT_FORBIDDEN",
            report.to_string(),
        )
        .with("errors", report.errors());
    }
    let misfit = any(&[
        Rule::Shape,
        Rule::Rank,
        Rule::Layer,
        Rule::NoTargets,
        Rule::Unsupported,
        Rule::InitChangedBase,
    ]);
    let malformed = any(&[
        Rule::Limit,
        Rule::Json,
        Rule::FieldValue,
        Rule::Header,
        Rule::Dtype,
        Rule::NotFinite,
        Rule::Labels,
        Rule::Pattern,
    ]);
    let rule = errors
        .first()
        .map_or("none", |finding| finding.rule.as_str());
    let subject = errors
        .first()
        .map_or("", |finding| finding.subject.as_str());
    let refusal = if misfit && !malformed {
        Refusal::new(
            Code::FailedPrecondition,
            "ADAPTER_INCOMPATIBLE",
            report.to_string(),
        )
    } else {
        Refusal::new(
            Code::InvalidArgument,
            "ARTIFACT_MALFORMED",
            report.to_string(),
        )
    };
    refusal
        .with("errors", report.errors())
        .with("rule", rule)
        .with("tensor", subject)
}
