//! What an owner may change about a version: whether it stays in memory, and whether it may be merged. Kept beside the
//! version, which itself never changes, so that a pin survives a restart. Must not know what is in memory now.

use espalier_adapters::profile::MergePolicy;
use espalier_adapters::version::VersionDigest;
use rusqlite::{OptionalExtension, Transaction};

use super::rows::{self, damaged};
use super::{Registry, RegistryError, Version, VersionName, VersionNumber};

/// How a version is kept in memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Serving {
    /// It is loaded at the start and never evicted.
    pub pinned: bool,
    /// Whether it may be served from merged weights.
    pub merge_policy: MergePolicy,
}

/// What to change; `None` leaves it.
#[derive(Debug, Clone, Copy, Default)]
pub struct ServingChange {
    /// See [`Serving::pinned`].
    pub pinned: Option<bool>,
    /// See [`Serving::merge_policy`].
    pub merge_policy: Option<MergePolicy>,
}

impl Registry {
    /// Changes how a version is kept. The change holds for requests that resolve its name after this returns.
    pub async fn set_serving(
        &self,
        name: VersionName,
        change: ServingChange,
    ) -> Result<Version, RegistryError> {
        let forget = name.adapter.clone();
        let version = self
            .inner
            .database
            .write(move |tx| {
                let key = rows::require_key(tx, &name.adapter)?;
                let before = rows::version(tx, &name)?.serving;
                let after = Serving {
                    pinned: change.pinned.unwrap_or(before.pinned),
                    merge_policy: change.merge_policy.unwrap_or(before.merge_policy),
                };
                store(tx, key, name.number, after)?;
                rows::version(tx, &name)
            })
            .await?;
        self.forget(&forget);
        Ok(version)
    }

    /// The digests of all pinned versions that can be used, each once.
    pub async fn pinned(&self) -> Result<Vec<VersionDigest>, RegistryError> {
        self.inner
            .database
            .read(|tx| {
                let mut query = tx.prepare(
                    "SELECT DISTINCT v.digest FROM version_serving s \
                     JOIN versions v ON v.adapter = s.adapter AND v.number = s.number \
                     WHERE s.pinned AND v.state = 'active'",
                )?;
                let digests = query
                    .query_map([], |row| row.get::<_, [u8; 32]>(0))?
                    .collect::<Result<Vec<_>, _>>()?;
                Ok(digests.into_iter().map(VersionDigest::from_bytes).collect())
            })
            .await
    }

    /// Of versions with this digest: whether there is any, and whether one of them is pinned.
    pub async fn kept(&self, digest: VersionDigest) -> Result<(bool, bool), RegistryError> {
        self.inner
            .database
            .read(move |tx| {
                let mut query = tx.prepare_cached(
                    "SELECT count(*) > 0, coalesce(max(s.pinned), 0) FROM versions v \
                     LEFT JOIN version_serving s ON s.adapter = v.adapter AND s.number = v.number \
                     WHERE v.digest = ?1",
                )?;
                let kept = query.query_row([digest.as_bytes().as_slice()], |row| {
                    Ok((row.get(0)?, row.get(1)?))
                })?;
                Ok(kept)
            })
            .await
    }
}

/// How a version of the adapter with this row id is kept.
pub(super) fn of(
    tx: &Transaction<'_>,
    key: i64,
    number: VersionNumber,
) -> Result<Serving, RegistryError> {
    let found: Option<(bool, String)> = tx
        .prepare_cached(
            "SELECT pinned, merge_policy FROM version_serving WHERE adapter = ?1 AND number = ?2",
        )?
        .query_row((key, number.get()), |row| Ok((row.get(0)?, row.get(1)?)))
        .optional()?;
    let Some((pinned, policy)) = found else {
        return Ok(Serving::default());
    };
    let merge_policy = match policy.as_str() {
        "auto" => MergePolicy::Auto,
        "merged" => MergePolicy::Merged,
        "unmerged" => MergePolicy::Unmerged,
        other => return Err(damaged("version_serving.merge_policy", other)),
    };
    Ok(Serving {
        pinned,
        merge_policy,
    })
}

fn store(
    tx: &Transaction<'_>,
    key: i64,
    number: VersionNumber,
    serving: Serving,
) -> Result<(), RegistryError> {
    let policy = match serving.merge_policy {
        MergePolicy::Auto => "auto",
        MergePolicy::Merged => "merged",
        MergePolicy::Unmerged => "unmerged",
    };
    tx.execute(
        "INSERT INTO version_serving (adapter, number, pinned, merge_policy) VALUES (?1, ?2, ?3, ?4) \
         ON CONFLICT (adapter, number) DO UPDATE SET pinned = excluded.pinned, merge_policy = excluded.merge_policy",
        (key, number.get(), serving.pinned, policy),
    )?;
    Ok(())
}
