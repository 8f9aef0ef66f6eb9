//! Files to chunks and back: what is uploaded is hashed first and read again piece by piece,
//! what is downloaded takes its name only when size and checksum are right.
//! Knows the parts of an artifact, not what is inside them (labels excepted, which may have
//! to be taken from a `config.json`).

use std::{
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
};

use espalier_adapters::version::AdapterArtifact;
use futures::{Stream, StreamExt, stream};
use sha2::{Digest, Sha256};
use tokio::{
    fs::File,
    io::{AsyncReadExt, AsyncWriteExt},
};
use tonic::Code;

use crate::{
    error::Error,
    v1::{
        AdapterVersion, ArtifactChunk, ArtifactPart, ArtifactPartInfo, ColumnNames, DataFormat,
        DatasetChunk, ServingProfile, UploadAdapterVersionMetadata, UploadAdapterVersionRequest,
        UploadDatasetMetadata, UploadDatasetRequest, upload_adapter_version_request,
        upload_dataset_request,
    },
};

/// Bytes of a chunk; the server takes up to 1 MiB.
pub const CHUNK_BYTES: usize = 512 << 10;

/// Draws a request id unless the caller brings one, so that repetitions are recognised.
pub(crate) fn draw_request_id(id: &mut String) {
    if id.is_empty() {
        *id = uuid::Uuid::new_v4().to_string();
    }
}

/// The file that a part is stored in.
#[must_use]
pub fn file_name(part: ArtifactPart) -> &'static str {
    match part {
        ArtifactPart::Config | ArtifactPart::Unspecified => AdapterArtifact::CONFIG_FILE,
        ArtifactPart::Weights => AdapterArtifact::WEIGHTS_FILE,
        ArtifactPart::Labels => AdapterArtifact::LABELS_FILE,
        ArtifactPart::Head => AdapterArtifact::HEAD_FILE,
        ArtifactPart::Gguf => "adapter.gguf",
    }
}

/// Bytes to send: a file, or something made here.
#[derive(Clone, Debug)]
pub(crate) enum Source {
    File(PathBuf),
    Bytes(Arc<[u8]>),
}

// === impl Source ===

impl Source {
    /// Size and SHA-256 (hex).
    pub(crate) async fn measure(&self) -> Result<(u64, String), Error> {
        let mut hash = Sha256::new();
        let mut size = 0;
        let mut reader = self.open().await?;
        loop {
            let piece = reader.next().await?;
            if piece.is_empty() {
                return Ok((size, hex::encode(hash.finalize())));
            }
            size += piece.len() as u64;
            hash.update(&piece);
        }
    }

    async fn open(&self) -> Result<Reader, Error> {
        Ok(match self {
            Self::File(path) => Reader::File {
                file: File::open(path).await.map_err(|e| Error::file(path, &e))?,
                path: path.clone(),
            },
            Self::Bytes(bytes) => Reader::Bytes {
                bytes: Arc::clone(bytes),
                at: 0,
            },
        })
    }
}

/// A source that is being read.
enum Reader {
    File { file: File, path: PathBuf },
    Bytes { bytes: Arc<[u8]>, at: usize },
}

// === impl Reader ===

impl Reader {
    /// The next piece, full unless it is the last; empty at the end.
    async fn next(&mut self) -> Result<Vec<u8>, Error> {
        match self {
            Self::File { file, path } => {
                let mut piece = Vec::with_capacity(CHUNK_BYTES);
                let mut limited = file.take(CHUNK_BYTES as u64);
                let read = limited.read_to_end(&mut piece).await;
                read.map_err(|e| Error::file(path, &e))?;
                Ok(piece)
            }
            Self::Bytes { bytes, at } => {
                let end = (*at + CHUNK_BYTES).min(bytes.len());
                let piece = bytes[*at..end].to_vec();
                *at = end;
                Ok(piece)
            }
        }
    }
}

/// Where a broken read leaves its error, for a request stream has no place for one.
pub(crate) type Broken = Arc<Mutex<Option<Error>>>;

/// The pieces of several sources in order: (index of the source, offset, bytes).
pub(crate) fn pieces(
    sources: Vec<Source>,
    broken: Broken,
) -> impl Stream<Item = (usize, u64, Vec<u8>)> + Send {
    struct State {
        sources: Vec<Source>,
        index: usize,
        offset: u64,
        reader: Option<Reader>,
        broken: Broken,
    }
    let start = State {
        sources,
        index: 0,
        offset: 0,
        reader: None,
        broken,
    };
    stream::unfold(start, |mut state| async move {
        loop {
            let source = state.sources.get(state.index)?;
            let piece = async {
                if state.reader.is_none() {
                    state.reader = Some(source.open().await?);
                }
                match &mut state.reader {
                    Some(reader) => reader.next().await,
                    None => Ok(Vec::new()),
                }
            };
            match piece.await {
                Ok(piece) if piece.is_empty() => {
                    (state.index, state.offset, state.reader) = (state.index + 1, 0, None);
                }
                Ok(piece) => {
                    let item = (state.index, state.offset, piece);
                    state.offset += item.2.len() as u64;
                    return Some((item, state));
                }
                Err(error) => {
                    *state.broken.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    return None;
                }
            }
        }
    })
}

