//! Removes blobs that nothing names: those of something deleted, and at the start what a crash between storing and naming left behind.
//!
//! The question "is it needed?" and the removal both happen on the database's writer, so that nobody can name a blob in
//! between; one that is about to be named is pinned in the store.

use std::collections::HashSet;

use rusqlite::Transaction;

use super::{DatabaseError, Registry, RegistryError};
use crate::artifact_store::{ArtifactStore, BlobDigest, StoreError};

impl Registry {
    /// Removes every blob that no version, dataset, unfinished job or checkpoint names.
    pub async fn sweep(&self) -> Result<(), RegistryError> {
        let store = self.inner.store.clone();
        self.inner
            .database
            .write(move |tx| {
                if let Err(error) = sweep(tx, &store)? {
                    // Bytes too many harm nobody; the next sweep tries again.
                    tracing::warn!(%error, "unneeded blobs could not be removed");
                }
                Ok(())
            })
            .await
    }
}

impl Registry {
    /// Removes those of these blobs that nothing names any more. Failures are logged: bytes too many harm nobody.
    pub async fn release(&self, digests: Vec<BlobDigest>) -> Result<(), RegistryError> {
        let store = self.inner.store.clone();
        self.inner
            .database
            .write(move |tx| {
                for digest in digests {
                    if !is_needed(tx, digest)?
                        && let Err(error) = store.remove(digest)
                    {
                        tracing::warn!(%error, "an unneeded blob could not be removed");
                    }
                }
                Ok(())
            })
            .await
    }
}

fn is_needed(tx: &Transaction<'_>, digest: BlobDigest) -> Result<bool, DatabaseError> {
    let mut query = tx.prepare_cached(
        "SELECT EXISTS (SELECT 1 FROM versions WHERE digest = ?1) OR EXISTS (SELECT 1 FROM datasets WHERE digest = ?1) \
         OR EXISTS (SELECT 1 FROM checkpoints WHERE digest = ?1) \
         OR EXISTS (SELECT 1 FROM unfinished_jobs WHERE train_digest = ?1 OR valid_digest = ?1)",
    )?;
    Ok(query.query_row([digest.0.as_slice()], |row| row.get(0))?)
}

fn sweep(
    tx: &Transaction<'_>,
    store: &ArtifactStore,
) -> Result<Result<(), StoreError>, DatabaseError> {
    let needed = needed(tx)?;
    Ok(store.list().and_then(|present| {
        present
            .into_iter()
            .filter(|digest| !needed.contains(digest))
            .try_for_each(|digest| store.remove(digest))
    }))
}

/// What the database names.
fn needed(tx: &Transaction<'_>) -> Result<HashSet<BlobDigest>, DatabaseError> {
    let mut query = tx.prepare_cached(
        "SELECT digest FROM versions UNION SELECT digest FROM datasets UNION SELECT digest FROM checkpoints \
         UNION SELECT train_digest FROM unfinished_jobs \
         UNION SELECT valid_digest FROM unfinished_jobs WHERE valid_digest IS NOT NULL",
    )?;
    let rows = query
        .query_map([], |row| row.get::<_, [u8; 32]>(0))?
        .collect::<Result<Vec<_>, _>>()?;
    Ok(rows.into_iter().map(BlobDigest).collect())
}
