//! The registry's rows: every SQL statement on adapters, versions and aliases, and nothing that decides.

use std::collections::BTreeMap;

use espalier_adapters::version::VersionDigest;
use rusqlite::{OptionalExtension, Row, Transaction};
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::{
    Adapter, AdapterId, AdapterName, AdapterRef, Alias, DatabaseError, NewVersion, PageRequest,
    RegistryError, RegistryLimits, Selector, Serving, TenantId, TenantName, Version, VersionName,
    VersionNumber, VersionState, limit, now_ms, serving,
};
use crate::artifact_store::BlobDigest;

/// A stored value that does not read back.
pub(super) fn damaged(column: &'static str, reason: impl std::fmt::Display) -> RegistryError {
    RegistryError::Database(DatabaseError::Damaged {
        column,
        reason: reason.to_string(),
    })
}

fn from_json<T: DeserializeOwned>(column: &'static str, text: &str) -> Result<T, RegistryError> {
    serde_json::from_str(text).map_err(|error| damaged(column, error))
}

fn to_json(column: &'static str, value: &impl Serialize) -> Result<String, RegistryError> {
    serde_json::to_string(value).map_err(|error| damaged(column, error))
}

fn number(column: &'static str, value: u32) -> Result<VersionNumber, RegistryError> {
    VersionNumber::new(value).ok_or_else(|| damaged(column, value))
}

/// The tenant exists, or an error says that it does not.
pub(super) fn tenant_exists(tx: &Transaction<'_>, tenant: &TenantId) -> Result<(), RegistryError> {
    let exists: bool = tx
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM tenants WHERE id = ?1)")?
        .query_row([tenant.as_str()], |row| row.get(0))?;
    if exists {
        return Ok(());
    }
    Err(RegistryError::TenantNotFound {
        name: TenantName(tenant.clone()),
    })
}

/// The row id of an adapter, if it is there.
pub(super) fn adapter_key(
    tx: &Transaction<'_>,
    name: &AdapterName,
) -> Result<Option<i64>, RegistryError> {
    Ok(tx
        .prepare_cached("SELECT id FROM adapters WHERE tenant = ?1 AND adapter = ?2")?
        .query_row((name.tenant.as_str(), name.adapter.as_str()), |row| {
            row.get(0)
        })
        .optional()?)
}

pub(super) fn require_key(tx: &Transaction<'_>, name: &AdapterName) -> Result<i64, RegistryError> {
    match adapter_key(tx, name)? {
        Some(key) => Ok(key),
        None => {
            tenant_exists(tx, &name.tenant)?;
            Err(RegistryError::AdapterNotFound { name: name.clone() })
        }
    }
}

/// Registers an adapter whose name is free.
pub(super) fn insert_adapter(
    tx: &Transaction<'_>,
    name: &AdapterName,
    description: &str,
    limits: &RegistryLimits,
) -> Result<(), RegistryError> {
    tenant_exists(tx, &name.tenant)?;
    limit(
        "adapter_id characters",
        name.adapter.as_str().len(),
        limits.max_id_length,
    )?;
    limit(
        "description bytes",
        description.len(),
        limits.max_description_bytes,
    )?;
    let count: usize = tx.query_row(
        "SELECT count(*) FROM adapters WHERE tenant = ?1",
        [name.tenant.as_str()],
        |row| row.get(0),
    )?;
    limit("adapters of the tenant", count + 1, limits.max_adapters)?;
    let now = now_ms();
    tx.execute(
        "INSERT INTO adapters (tenant, adapter, uid, description, next_version, revision, create_time, update_time) \
         VALUES (?1, ?2, ?3, ?4, 1, 1, ?5, ?5)",
        (
            name.tenant.as_str(),
            name.adapter.as_str(),
            Uuid::new_v4().to_string(),
            description,
            now,
        ),
    )?;
    Ok(())
}

/// One adapter with its aliases.
pub(super) fn adapter(tx: &Transaction<'_>, name: &AdapterName) -> Result<Adapter, RegistryError> {
    let key = require_key(tx, name)?;
    let version_count: u32 = tx
        .prepare_cached("SELECT count(*) FROM versions WHERE adapter = ?1")?
        .query_row([key], |row| row.get(0))?;
    let mut aliases = BTreeMap::new();
    let mut query = tx.prepare_cached("SELECT alias, number FROM aliases WHERE adapter = ?1")?;
    let mut rows = query.query([key])?;
    while let Some(row) = rows.next()? {
        let alias: String = row.get(0)?;
        let alias = Alias::parse(&alias).map_err(|error| damaged("aliases.alias", error))?;
        aliases.insert(alias, number("aliases.number", row.get(1)?)?);
    }
    let mut query = tx.prepare_cached(
        "SELECT description, next_version, revision, uid, create_time, update_time FROM adapters WHERE id = ?1",
    )?;
    Ok(query.query_row([key], |row| {
        let (next, revision): (u32, u64) = (row.get(1)?, row.get(2)?);
        let uid: String = row.get(3)?;
        Ok(Adapter {
            name: name.clone(),
            description: row.get(0)?,
            aliases,
            latest_version: next - 1,
            version_count,
            create_time: row.get(4)?,
            update_time: row.get(5)?,
            // The uid keeps an etag of a deleted adapter from fitting its successor of the same name.
            etag: format!("{}-{revision}", uid.get(..8).unwrap_or(&uid)),
        })
    })?)
}