/// An adapter to upload.
#[derive(Clone, Debug, Default)]
pub struct AdapterUpload {
    /// `tenants/{t}/adapters/{a}`.
    pub adapter: String,
    /// A PEFT directory: `adapter_config.json`, `adapter_model.safetensors`, `labels.json`
    /// where it has one (else the labels of a `config.json` beside are sent).
    pub dir: PathBuf,
    /// How the version is to be served.
    pub profile: Option<ServingProfile>,
    /// Aliases that move to the new version.
    pub set_aliases: Vec<String>,
    /// Check everything, store nothing.
    pub validate_only: bool,
    /// Register the adapter when its name is new.
    pub create_if_missing: bool,
    /// Used when the adapter is registered by this upload.
    pub description: String,
    /// Drawn when empty.
    pub request_id: String,
}

/// A measured upload, whose messages can be made as often as needed.
pub(crate) struct PreparedAdapter {
    metadata: UploadAdapterVersionMetadata,
    sources: Vec<Source>,
}

// === impl AdapterUpload ===

impl AdapterUpload {
    pub(crate) async fn prepare(self) -> Result<PreparedAdapter, Error> {
        let mut parts = vec![
            (
                ArtifactPart::Config,
                Source::File(self.dir.join(AdapterArtifact::CONFIG_FILE)),
            ),
            (
                ArtifactPart::Weights,
                Source::File(self.dir.join(AdapterArtifact::WEIGHTS_FILE)),
            ),
        ];
        if let Some(labels) = labels_of(&self.dir)? {
            parts.push((ArtifactPart::Labels, Source::Bytes(labels.into())));
        }
        if let Some(head) = read_if_there(&self.dir.join(AdapterArtifact::HEAD_FILE))? {
            parts.push((ArtifactPart::Head, Source::Bytes(head.into())));
        }
        let mut infos = Vec::new();
        for (part, source) in &parts {
            let (size_bytes, sha256) = source.measure().await?;
            infos.push(ArtifactPartInfo {
                part: (*part).into(),
                size_bytes,
                sha256,
            });
        }
        let mut metadata = UploadAdapterVersionMetadata {
            parent: self.adapter,
            parts: infos,
            profile: self.profile,
            request_id: self.request_id,
            set_aliases: self.set_aliases,
            validate_only: self.validate_only,
            create_if_missing: self.create_if_missing,
            description: self.description,
        };
        draw_request_id(&mut metadata.request_id);
        let sources = parts.into_iter().map(|(_, source)| source).collect();
        Ok(PreparedAdapter { metadata, sources })
    }
}

impl PreparedAdapter {
    pub(crate) fn messages(
        &self,
        broken: Broken,
    ) -> impl Stream<Item = UploadAdapterVersionRequest> + Send + use<> {
        use upload_adapter_version_request::Payload;
        let message = |payload| UploadAdapterVersionRequest {
            payload: Some(payload),
        };
        let parts: Vec<i32> = self.metadata.parts.iter().map(|info| info.part).collect();
        let chunks = pieces(self.sources.clone(), broken).map(move |(index, offset, data)| {
            message(Payload::Chunk(ArtifactChunk {
                part: parts[index],
                offset,
                data,
            }))
        });
        let first = message(Payload::Metadata(self.metadata.clone()));
        stream::iter([first]).chain(chunks)
    }
}

/// The bytes of `labels.json`: the file, or made from the `id2label` of a `config.json` beside.
pub fn labels_of(dir: &Path) -> Result<Option<Vec<u8>>, Error> {
    let path = dir.join(AdapterArtifact::LABELS_FILE);
    if let Some(bytes) = read_if_there(&path)? {
        return Ok(Some(bytes));
    }
    let path = dir.join("config.json");
    let Some(bytes) = read_if_there(&path)? else {
        return Ok(None);
    };
    let wrong = |why: String| Error::argument(format!("{}: {why}", path.display()));
    let config: serde_json::Value =
        serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
    let Some(named) = config.get("id2label").and_then(|value| value.as_object()) else {
        return Ok(None);
    };
    let mut labels = vec![None; named.len()];
    for (index, label) in named {
        let slot = index
            .parse::<usize>()
            .ok()
            .and_then(|at| labels.get_mut(at));
        match (slot, label.as_str()) {
            (Some(slot), Some(label)) => *slot = Some(label.to_owned()),
            _ => {
                return Err(wrong(format!(
                    "id2label.{index} does not name row and label"
                )));
            }
        }
    }
    let Some(labels) = labels.into_iter().collect::<Option<Vec<_>>>() else {
        return Err(wrong("id2label names a row twice".to_owned()));
    };
    let text = serde_json::to_vec(&labels).map_err(|error| wrong(error.to_string()))?;
    Ok(Some(text))
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::file(path, &error)),
    }
}

