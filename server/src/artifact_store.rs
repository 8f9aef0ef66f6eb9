//! Where bytes are kept: a directory in which a file's name is the SHA-256 of its content.
//!
//! A file appears whole or not at all (temporary file, fsync, rename, fsync of the directory) and never changes, so a crash
//! leaves nothing but temporary files, which the next start removes. Every read is checked: by SHA-256, and an adapter
//! version that this process has hashed before by a checksum of the same bytes, so that loading it again costs no second
//! hash. Adapter versions are kept as the very bytes that their digest is taken over, so that version digest and file name
//! are one. This file must not know names, tenants or why something is kept: whoever removes a blob has asked the
//! database first.

use std::cell::Cell;
use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use espalier_adapters::checksum::Checksum;
use espalier_adapters::version::{AdapterArtifact, VersionDigest};
use sha2::{Digest, Sha256};

/// What the bytes of an adapter version begin with; see `AdapterArtifact::digest`.
const ARTIFACT_MAGIC: &[u8] = b"espalier-adapter-v1\0";

/// Checksums of hashed artifacts that are remembered; about 60 bytes each.
const MAX_PROVEN: usize = 1 << 16;

/// SHA-256 of a blob's bytes: its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobDigest(pub [u8; 32]);

impl BlobDigest {
    /// Digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }
}

impl From<VersionDigest> for BlobDigest {
    fn from(digest: VersionDigest) -> Self {
        Self(*digest.as_bytes())
    }
}

impl fmt::Display for BlobDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

/// Why bytes could not be kept or had.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// Nothing is kept under this digest.
    #[error("no blob {digest} is stored")]
    NotFound {
        /// What was asked for.
        digest: BlobDigest,
    },
    /// The bytes on the disk are not those that were written.
    #[error("blob {digest} is corrupt: its {size} bytes have another digest")]
    Corrupt {
        /// What was asked for.
        digest: BlobDigest,
        /// Bytes found.
        size: usize,
    },
    /// The file system refused.
    #[error("the artifact store failed to {action}: {source}")]
    Io {
        /// What was being done.
        action: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

impl StoreError {
    fn io(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, source }
    }
}

/// The store. Cheap to clone. Its methods block: call them off the runtime's threads, or through [`ArtifactStore::run`].
#[derive(Clone)]
pub struct ArtifactStore {
    inner: Arc<Inner>,
}

struct Inner {
    root: PathBuf,
    temporary: PathBuf,
    next: AtomicU64,
    /// Blobs that somebody is about to name in the database; they are not removed.
    pins: Mutex<HashMap<BlobDigest, usize>>,
    /// Checksums of artifacts whose SHA-256 this process has seen to be right.
    proven: Mutex<HashMap<BlobDigest, u64>>,
}

/// Keeps a blob from being removed until its row is written. Hold it over the transaction.
pub struct Pin {
    inner: Arc<Inner>,
    digest: BlobDigest,
}

impl Pin {
    /// The blob's digest.
    pub fn digest(&self) -> BlobDigest {
        self.digest
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pins = self
            .inner
            .pins
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = pins.get_mut(&self.digest) {
            *count -= 1;
            if *count == 0 {
                pins.remove(&self.digest);
            }
        }
    }
}

impl ArtifactStore {
    /// Opens or creates the store below `data_dir` and removes what unfinished writes left behind.
    pub fn open(data_dir: &Path) -> Result<Self, StoreError> {
        let root = data_dir.join("sha256");
        let temporary = data_dir.join("tmp");
        fs::create_dir_all(&root).map_err(StoreError::io("create its directory"))?;
        fs::create_dir_all(&temporary).map_err(StoreError::io("create its directory"))?;
        sync_directory(data_dir)?;
        for entry in fs::read_dir(&temporary).map_err(StoreError::io("list temporary files"))? {
            let entry = entry.map_err(StoreError::io("list temporary files"))?;
            fs::remove_file(entry.path()).map_err(StoreError::io("remove a temporary file"))?;
        }
        Ok(Self {
            inner: Arc::new(Inner {
                root,
                temporary,
                next: AtomicU64::new(0),
                pins: Mutex::default(),
                proven: Mutex::default(),
            }),
        })
    }