/// Ids of one page of a tenant's adapters and the first of the next.
pub(super) fn adapter_ids(
    tx: &Transaction<'_>,
    tenant: &TenantId,
    page: &PageRequest,
) -> Result<Vec<AdapterId>, RegistryError> {
    let mut query = tx.prepare_cached(
        "SELECT adapter FROM adapters WHERE tenant = ?1 AND adapter > ?2 ORDER BY adapter LIMIT ?3",
    )?;
    let after = page.after.as_deref().unwrap_or("");
    let ids = query
        .query_map((tenant.as_str(), after, page.size + 1), |row| row.get(0))?
        .collect::<Result<Vec<String>, _>>()?;
    ids.iter()
        .map(|id| AdapterId::parse(id).map_err(|error| damaged("adapters.adapter", error)))
        .collect()
}

/// Changes the etag.
pub(super) fn touch(tx: &Transaction<'_>, name: &AdapterName) -> Result<(), RegistryError> {
    tx.execute(
        "UPDATE adapters SET revision = revision + 1, update_time = ?3 WHERE tenant = ?1 AND adapter = ?2",
        (name.tenant.as_str(), name.adapter.as_str(), now_ms()),
    )?;
    Ok(())
}

/// Removes an adapter with all that hangs on it and returns the digests of its versions.
pub(super) fn delete_adapter(
    tx: &Transaction<'_>,
    name: &AdapterName,
) -> Result<Vec<BlobDigest>, RegistryError> {
    let key = require_key(tx, name)?;
    let digests = tx
        .prepare("SELECT digest FROM versions WHERE adapter = ?1")?
        .query_map([key], |row| row.get(0).map(BlobDigest))?
        .collect::<Result<_, _>>()?;
    // Request ids must not lead a retry to versions that are gone.
    tx.execute(
        "DELETE FROM requests WHERE tenant = ?1 AND substr(resource, 1, length(?2)) = ?2",
        (name.tenant.as_str(), format!("{name}/versions/")),
    )?;
    tx.execute("DELETE FROM aliases WHERE adapter = ?1", [key])?;
    tx.execute("DELETE FROM adapters WHERE id = ?1", [key])?;
    Ok(digests)
}

/// Refuses when a job that has not ended writes to the adapter, or starts from or answers with this version of it.
pub(super) fn refuse_if_in_job(
    tx: &Transaction<'_>,
    name: &AdapterName,
    version: Option<VersionNumber>,
) -> Result<(), RegistryError> {
    let source = version.map_or_else(
        || format!("{name}/versions/%"),
        |n| format!("{name}/versions/{n}"),
    );
    let job: Option<String> = tx
        .query_row(
            "SELECT job FROM unfinished_jobs WHERE tenant = ?1 \
             AND (from_version LIKE ?2 OR (?3 AND adapter = (SELECT id FROM adapters WHERE tenant = ?1 AND adapter = ?4))) \
             LIMIT 1",
            (name.tenant.as_str(), &source, version.is_none(), name.adapter.as_str()),
            |row| row.get(0),
        )
        .optional()?;
    let bulk: Option<String> = tx
        .query_row(
            "SELECT job FROM bulk_jobs WHERE tenant = ?1 AND state IN ('queued', 'running') AND version LIKE ?2 LIMIT 1",
            (name.tenant.as_str(), source),
            |row| row.get(0),
        )
        .optional()?;
    let job = job.map(|job| format!("trainingJobs/{job}"));
    match job.or_else(|| bulk.map(|job| format!("bulkJobs/{job}"))) {
        None => Ok(()),
        Some(job) => Err(RegistryError::InUse {
            resource: version.map_or_else(|| name.to_string(), |n| format!("{name}/versions/{n}")),
            by: format!("tenants/{}/{job}", name.tenant),
        }),
    }
}