/// A dataset to upload.
#[derive(Clone, Debug, Default)]
pub struct DatasetUpload {
    /// `tenants/{t}`.
    pub parent: String,
    /// The dataset's last name part.
    pub dataset_id: String,
    /// The file.
    pub file: PathBuf,
    /// The bytes themselves, where they lie in no file; `file` is not read then.
    pub content: Option<Arc<[u8]>>,
    /// How its rows are written.
    pub format: DataFormat,
    /// The names of its columns.
    pub columns: Option<ColumnNames>,
    /// Check everything, store nothing.
    pub validate_only: bool,
    /// Drawn when empty.
    pub request_id: String,
}

/// A measured upload, whose messages can be made as often as needed.
pub(crate) struct PreparedDataset {
    metadata: UploadDatasetMetadata,
    source: Source,
}

// === impl DatasetUpload ===

impl DatasetUpload {
    pub(crate) async fn prepare(self) -> Result<PreparedDataset, Error> {
        let source = match self.content {
            Some(bytes) => Source::Bytes(bytes),
            None => Source::File(self.file),
        };
        let (size_bytes, sha256) = source.measure().await?;
        let mut metadata = UploadDatasetMetadata {
            parent: self.parent,
            dataset_id: self.dataset_id,
            format: self.format.into(),
            columns: self.columns,
            size_bytes,
            sha256,
            request_id: self.request_id,
            validate_only: self.validate_only,
        };
        draw_request_id(&mut metadata.request_id);
        Ok(PreparedDataset { metadata, source })
    }
}

impl PreparedDataset {
    pub(crate) fn messages(
        &self,
        broken: Broken,
    ) -> impl Stream<Item = UploadDatasetRequest> + Send + use<> {
        use upload_dataset_request::Payload;
        let message = |payload| UploadDatasetRequest {
            payload: Some(payload),
        };
        let chunks = pieces(vec![self.source.clone()], broken)
            .map(move |(_, offset, data)| message(Payload::Chunk(DatasetChunk { offset, data })));
        let first = message(Payload::Metadata(self.metadata.clone()));
        stream::iter([first]).chain(chunks)
    }
}

/// A download on its way to disk.
pub(crate) struct Receiver {
    version: AdapterVersion,
    /// Where each part of the header's list goes.
    places: Vec<PathBuf>,
    /// The part that is being written, as an index into the header's list.
    index: usize,
    open: Option<(File, Sha256, u64)>,
    /// Optional files of a version that was here before and that this one does not have: removed at the end.
    stale: Vec<PathBuf>,
}

// === impl Receiver ===

impl Receiver {
    pub(crate) fn disorder(why: &str) -> Error {
        Error::local(
            Code::DataLoss,
            "DOWNLOAD",
            format!("the download is broken: {why}"),
        )
    }

    /// Parts go into a directory, each under its own name.
    pub(crate) async fn into_dir(dir: &Path, version: AdapterVersion) -> Result<Self, Error> {
        let made = tokio::fs::create_dir_all(dir).await;
        made.map_err(|error| Error::file(dir, &error))?;
        let parts = version.parts.iter();
        let places: Vec<PathBuf> = parts.map(|info| dir.join(file_name(info.part()))).collect();
        let optional = [AdapterArtifact::LABELS_FILE, AdapterArtifact::HEAD_FILE];
        let optional = optional.into_iter().map(|name| dir.join(name));
        let stale = optional.filter(|path| !places.contains(path)).collect();
        Ok(Self {
            stale,
            ..Self::new(version, places)
        })
    }

    /// The one part that there is goes into a file. A server that does not know the format sends others.
    pub(crate) fn into_file(
        file: &Path,
        part: ArtifactPart,
        version: AdapterVersion,
    ) -> Result<Self, Error> {
        match version.parts.as_slice() {
            [info] if info.part() == part => Ok(Self::new(version, vec![file.to_owned()])),
            _ => Err(Error::local(
                Code::Unimplemented,
                "DOWNLOAD",
                "the server is older than this client and cannot export this format",
            )),
        }
    }

