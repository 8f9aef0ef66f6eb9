//! Brings adapter versions from wherever the server keeps them into memory, on a thread of its own, so that others go
//! on being served. Knows no names, no tenants and no layout of files: a version is its digest.

use espalier_adapters::version::{AdapterArtifact, VersionDigest};

/// Where artifacts come from. Called on the loader thread only; may block.
pub trait AdapterSource: Send + Sync + 'static {
    /// The artifact of one version, bytes exactly as stored.
    ///
    /// # Errors
    /// [`SourceError`]; the requests that wait for the version get it.
    fn fetch(&self, digest: &VersionDigest) -> Result<AdapterArtifact, SourceError>;
}

/// Why an artifact could not be had. Texts hold no paths: clients see them.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SourceError {
    /// Nothing is stored under the digest.
    #[error("not stored")]
    NotFound,
    /// The stored bytes are not what the digest names.
    #[error("corrupt: {0}")]
    Corrupt(String),
    /// The store cannot be read just now.
    #[error("unavailable: {0}")]
    Unavailable(String),
}