/// Inserts a version under the adapter's next number.
pub(super) fn insert_version(
    tx: &Transaction<'_>,
    name: &AdapterName,
    new: &NewVersion,
    limits: &RegistryLimits,
) -> Result<VersionNumber, RegistryError> {
    let key = require_key(tx, name)?;
    let count: usize = tx.query_row(
        "SELECT count(*) FROM versions WHERE adapter = ?1",
        [key],
        |row| row.get(0),
    )?;
    limit("versions of the adapter", count + 1, limits.max_versions)?;
    let next: u32 = tx.query_row(
        "UPDATE adapters SET next_version = next_version + 1 WHERE id = ?1 RETURNING next_version - 1",
        [key],
        |row| row.get(0),
    )?;
    tx.execute(
        "INSERT INTO versions (adapter, number, uid, state, digest, size, base_name, base_digest, profile, summary, \
         report, provenance, metrics, create_time) \
         VALUES (?1, ?2, ?3, 'active', ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
        (
            key,
            next,
            Uuid::new_v4().to_string(),
            new.digest.as_bytes().as_slice(),
            new.size,
            &new.base_name,
            &new.base_digest,
            to_json("versions.profile", &new.profile)?,
            to_json("versions.summary", &new.summary)?,
            to_json("versions.report", &new.report)?,
            to_json("versions.provenance", &new.provenance)?,
            to_json("versions.metrics", &new.metrics)?,
            now_ms(),
        ),
    )?;
    number("versions.number", next)
}

const VERSION_COLUMNS: &str = "number, state, error, digest, size, base_name, base_digest, profile, summary, report, \
     provenance, metrics, create_time";

fn version_row(name: &AdapterName, row: &Row<'_>) -> Result<Version, RegistryError> {
    let text = |index: usize| row.get::<_, String>(index);
    let state = match text(1)?.as_str() {
        "active" => VersionState::Active,
        "quarantined" => VersionState::Quarantined,
        other => return Err(damaged("versions.state", other)),
    };
    let digest: Vec<u8> = row.get(3)?;
    let digest = digest
        .try_into()
        .map_err(|_| damaged("versions.digest", "not 32 bytes"))?;
    Ok(Version {
        name: VersionName::new(name.clone(), number("versions.number", row.get(0)?)?),
        state,
        error: row.get(2)?,
        content: NewVersion {
            digest: VersionDigest::from_bytes(digest),
            size: row.get(4)?,
            base_name: row.get(5)?,
            base_digest: row.get(6)?,
            profile: from_json("versions.profile", &text(7)?)?,
            summary: from_json("versions.summary", &text(8)?)?,
            report: from_json("versions.report", &text(9)?)?,
            provenance: from_json("versions.provenance", &text(10)?)?,
            metrics: from_json("versions.metrics", &text(11)?)?,
        },
        aliases: Vec::new(),
        serving: Serving::default(),
        create_time: row.get(12)?,
    })
}

fn with_aliases(
    tx: &Transaction<'_>,
    key: i64,
    mut version: Version,
) -> Result<Version, RegistryError> {
    let mut query = tx.prepare_cached(
        "SELECT alias FROM aliases WHERE adapter = ?1 AND number = ?2 ORDER BY alias",
    )?;
    let aliases = query
        .query_map((key, version.name.number.get()), |row| row.get(0))?
        .collect::<Result<Vec<String>, _>>()?;
    version.aliases = aliases
        .iter()
        .map(|alias| Alias::parse(alias).map_err(|error| damaged("aliases.alias", error)))
        .collect::<Result<_, _>>()?;
    version.serving = serving::of(tx, key, version.name.number)?;
    Ok(version)
}

/// One version.
pub(super) fn version(tx: &Transaction<'_>, name: &VersionName) -> Result<Version, RegistryError> {
    let key = require_key(tx, &name.adapter)?;
    let sql = format!("SELECT {VERSION_COLUMNS} FROM versions WHERE adapter = ?1 AND number = ?2");
    let found = tx
        .prepare_cached(&sql)?
        .query_row((key, name.number.get()), |row| {
            Ok(version_row(&name.adapter, row))
        })
        .optional()?;
    match found {
        Some(version) => with_aliases(tx, key, version?),
        None => Err(RegistryError::VersionNotFound { name: name.clone() }),
    }
}

/// The version that a reference means now.
pub(super) fn version_by_reference(
    tx: &Transaction<'_>,
    reference: &AdapterRef,
) -> Result<Version, RegistryError> {
    let adapter = &reference.adapter;
    let chosen = match &reference.selector {
        Selector::Version(number) => *number,
        Selector::Alias(alias) => {
            let key = require_key(tx, adapter)?;
            let found: Option<u32> = tx
                .prepare_cached("SELECT number FROM aliases WHERE adapter = ?1 AND alias = ?2")?
                .query_row((key, alias.as_str()), |row| row.get(0))
                .optional()?;
            let found = found.ok_or_else(|| RegistryError::AliasNotFound {
                adapter: adapter.clone(),
                alias: alias.clone(),
            })?;
            number("aliases.number", found)?
        }
    };
    version(tx, &VersionName::new(adapter.clone(), chosen))
}