    fn new(version: AdapterVersion, places: Vec<PathBuf>) -> Self {
        Self {
            version,
            places,
            index: 0,
            open: None,
            stale: Vec::new(),
        }
    }

    fn paths(&self) -> (PathBuf, PathBuf) {
        let place = self.places[self.index].clone();
        let mut unfinished = place.clone().into_os_string();
        unfinished.push(".part");
        (unfinished.into(), place)
    }

    pub(crate) async fn write(&mut self, chunk: ArtifactChunk) -> Result<(), Error> {
        self.close_full_parts().await?;
        let Some(info) = self.version.parts.get(self.index) else {
            return Err(Self::disorder("more bytes than the header names"));
        };
        let expected = info.part;
        let (path, _) = self.paths();
        let (file, hash, size) = self.open_part(&path).await?;
        if chunk.part != expected || chunk.offset != *size {
            return Err(Self::disorder("a chunk came out of its order"));
        }
        hash.update(&chunk.data);
        *size += chunk.data.len() as u64;
        let written = file.write_all(&chunk.data).await;
        written.map_err(|error| Error::file(&path, &error))
    }

    async fn open_part(&mut self, path: &Path) -> Result<&mut (File, Sha256, u64), Error> {
        if self.open.is_none() {
            let file = File::create(path)
                .await
                .map_err(|e| Error::file(path, &e))?;
            self.open = Some((file, Sha256::new(), 0));
        }
        self.open
            .as_mut()
            .ok_or_else(|| Self::disorder("no part is open"))
    }

    /// Checks and renames the parts that are complete.
    async fn close_full_parts(&mut self) -> Result<(), Error> {
        while let Some(info) = self.version.parts.get(self.index) {
            let (size_bytes, sha256) = (info.size_bytes, info.sha256.clone());
            let (path, name) = self.paths();
            let (file, hash, size) = self.open_part(&path).await?;
            if *size < size_bytes {
                return Ok(());
            }
            if *size > size_bytes || hex::encode(hash.clone().finalize()) != sha256 {
                return Err(Self::disorder(&format!(
                    "{} has another checksum than the header says",
                    name.display()
                )));
            }
            file.sync_all()
                .await
                .map_err(|error| Error::file(&path, &error))?;
            self.open = None;
            let renamed = tokio::fs::rename(&path, &name).await;
            renamed.map_err(|error| Error::file(&name, &error))?;
            self.index += 1;
        }
        Ok(())
    }

    pub(crate) async fn finish(mut self) -> Result<AdapterVersion, Error> {
        self.close_full_parts().await?;
        if self.index < self.version.parts.len() {
            return Err(Self::disorder("it ended before its last byte"));
        }
        for path in &self.stale {
            match tokio::fs::remove_file(path).await {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(Error::file(path, &error));
                }
                _ => {}
            }
        }
        Ok(self.version)
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    #[test]
    fn labels_come_from_the_file_then_from_the_config() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(labels_of(dir.path()).unwrap(), None);
        let config = dir.path().join("config.json");
        std::fs::write(&config, r#"{"id2label": {"1": "b", "0": "a"}}"#).unwrap();
        let labels = labels_of(dir.path()).unwrap().unwrap();
        assert_eq!(labels, br#"["a","b"]"#);
        std::fs::write(&config, r#"{"id2label": {"2": "b", "0": "a"}}"#).unwrap();
        let error = labels_of(dir.path()).unwrap_err();
        assert!(error.message.contains("id2label.2"), "{error}");
        std::fs::write(dir.path().join("labels.json"), b"[ \"x\" ]").unwrap();
        assert_eq!(labels_of(dir.path()).unwrap().unwrap(), b"[ \"x\" ]");
    }

    #[tokio::test]
    async fn pieces_cover_every_source_without_gaps() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("weights");
        let large: Vec<u8> = (0..CHUNK_BYTES * 2 + 17).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &large).unwrap();
        let small: Arc<[u8]> = Arc::from(&b"abc"[..]);
        let sources = vec![Source::File(path), Source::Bytes(small)];
        let found: Vec<_> = pieces(sources, Broken::default()).collect().await;
        let mut read = Vec::new();
        for (index, offset, bytes) in &found[..found.len() - 1] {
            assert_eq!((*index, *offset), (0, read.len() as u64));
            read.extend_from_slice(bytes);
        }
        assert_eq!(read, large);
        assert_eq!(found.last().unwrap(), &(1, 0, b"abc".to_vec()));
    }

    #[tokio::test]
    async fn a_file_that_is_not_there_is_named() {
        let upload = DatasetUpload {
            file: "no/such/file.csv".into(),
            ..Default::default()
        };
        let error = upload.prepare().await.err().unwrap();
        assert!(error.message.contains("no/such/file.csv"), "{error}");
    }
}