    /// Runs blocking work on the store beside the runtime.
    pub async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Self) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, StoreError> {
        let store = self.clone();
        tokio::task::spawn_blocking(move || work(&store))
            .await
            .unwrap_or_else(|error| {
                Err(StoreError::Io {
                    action: "finish a task",
                    source: io::Error::other(error),
                })
            })
    }

    /// Keeps `bytes`. They are on the disk when this returns.
    pub fn put(&self, bytes: &[u8]) -> Result<Pin, StoreError> {
        self.put_parts(BlobDigest::of(bytes), &[bytes])
    }

    /// The bytes of a blob, checked against its name.
    pub fn get(&self, digest: BlobDigest) -> Result<Vec<u8>, StoreError> {
        let (mut file, _) = self.open_blob(digest)?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)
            .map_err(StoreError::io("read a blob"))?;
        if BlobDigest::of(&bytes) == digest {
            Ok(bytes)
        } else {
            let size = bytes.len();
            Err(StoreError::Corrupt { digest, size })
        }
    }

    fn open_blob(&self, digest: BlobDigest) -> Result<(File, u64), StoreError> {
        let file = match File::open(self.path(digest)) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::NotFound { digest });
            }
            Err(source) => return Err(StoreError::io("open a blob")(source)),
        };
        let size = file
            .metadata()
            .map_err(StoreError::io("read a blob"))?
            .len();
        Ok((file, size))
    }

    /// Keeps an adapter version; the blob's digest is the version's.
    pub fn put_artifact(&self, artifact: &AdapterArtifact) -> Result<Pin, StoreError> {
        let framed = artifact.framed();
        let lengths: Vec<[u8; 8]> = framed.iter().map(|(len, _)| len.to_le_bytes()).collect();
        let mut pieces: Vec<&[u8]> = vec![ARTIFACT_MAGIC];
        for ((_, part), length) in framed.iter().zip(&lengths) {
            pieces.extend([length.as_slice(), part]);
        }
        let pin = self.put_parts(artifact.digest().into(), &pieces)?;
        let mut sum = Checksum::default();
        pieces.iter().for_each(|piece| sum.update(piece));
        self.remember(pin.digest, sum.finish());
        Ok(pin)
    }

    /// The artifact of a version, bytes exactly as uploaded. Hashed at the first read of a process, and again whenever the
    /// checksum is not that of the first.
    pub fn get_artifact(&self, digest: &VersionDigest) -> Result<AdapterArtifact, StoreError> {
        self.get_artifact_into(digest, Vec::new())
    }

    /// The same, with the weights read into an allocation that the caller has no more use for.
    pub fn get_artifact_into(
        &self,
        digest: &VersionDigest,
        spare: Vec<u8>,
    ) -> Result<AdapterArtifact, StoreError> {
        let digest = BlobDigest::from(*digest);
        let expected = self.proven().get(&digest).copied();
        let (file, size) = self.open_blob(digest)?;
        let (mut sum, mut hash) = (Checksum::default(), Sha256::new());
        let read = read_artifact(file, size, spare, &mut |bytes| {
            sum.update(bytes);
            if expected.is_none() {
                hash.update(bytes);
            }
        });
        let artifact = read.map_err(StoreError::io("read a blob"))?;
        let sum = sum.finish();
        let right = match expected {
            Some(expected) => sum == expected,
            None => BlobDigest(hash.finalize().into()) == digest,
        };
        match artifact {
            Some(artifact) if right => {
                self.remember(digest, sum);
                Ok(artifact)
            }
            _ => {
                self.proven().remove(&digest);
                let size = usize::try_from(size).unwrap_or(usize::MAX);
                Err(StoreError::Corrupt { digest, size })
            }
        }
    }

    fn proven(&self) -> MutexGuard<'_, HashMap<BlobDigest, u64>> {
        let proven = self.inner.proven.lock();
        proven.unwrap_or_else(PoisonError::into_inner)
    }

    fn remember(&self, digest: BlobDigest, sum: u64) {
        let mut proven = self.proven();
        if proven.len() >= MAX_PROVEN {
            // They are hashed once more; nothing else is lost.
            proven.clear();
        }
        proven.insert(digest, sum);
    }

    /// Removes a blob unless it is pinned or absent. The caller holds the database's writer, so that nobody names the blob
    /// between the question whether it is needed and this.
    pub fn remove(&self, digest: BlobDigest) -> Result<(), StoreError> {
        let pins = self
            .inner
            .pins
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if pins.contains_key(&digest) {
            return Ok(());
        }
        self.proven().remove(&digest);
        match fs::remove_file(self.path(digest)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(StoreError::io("remove a blob")(error))
            }
            _ => Ok(()),
        }
    }

    /// Every blob that lies in the store.
    pub fn list(&self) -> Result<Vec<BlobDigest>, StoreError> {
        let mut found = Vec::new();
        for shard in fs::read_dir(&self.inner.root).map_err(StoreError::io("list blobs"))? {
            let shard = shard.map_err(StoreError::io("list blobs"))?;
            for entry in fs::read_dir(shard.path()).map_err(StoreError::io("list blobs"))? {
                let entry = entry.map_err(StoreError::io("list blobs"))?;
                let (front, back) = (shard.file_name(), entry.file_name());
                let name = format!("{}{}", front.to_string_lossy(), back.to_string_lossy());
                let mut digest = [0; 32];
                if hex::decode_to_slice(&name, &mut digest).is_ok() {
                    found.push(BlobDigest(digest));
                }
            }
        }
        Ok(found)
    }

    fn path(&self, digest: BlobDigest) -> PathBuf {
        let name = digest.to_string();
        self.inner.root.join(&name[..2]).join(&name[2..])
    }

    fn pin(&self, digest: BlobDigest) -> Pin {
        let mut pins = self
            .inner
            .pins
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *pins.entry(digest).or_insert(0) += 1;
        Pin {
            inner: Arc::clone(&self.inner),
            digest,
        }
    }

    fn put_parts(&self, digest: BlobDigest, parts: &[&[u8]]) -> Result<Pin, StoreError> {
        let pin = self.pin(digest);
        // What lies there may have rotted since it was written: a new upload of the same bytes heals it.
        if self.get(digest).is_ok() {
            return Ok(pin);
        }
        let path = self.path(digest);
        let directory = path.parent().unwrap_or(&self.inner.root);
        if !directory.is_dir() {
            fs::create_dir_all(directory).map_err(StoreError::io("create a directory"))?;
            sync_directory(&self.inner.root)?;
        }
        let number = self.inner.next.fetch_add(1, Ordering::Relaxed);
        let temporary = self.inner.temporary.join(format!("{number}"));
        let written = write_file(&temporary, parts)
            .and_then(|()| fs::rename(&temporary, &path).map_err(StoreError::io("name a blob")));
        if let Err(error) = written {
            // The next start removes it if this cannot.
            let _ = fs::remove_file(&temporary);
            return Err(error);
        }
        sync_directory(directory)?;
        Ok(pin)
    }
}

