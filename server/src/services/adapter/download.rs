//! An adapter's download: the stored files as they are, or made into another format on their way out.

use std::sync::Arc;

use espalier_adapters::version::AdapterArtifact;
use espalier_adapters::{gguf, head, peft};
use espalier_proto::v1;
use sha2::{Digest, Sha256};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::{AdapterService, convert};
use crate::artifact_store::StoreError;
use crate::registry::{RegistryError, Version, VersionState};
use crate::services::Call;
use crate::services::control::chunk;
use crate::status::Refusal;

/// Bytes of one chunk.
const CHUNK: usize = 256 * 1024;

type Reply = Result<v1::DownloadAdapterVersionResponse, Status>;

/// The header of a download and its files, in the order in which the header names them.
struct Files {
    version: v1::AdapterVersion,
    files: Vec<(v1::ArtifactPart, Vec<u8>)>,
}

impl AdapterService {
    pub(super) async fn download(
        &self,
        call: Call,
        message: v1::DownloadAdapterVersionRequest,
    ) -> Result<ReceiverStream<Reply>, Refusal> {
        let reference = Self::reference(&call, &message.name)?;
        let format = convert::export("format", message.format)?;
        let version = self.registry.get_version(reference).await?;
        let artifact = self.artifact(&version).await?;
        let files = match format {
            convert::Export::Peft => as_peft(version, artifact)?,
            convert::Export::Stored => stored(version, artifact),
            convert::Export::GgufLora => self.as_gguf(version, artifact).await?,
        };
        let (sender, receiver) = mpsc::channel(4);
        tokio::spawn(async move {
            // A reader that went away ends the download.
            let _ = files.send(&sender).await;
        });
        Ok(ReceiverStream::new(receiver))
    }

    /// A version's stored files; one whose bytes are not what they were is taken out of service.
    pub(super) async fn artifact(&self, version: &Version) -> Result<AdapterArtifact, Refusal> {
        if version.state != VersionState::Active {
            return Err(RegistryError::VersionNotActive {
                name: version.name.clone(),
                state: version.state,
                error: version.error.clone().unwrap_or_default(),
            }
            .into());
        }
        let digest = version.content.digest;
        let read = self
            .store
            .run(move |store| store.get_artifact(&digest))
            .await;
        if let Err(StoreError::Corrupt { .. }) = read {
            self.registry
                .quarantine(digest, "its stored bytes have another digest".to_owned())
                .await?;
        }
        Ok(read?)
    }

    /// One file for llama.cpp. Rows of q and k lie otherwise there, so the base has to be the one that is served.
    async fn as_gguf(&self, version: Version, artifact: AdapterArtifact) -> Result<Files, Refusal> {
        self.base.fits(&version)?;
        let base = Arc::clone(&self.base);
        let name = version.name.to_string();
        let written = self
            .store
            .run(move |_| {
                Ok(
                    peft::read(&artifact, &base.shape, &base.limits).map(|(config, weights, _)| {
                        gguf::write_lora(&name, &config, &weights, &base.gguf)
                    }),
                )
            })
            .await?;
        let bytes = written?.map_err(|error| {
            Refusal::new(
                Code::FailedPrecondition,
                "EXPORT_UNSUPPORTED",
                error.to_string(),
            )
            .with("adapter_version", &version.name)
            .with("format", "GGUF_LORA")
            .with("subject", &error.subject)
        })?;
        let part = v1::ArtifactPartInfo {
            part: v1::ArtifactPart::Gguf.into(),
            size_bytes: bytes.len() as u64,
            sha256: hex::encode(Sha256::digest(&bytes)),
        };
        let version = v1::AdapterVersion {
            parts: vec![part],
            ..convert::version(version)
        };
        let files = vec![(v1::ArtifactPart::Gguf, bytes)];
        Ok(Files { version, files })
    }
}

/// PEFT's files, unless PEFT would make something else of them.
fn as_peft(version: Version, artifact: AdapterArtifact) -> Result<Files, Refusal> {
    let summary = &version.content.summary;
    let (layers, activation) = (&summary.hidden_layers, summary.activation);
    let Some(beyond) = head::beyond_score(layers, activation, summary.pooling) else {
        return Ok(stored(version, artifact));
    };
    let why = format!(
        "{beyond} in PEFT, which would make another head of it: download it as EXPORT_FORMAT_STORED (pull --format stored), which this server reads back, or train a head without"
    );
    let refusal = Refusal::new(Code::FailedPrecondition, "EXPORT_UNSUPPORTED", why);
    Err(refusal
        .with("adapter_version", &version.name)
        .with("format", "PEFT")
        .with("subject", "score"))
}

fn stored(version: Version, artifact: AdapterArtifact) -> Files {
    let (labels, head) = (artifact.labels_json, artifact.head_json);
    let parts = [
        (v1::ArtifactPart::Config, Some(artifact.config_json)),
        (v1::ArtifactPart::Weights, Some(artifact.safetensors)),
        (v1::ArtifactPart::Labels, labels),
        (v1::ArtifactPart::Head, head),
    ];
    Files {
        version: convert::version(version),
        files: parts
            .into_iter()
            .filter_map(|(part, bytes)| Some((part, bytes?)))
            .collect(),
    }
}

impl Files {
    /// The header and then every file's pieces; an error means that nobody reads any more.
    async fn send(self, sender: &mpsc::Sender<Reply>) -> Result<(), mpsc::error::SendError<Reply>> {
        use v1::download_adapter_version_response::Payload;
        let message = |payload| {
            Ok(v1::DownloadAdapterVersionResponse {
                payload: Some(payload),
            })
        };
        sender.send(message(Payload::Version(self.version))).await?;
        for (part, bytes) in self.files {
            for (index, data) in bytes.chunks(CHUNK).enumerate() {
                let piece = chunk(part, index * CHUNK, data);
                sender.send(message(Payload::Chunk(piece))).await?;
            }
        }
        Ok(())
    }
}