/// One page of versions, newest first, and the first of the next.
pub(super) fn versions(
    tx: &Transaction<'_>,
    adapter: &AdapterName,
    page: &PageRequest,
) -> Result<Vec<Version>, RegistryError> {
    let key = require_key(tx, adapter)?;
    let before = match &page.after {
        None => i64::MAX,
        Some(after) => after
            .parse()
            .map_err(|error| damaged("page_token", error))?,
    };
    let sql = format!(
        "SELECT {VERSION_COLUMNS} FROM versions WHERE adapter = ?1 AND number < ?2 ORDER BY number DESC LIMIT ?3"
    );
    let mut query = tx.prepare_cached(&sql)?;
    let rows = query
        .query_map((key, before, page.size + 1), |row| {
            Ok(version_row(adapter, row))
        })?
        .collect::<Result<Vec<_>, _>>()?;
    rows.into_iter()
        .map(|version| with_aliases(tx, key, version?))
        .collect()
}

/// Removes a version that nothing points to.
pub(super) fn delete_version(
    tx: &Transaction<'_>,
    name: &VersionName,
) -> Result<(), RegistryError> {
    let key = require_key(tx, &name.adapter)?;
    tx.execute(
        "DELETE FROM versions WHERE adapter = ?1 AND number = ?2",
        (key, name.number.get()),
    )?;
    touch(tx, &name.adapter)
}

/// Sets or moves an alias to a version that exists.
pub(super) fn set_alias(
    tx: &Transaction<'_>,
    name: &AdapterName,
    alias: &Alias,
    number: VersionNumber,
) -> Result<(), RegistryError> {
    let key = require_key(tx, name)?;
    tx.execute(
        "INSERT INTO aliases (adapter, alias, number) VALUES (?1, ?2, ?3) \
         ON CONFLICT (adapter, alias) DO UPDATE SET number = excluded.number",
        (key, alias.as_str(), number.get()),
    )?;
    Ok(())
}

/// Removes an alias.
pub(super) fn remove_alias(
    tx: &Transaction<'_>,
    name: &AdapterName,
    alias: &Alias,
) -> Result<(), RegistryError> {
    let key = require_key(tx, name)?;
    tx.execute(
        "DELETE FROM aliases WHERE adapter = ?1 AND alias = ?2",
        (key, alias.as_str()),
    )?;
    Ok(())
}

/// Versions of a tenant with one of these digests.
pub(super) fn names_of(
    tx: &Transaction<'_>,
    tenant: &TenantId,
    digests: &[VersionDigest],
) -> Result<Vec<(VersionName, VersionDigest)>, RegistryError> {
    let mut query = tx.prepare_cached(
        "SELECT a.adapter, v.number FROM versions v JOIN adapters a ON a.id = v.adapter \
         WHERE v.digest = ?1 AND a.tenant = ?2 ORDER BY a.adapter, v.number",
    )?;
    let mut names = Vec::new();
    for digest in digests {
        let mut rows = query.query((digest.as_bytes().as_slice(), tenant.as_str()))?;
        while let Some(row) = rows.next()? {
            let id: String = row.get(0)?;
            let id = AdapterId::parse(&id).map_err(|error| damaged("adapters.adapter", error))?;
            let adapter = AdapterName::new(tenant.clone(), id);
            let number = number("versions.number", row.get(1)?)?;
            names.push((VersionName::new(adapter, number), *digest));
        }
    }
    Ok(names)
}

/// Marks every version of a digest and returns the adapters they belong to.
pub(super) fn quarantine(
    tx: &Transaction<'_>,
    digest: &VersionDigest,
    why: &str,
) -> Result<Vec<AdapterName>, RegistryError> {
    tx.execute(
        "UPDATE versions SET state = 'quarantined', error = ?2 WHERE digest = ?1",
        (digest.as_bytes().as_slice(), why),
    )?;
    let mut query = tx.prepare(
        "SELECT DISTINCT a.tenant, a.adapter FROM versions v JOIN adapters a ON a.id = v.adapter WHERE v.digest = ?1",
    )?;
    let rows = query
        .query_map([digest.as_bytes().as_slice()], |row| {
            Ok((row.get::<_, String>(0)?, row.get::<_, String>(1)?))
        })?
        .collect::<Result<Vec<_>, _>>()?;
    rows.iter()
        .map(|(tenant, adapter)| {
            let tenant = TenantId::parse(tenant).map_err(|e| damaged("adapters.tenant", e))?;
            let adapter = AdapterId::parse(adapter).map_err(|e| damaged("adapters.adapter", e))?;
            Ok(AdapterName::new(tenant, adapter))
        })
        .collect()
}