fn write_file(path: &Path, parts: &[&[u8]]) -> Result<(), StoreError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(StoreError::io("create a temporary file"))?;
    for part in parts {
        file.write_all(part)
            .map_err(StoreError::io("write a blob"))?;
    }
    file.sync_all().map_err(StoreError::io("flush a blob"))
}

/// A rename is durable only when its directory is.
fn sync_directory(path: &Path) -> Result<(), StoreError> {
    File::open(path)
        .and_then(|directory| directory.sync_all())
        .map_err(StoreError::io("flush a directory"))
}

/// Takes the hashed form of an artifact apart again: magic, then two or three parts behind their lengths. Each part is read
/// once, into its own place; `seen` gets every byte in order. `None` when `size` bytes are not of that form.
fn read_artifact(
    mut from: impl Read,
    size: u64,
    spare: Vec<u8>,
    seen: &mut impl FnMut(&[u8]),
) -> io::Result<Option<AdapterArtifact>> {
    let left = Cell::new(size);
    let mut take = |length: u64, mut bytes: Vec<u8>| -> io::Result<Option<Vec<u8>>> {
        match left.get().checked_sub(length) {
            Some(rest) => left.set(rest),
            None => return Ok(None),
        }
        bytes.clear();
        bytes.reserve_exact(usize::try_from(length).unwrap_or(0));
        from.by_ref().take(length).read_to_end(&mut bytes)?;
        seen(&bytes);
        Ok((bytes.len() as u64 == length).then_some(bytes))
    };
    if take(ARTIFACT_MAGIC.len() as u64, Vec::new())?.as_deref() != Some(ARTIFACT_MAGIC) {
        return Ok(None);
    }
    // The outer `None` is a file that ends too soon, the inner one labels that are absent.
    let mut part = |into: Vec<u8>| -> io::Result<Option<Option<Vec<u8>>>> {
        let length = take(8, Vec::new())?.and_then(|bytes| bytes.try_into().ok());
        match length.map(u64::from_le_bytes) {
            Some(AdapterArtifact::NO_LABELS) => Ok(Some(None)),
            Some(length) => Ok(take(length, into)?.map(Some)),
            None => Ok(None),
        }
    };
    let mut rest = [None, None];
    let (Some(Some(config_json)), Some(Some(safetensors))) = (part(Vec::new())?, part(spare)?)
    else {
        return Ok(None);
    };
    for slot in &mut rest {
        if left.get() > 0 {
            match part(Vec::new())? {
                Some(bytes) => *slot = bytes,
                None => return Ok(None),
            }
        }
    }
    let [labels_json, head_json] = rest;
    Ok((left.get() == 0).then_some(AdapterArtifact {
        config_json,
        safetensors,
        labels_json,
        head_json,
    }))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    fn artifact(labels: Option<&str>) -> AdapterArtifact {
        AdapterArtifact {
            config_json: br#"{"r": 8}"#.to_vec(),
            safetensors: (0..=255).cycle().take(10_000).collect(),
            labels_json: labels.map(|l| l.as_bytes().to_vec()),
            head_json: None,
        }
    }

    #[test]
    fn an_artifact_comes_back_byte_for_byte_under_its_own_digest() {
        let dir = tempfile::tempdir().unwrap();
        let store = ArtifactStore::open(dir.path()).unwrap();
        for labels in [None, Some(""), Some(r#"["a","b"]"#)] {
            let artifact = artifact(labels);
            let pin = store.put_artifact(&artifact).unwrap();
            assert_eq!(pin.digest(), BlobDigest::from(artifact.digest()));
            assert_eq!(store.get_artifact(&artifact.digest()).unwrap(), artifact);
        }
        for labels in [None, Some("")] {
            let mut artifact = artifact(labels);
            artifact.head_json = Some(b"{}".to_vec());
            store.put_artifact(&artifact).unwrap();
            assert_eq!(store.get_artifact(&artifact.digest()).unwrap(), artifact);
        }
        let again = ArtifactStore::open(dir.path()).unwrap();
        assert_eq!(again.list().unwrap().len(), 5);
        assert_eq!(
            again.get_artifact(&artifact(None).digest()).unwrap(),
            artifact(None)
        );
    }

    #[test]
    fn one_flipped_bit_is_noticed_and_healed_by_a_new_upload() {
        let dir = tempfile::tempdir().unwrap();
        let store = ArtifactStore::open(dir.path()).unwrap();
        let artifact = artifact(None);
        store.put_artifact(&artifact).unwrap();
        let path = store.path(artifact.digest().into());
        for known in [true, false] {
            let mut bytes = fs::read(&path).unwrap();
            bytes[5000] ^= 1;
            fs::write(&path, &bytes).unwrap();
            // The first look compares with the checksum of the bytes that were put, the second with the digest.
            assert_eq!(
                store.proven().contains_key(&artifact.digest().into()),
                known
            );
            assert!(matches!(
                store.get_artifact(&artifact.digest()),
                Err(StoreError::Corrupt { .. })
            ));
            bytes[5000] ^= 1;
            fs::write(&path, bytes).unwrap();
        }
        store.put_artifact(&artifact).unwrap();
        assert_eq!(store.get_artifact(&artifact.digest()).unwrap(), artifact);
    }

    #[test]
    fn a_start_removes_what_a_crash_left() {
        let dir = tempfile::tempdir().unwrap();
        let store = ArtifactStore::open(dir.path()).unwrap();
        fs::write(dir.path().join("tmp/17"), b"half").unwrap();
        let pin = store.put(b"kept").unwrap();
        let again = ArtifactStore::open(dir.path()).unwrap();
        assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
        assert_eq!(again.get(pin.digest()).unwrap(), b"kept");
    }

    #[test]
    fn a_pinned_blob_stays() {
        let dir = tempfile::tempdir().unwrap();
        let store = ArtifactStore::open(dir.path()).unwrap();
        let pin = store.put(b"bytes").unwrap();
        let second = store.put(b"bytes").unwrap();
        let digest = pin.digest();
        drop(pin);
        store.remove(digest).unwrap();
        assert!(store.get(digest).is_ok());
        drop(second);
        store.remove(digest).unwrap();
        assert!(matches!(
            store.get(digest),
            Err(StoreError::NotFound { .. })
        ));
        store.remove(digest).unwrap();
    }

    #[test]
    fn hostile_bytes_are_no_artifact() {
        let read = |bytes: &[u8]| {
            read_artifact(bytes, bytes.len() as u64, vec![9; 3], &mut |_| ()).unwrap()
        };
        let mut whole = ARTIFACT_MAGIC.to_vec();
        whole.extend(2u64.to_le_bytes());
        whole.extend(b"{}");
        whole.extend(1u64.to_le_bytes());
        whole.extend(b"t");
        assert!(read(&whole).is_some());
        for cut in 0..whole.len() {
            assert!(read(&whole[..cut]).is_none(), "cut at {cut}");
        }
        let mut huge = whole.clone();
        huge[ARTIFACT_MAGIC.len()..][..8].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(read(&huge).is_none());
        let mut longer = whole;
        longer.push(0);
        assert!(read(&longer).is_none());
    }
}
