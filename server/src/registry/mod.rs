//! Names to versions: adapters, their immutable versions, and the aliases that point to them.
//!
//! A request's reference is resolved once and the answer, with its digest, holds for the request's life. Resolved names are
//! cached; whatever changes an adapter forgets its cached names after the commit, so that a request that starts after a move
//! was answered sees it. An unknown name is an error and never the base model. This file must not know where bytes lie nor
//! what is in memory.

mod rows;
mod serving;
mod summary;
mod sweep;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use espalier_adapters::head::{Activation, Pooling, Problem};
use espalier_adapters::profile::{MergePolicy, ServingProfile};
use espalier_adapters::report::Report;
use espalier_adapters::version::VersionDigest;
use rusqlite::Transaction;
use serde::{Deserialize, Serialize};

pub use serving::{Serving, ServingChange};
pub use summary::summarize;

use crate::artifact_store::ArtifactStore;
use crate::database::{
    Database, DatabaseError, EarlierUse, RequestKey, earlier_use, forget_requests_for, now_ms,
    remember_request,
};
use crate::names::{
    AdapterId, AdapterName, AdapterRef, Alias, Selector, TenantId, TenantName, VersionName,
    VersionNumber,
};
use crate::paging::{Page, PageRequest};
use crate::principal::{AccessError, Principal};

/// Why a name did not resolve or a change was refused.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// The caller may not; says nothing about what exists.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// No such tenant.
    #[error("{name} does not exist")]
    TenantNotFound {
        /// The tenant.
        name: TenantName,
    },
    /// No such adapter.
    #[error("{name} does not exist")]
    AdapterNotFound {
        /// The adapter.
        name: AdapterName,
    },
    /// The adapter has no such version.
    #[error("{name} does not exist")]
    VersionNotFound {
        /// The version.
        name: VersionName,
    },
    /// The adapter has no such alias, perhaps because it has no version yet.
    #[error("{adapter} has no alias {alias}")]
    AliasNotFound {
        /// The adapter.
        adapter: AdapterName,
        /// The alias.
        alias: Alias,
    },
    /// The id is taken.
    #[error("{name} exists already")]
    AdapterExists {
        /// The adapter.
        name: AdapterName,
    },
    /// The version is there but must not be used.
    #[error("{name} is {state}: {error}")]
    VersionNotActive {
        /// The version.
        name: VersionName,
        /// Its state.
        state: VersionState,
        /// Why.
        error: String,
    },
    /// Something still needs the resource.
    #[error("{resource} is in use by {by}")]
    InUse {
        /// The resource.
        resource: String,
        /// What holds it.
        by: String,
    },
    /// The adapter has another etag now.
    #[error("{name} has etag {current}, the request expects {given}")]
    EtagMismatch {
        /// The adapter.
        name: AdapterName,
        /// What the request expects.
        given: String,
        /// What it is.
        current: String,
    },
    /// The request id was used with another payload.
    #[error("request_id {request_id:?} was used before with another payload")]
    RequestIdReused {
        /// The id.
        request_id: String,
    },
    /// A count or length is over its limit.
    #[error("{what} would be {value}, the limit is {limit}")]
    Limit {
        /// What is counted.
        what: &'static str,
        /// The value it would have.
        value: usize,
        /// The limit.
        limit: usize,
    },
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl From<rusqlite::Error> for RegistryError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error.into())
    }
}

/// Whether a version can be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VersionState {
    /// Yes.
    Active,
    /// Its stored bytes failed their digest.
    Quarantined,
}

impl VersionState {
    /// The word in the database and in errors.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Active => "active",
            Self::Quarantined => "quarantined",
        }
    }
}

impl std::fmt::Display for VersionState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// An adapter: a named line of versions.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// Its name.
    pub name: AdapterName,
    /// For people.
    pub description: String,
    /// Where its aliases point, by alias.
    pub aliases: BTreeMap<Alias, VersionNumber>,
    /// The highest number given so far; 0 with none.
    pub latest_version: u32,
    /// Versions there are.
    pub version_count: u32,
    /// Unix milliseconds.
    pub create_time: i64,
    /// Unix milliseconds of the last change.
    pub update_time: i64,
    /// Changes with every change of the adapter, its versions or aliases.
    pub etag: String,
}

/// Where a version came from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Provenance {
    /// A client sent it.
    Upload,
    /// This training job (its full name) made it.
    TrainingJob(String),
    /// It is a sum of other versions.
    Combination(Combined),
}

/// What a combined version was made of. The parents may be gone; their digests say what they were.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Combined {
    /// The terms, in the order of the request.
    pub parents: Vec<Parent>,
    /// The rank that it was cut to; `None` is the exact sum.
    pub rank: Option<u32>,
    /// What the cut lost, by the Frobenius norm.
    pub relative_error: f64,
}

/// One term of a combined version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Parent {
    /// Its full name.
    pub version: String,
    /// Its content.
    pub digest: VersionDigest,
    /// What its update was multiplied by.
    pub weight: f32,
}

/// One file of an artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PartSummary {
    /// `adapter_config.json`, `adapter_model.safetensors` or `labels.json`.
    pub file: String,
    /// Its bytes.
    pub size: u64,
    /// SHA-256 of its bytes, hex.
    pub sha256: String,
}

/// What is told about a version without opening its artifact.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct VersionSummary {
    /// Rank r.
    pub rank: u32,
    /// lora_alpha.
    pub alpha: f64,
    /// Dropout in training.
    pub dropout: f64,
    /// Names of the adapted modules.
    pub target_modules: Vec<String>,
    /// Scale alpha / sqrt(r).
    pub use_rslora: bool,
    /// Weight-decomposed.
    pub use_dora: bool,
    /// Ranks by pattern, over `rank`.
    pub rank_pattern: Vec<(String, u32)>,
    /// Alphas by pattern, over `alpha`.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Adapted layers; empty is all.
    pub layers: Vec<u32>,
    /// Those of `target_modules` that (IA)3 scales on their inputs; `None` for another kind than (IA)3.
    pub feedforward_modules: Option<Vec<String>>,
    /// `target_modules` of `layers` are unfrozen, all of them where none is named.
    pub unfrozen: bool,
    /// Labels of the head, by row; empty without a head.
    pub labels: Vec<String>,
    /// What the head answers.
    pub problem: Problem,
    /// Outputs of the layers below the head, the first one first.
    pub hidden_layers: Vec<usize>,
    /// Behind each of them.
    pub activation: Option<Activation>,
    /// Which states the head reads.
    pub pooling: Pooling,
    /// The files.
    pub parts: Vec<PartSummary>,
}

/// A version to be published. Its artifact is in the store and pinned.
#[derive(Debug, Clone)]
pub struct NewVersion {
    /// Digest of the artifact.
    pub digest: VersionDigest,
    /// Bytes of its parts.
    pub size: u64,
    /// Resource name (`models/{m}`) of the base that it was checked against.
    pub base_name: String,
    /// Digest of that base.
    pub base_digest: String,
    /// How it is served.
    pub profile: ServingProfile,
    /// What it is.
    pub summary: VersionSummary,
    /// What the check found; warnings only.
    pub report: Report,
    /// Where it came from.
    pub provenance: Provenance,
    /// Results of its best evaluation, by metric.
    pub metrics: BTreeMap<String, f64>,
}

/// One immutable version.
#[derive(Debug, Clone)]
pub struct Version {
    /// Its canonical name.
    pub name: VersionName,
    /// Whether it can be used.
    pub state: VersionState,
    /// Why not.
    pub error: Option<String>,
    /// All that was fixed when it was published.
    pub content: NewVersion,
    /// The aliases that point to it now.
    pub aliases: Vec<Alias>,
    /// How it is kept in memory.
    pub serving: Serving,
    /// Unix milliseconds.
    pub create_time: i64,
}

/// What a reference resolved to; fixed for the life of the request that asked.
#[derive(Debug, Clone)]
pub struct ResolvedVersion {
    /// The canonical name, which every reply carries.
    pub name: VersionName,
    /// The key of everything that the engine keeps.
    pub digest: VersionDigest,
    /// Digest of the base that it was made for.
    pub base_digest: String,
    /// Defaults of requests.
    pub profile: ServingProfile,
    /// Labels of its head, by row; empty without a head.
    pub labels: Vec<String>,
    /// Whether it may be served from merged weights.
    pub merge_policy: MergePolicy,
}

/// Which aliases move to a new version, in the transaction that publishes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AliasPlan {
    /// These, and no others.
    Set(Vec<Alias>),
    /// None, except that the first `default` of an adapter that has none is set.
    DefaultIfAbsent,
}

/// A version to publish and where.
#[derive(Debug, Clone)]
pub struct Publish {
    /// The adapter.
    pub adapter: AdapterName,
    /// Register the adapter, with this description, when its name is new.
    pub create: Option<String>,
    /// The version.
    pub version: NewVersion,
    /// What moves.
    pub aliases: AliasPlan,
    /// Makes a retry safe.
    pub request: Option<RequestKey>,
}

/// An atomic change of an adapter's aliases.
#[derive(Debug, Clone, Default)]
pub struct AliasChange {
    /// Aliases to set or move.
    pub set: Vec<(Alias, VersionNumber)>,
    /// Aliases to remove; one that is not there is an error.
    pub remove: Vec<Alias>,
    /// Refuse unless the adapter has this etag.
    pub etag: Option<String>,
}

/// Bounds on names.
#[derive(Debug, Clone, Copy)]
pub struct RegistryLimits {
    /// Adapters of one tenant.
    pub max_adapters: usize,
    /// Versions of one adapter.
    pub max_versions: usize,
    /// Aliases of one adapter.
    pub max_aliases: usize,
    /// Bytes of a description.
    pub max_description_bytes: usize,
    /// Characters of an adapter's id.
    pub max_id_length: usize,
    /// Resolved names kept in memory.
    pub cache_entries: usize,
}

/// The registry. Cheap to clone.
#[derive(Clone)]
pub struct Registry {
    inner: Arc<Inner>,
}

struct Inner {
    database: Database,
    store: ArtifactStore,
    limits: RegistryLimits,
    cache: DashMap<AdapterRef, Arc<ResolvedVersion>>,
    /// Counts changes: a lookup that began before a change does not fill the cache after it.
    changes: AtomicU64,
}

impl Registry {
    /// A registry on an open database and store.
    pub fn new(database: Database, store: ArtifactStore, limits: RegistryLimits) -> Self {
        Self {
            inner: Arc::new(Inner {
                database,
                store,
                limits,
                cache: DashMap::new(),
                changes: AtomicU64::new(0),
            }),
        }
    }

    /// The version that `reference` means now, for a caller that may use its tenant's adapters. Authorised on every call,
    /// also when the name is cached.
    pub async fn resolve(
        &self,
        principal: &Principal,
        reference: &AdapterRef,
    ) -> Result<Arc<ResolvedVersion>, RegistryError> {
        principal.authorize(&reference.adapter.tenant)?;
        if let Some(found) = self.inner.cache.get(reference) {
            return Ok(Arc::clone(&found));
        }
        let before = self.inner.changes.load(Ordering::SeqCst);
        let wanted = reference.clone();
        let version = self
            .inner
            .database
            .read(move |tx| rows::version_by_reference(tx, &wanted))
            .await?;
        if version.state != VersionState::Active {
            return Err(RegistryError::VersionNotActive {
                name: version.name,
                state: version.state,
                error: version.error.unwrap_or_default(),
            });
        }
        let resolved = Arc::new(ResolvedVersion {
            name: version.name,
            digest: version.content.digest,
            base_digest: version.content.base_digest,
            profile: version.content.profile,
            labels: version.content.summary.labels,
            merge_policy: version.serving.merge_policy,
        });
        self.remember(reference, &resolved, before);
        Ok(resolved)
    }

    /// Registers an adapter.
    pub async fn create_adapter(
        &self,
        name: AdapterName,
        description: String,
        request: Option<RequestKey>,
    ) -> Result<Adapter, RegistryError> {
        let limits = self.inner.limits;
        self.inner
            .database
            .write(move |tx| {
                if let Some(request) = &request {
                    match seen(tx, request)? {
                        None => remember_request(tx, request, &name.to_string())?,
                        Some(_) => return rows::adapter(tx, &name),
                    }
                }
                if rows::adapter_key(tx, &name)?.is_some() {
                    return Err(RegistryError::AdapterExists { name });
                }
                rows::insert_adapter(tx, &name, &description, &limits)?;
                rows::adapter(tx, &name)
            })
            .await
    }

    /// One adapter.
    pub async fn get_adapter(&self, name: AdapterName) -> Result<Adapter, RegistryError> {
        self.inner
            .database
            .read(move |tx| rows::adapter(tx, &name))
            .await
    }

    /// A tenant's adapters by name; the page's key is the id.
    pub async fn list_adapters(
        &self,
        tenant: TenantId,
        page: PageRequest,
    ) -> Result<Page<Adapter>, RegistryError> {
        self.inner
            .database
            .read(move |tx| {
                rows::tenant_exists(tx, &tenant)?;
                let ids = rows::adapter_ids(tx, &tenant, &page)?;
                let adapters = ids
                    .into_iter()
                    .map(|id| rows::adapter(tx, &AdapterName::new(tenant.clone(), id)))
                    .collect::<Result<Vec<_>, _>>()?;
                Ok(Page::cut(adapters, &page, |a| a.name.adapter.to_string()))
            })
            .await
    }

    /// Removes an adapter, with `force` its versions and aliases too, and returns the digests of those versions. Refused
    /// while a job that has not ended writes to it.
    pub async fn delete_adapter(
        &self,
        name: AdapterName,
        etag: Option<String>,
        force: bool,
    ) -> Result<Vec<VersionDigest>, RegistryError> {
        let forget = name.clone();
        let digests = self
            .inner
            .database
            .write(move |tx| {
                let adapter = rows::adapter(tx, &name)?;
                check_etag(&adapter, etag.as_deref())?;
                rows::refuse_if_in_job(tx, &name, None)?;
                if !force && adapter.version_count > 0 {
                    return Err(RegistryError::InUse {
                        resource: name.to_string(),
                        by: format!("{} versions", adapter.version_count),
                    });
                }
                let digests = rows::delete_adapter(tx, &name)?;
                forget_requests_for(tx, &name.to_string())?;
                Ok::<_, RegistryError>(digests)
            })
            .await?;
        self.forget(&forget);
        self.release(digests.clone()).await?;
        let digests = digests.into_iter().map(|digest| digest.0);
        Ok(digests.map(VersionDigest::from_bytes).collect())
    }

    /// Publishes a version and moves aliases to it, in one transaction. The caller holds the artifact's pin.
    pub async fn publish(&self, publish: Publish) -> Result<Version, RegistryError> {
        let limits = self.inner.limits;
        let adapter = publish.adapter.clone();
        let version = self
            .inner
            .database
            .write(move |tx| {
                if let Some(request) = &publish.request
                    && let Some(resource) = seen(tx, request)?
                {
                    let name = VersionName::parse(&resource)
                        .map_err(|error| rows::damaged("requests.resource", error))?;
                    return rows::version(tx, &name);
                }
                let name = publish_in(tx, &publish, &limits)?;
                if let Some(request) = &publish.request {
                    remember_request(tx, request, &name.to_string())?;
                }
                rows::version(tx, &name)
            })
            .await?;
        self.forget(&adapter);
        Ok(version)
    }

    /// The version that a request id made before, so that a retried upload need not be checked again.
    pub async fn published_before(
        &self,
        request: RequestKey,
    ) -> Result<Option<Version>, RegistryError> {
        self.inner
            .database
            .read(move |tx| match seen(tx, &request)? {
                None => Ok(None),
                Some(resource) => {
                    let name = VersionName::parse(&resource)
                        .map_err(|error| rows::damaged("requests.resource", error))?;
                    rows::version(tx, &name).map(Some)
                }
            })
            .await
    }

    /// One version by any reference, whatever its state.
    pub async fn get_version(&self, reference: AdapterRef) -> Result<Version, RegistryError> {
        self.inner
            .database
            .read(move |tx| rows::version_by_reference(tx, &reference))
            .await
    }

    /// An adapter's versions, newest first; the page's key is the number.
    pub async fn list_versions(
        &self,
        adapter: AdapterName,
        page: PageRequest,
    ) -> Result<Page<Version>, RegistryError> {
        self.inner
            .database
            .read(move |tx| {
                let versions = rows::versions(tx, &adapter, &page)?;
                Ok(Page::cut(versions, &page, |v| v.name.number.to_string()))
            })
            .await
    }

    /// Removes a version and returns its digest. Refused while an alias points to it or a job that has not ended starts
    /// from it.
    pub async fn delete_version(&self, name: VersionName) -> Result<VersionDigest, RegistryError> {
        let forget = name.adapter.clone();
        let digest = self
            .inner
            .database
            .write(move |tx| {
                let version = rows::version(tx, &name)?;
                if let Some(alias) = version.aliases.first() {
                    return Err(RegistryError::InUse {
                        resource: name.to_string(),
                        by: format!("alias {alias}"),
                    });
                }
                rows::refuse_if_in_job(tx, &name.adapter, Some(name.number))?;
                rows::delete_version(tx, &name)?;
                forget_requests_for(tx, &name.to_string())?;
                Ok::<_, RegistryError>(version.content.digest)
            })
            .await?;
        self.forget(&forget);
        self.release(vec![digest.into()]).await?;
        Ok(digest)
    }

    /// Sets and removes aliases in one step.
    pub async fn set_aliases(
        &self,
        name: AdapterName,
        change: AliasChange,
    ) -> Result<Adapter, RegistryError> {
        let limits = self.inner.limits;
        let forget = name.clone();
        let adapter = self
            .inner
            .database
            .write(move |tx| {
                let adapter = rows::adapter(tx, &name)?;
                check_etag(&adapter, change.etag.as_deref())?;
                for alias in &change.remove {
                    if !adapter.aliases.contains_key(alias) {
                        return Err(RegistryError::AliasNotFound {
                            adapter: name.clone(),
                            alias: alias.clone(),
                        });
                    }
                    rows::remove_alias(tx, &name, alias)?;
                }
                for (alias, number) in &change.set {
                    let version = rows::version(tx, &VersionName::new(name.clone(), *number))?;
                    require_active(&version)?;
                    rows::set_alias(tx, &name, alias, *number)?;
                }
                rows::touch(tx, &name)?;
                let adapter = rows::adapter(tx, &name)?;
                limit(
                    "aliases of the adapter",
                    adapter.aliases.len(),
                    limits.max_aliases,
                )?;
                Ok(adapter)
            })
            .await?;
        self.forget(&forget);
        Ok(adapter)
    }

    /// Which of a tenant's versions have one of these digests: how residency gets its names.
    pub async fn names_of(
        &self,
        tenant: TenantId,
        digests: Vec<VersionDigest>,
    ) -> Result<Vec<(VersionName, VersionDigest)>, RegistryError> {
        self.inner
            .database
            .read(move |tx| {
                rows::tenant_exists(tx, &tenant)?;
                rows::names_of(tx, &tenant, &digests)
            })
            .await
    }

    /// Takes every version of this digest out of service because its stored bytes are not what they were.
    pub async fn quarantine(
        &self,
        digest: VersionDigest,
        why: String,
    ) -> Result<(), RegistryError> {
        tracing::error!(%digest, why, "a stored artifact is corrupt; its versions are quarantined");
        let names = self
            .inner
            .database
            .write(move |tx| rows::quarantine(tx, &digest, &why))
            .await?;
        for name in names {
            self.forget(&name);
        }
        Ok(())
    }

    /// Forgets the cached names of `adapter`; whoever changed it in a transaction of its own calls this after the commit.
    pub fn forget(&self, adapter: &AdapterName) {
        self.inner.changes.fetch_add(1, Ordering::SeqCst);
        self.inner
            .cache
            .retain(|cached, _| cached.adapter != *adapter);
    }

    /// Forgets the cached names of a whole tenant.
    pub fn forget_tenant(&self, tenant: &TenantId) {
        self.inner.changes.fetch_add(1, Ordering::SeqCst);
        self.inner
            .cache
            .retain(|cached, _| cached.adapter.tenant != *tenant);
    }

    /// The bounds that were configured.
    pub fn limits(&self) -> &RegistryLimits {
        &self.inner.limits
    }

    /// Fills the cache unless something changed since `before`. The check runs under the entry's lock: a change counts first
    /// and forgets then, so it either is seen here or finds the entry.
    fn remember(&self, reference: &AdapterRef, resolved: &Arc<ResolvedVersion>, before: u64) {
        if self.inner.cache.len() >= self.inner.limits.cache_entries {
            // Any eighth, so that a full cache does not start from nothing.
            let mut count = 0;
            self.inner.cache.retain(|_, _| {
                count += 1;
                count % 8 != 0
            });
        }
        let entry = self.inner.cache.entry(reference.clone());
        if self.inner.changes.load(Ordering::SeqCst) != before {
            return;
        }
        match entry {
            Entry::Occupied(mut entry) => {
                entry.insert(Arc::clone(resolved));
            }
            Entry::Vacant(entry) => {
                entry.insert(Arc::clone(resolved));
            }
        }
    }
}

/// Registers the adapter unless it is there, inside the caller's transaction.
pub fn ensure_adapter(
    tx: &Transaction<'_>,
    name: &AdapterName,
    description: &str,
    limits: &RegistryLimits,
) -> Result<(), RegistryError> {
    match rows::adapter_key(tx, name)? {
        Some(_) => Ok(()),
        None => rows::insert_adapter(tx, name, description, limits),
    }
}

/// Inserts a version, with its adapter if asked, and moves aliases, inside the caller's transaction. The caller forgets the
/// adapter's cached names after the commit.
pub fn publish_in(
    tx: &Transaction<'_>,
    publish: &Publish,
    limits: &RegistryLimits,
) -> Result<VersionName, RegistryError> {
    let adapter = &publish.adapter;
    if rows::adapter_key(tx, adapter)?.is_none() {
        match &publish.create {
            Some(description) => rows::insert_adapter(tx, adapter, description, limits)?,
            None => {
                return Err(RegistryError::AdapterNotFound {
                    name: adapter.clone(),
                });
            }
        }
    }
    let number = rows::insert_version(tx, adapter, &publish.version, limits)?;
    let aliases = match &publish.aliases {
        AliasPlan::Set(aliases) => aliases.clone(),
        AliasPlan::DefaultIfAbsent => {
            let default = Alias::default_alias();
            let absent = !rows::adapter(tx, adapter)?.aliases.contains_key(&default);
            absent.then_some(default).into_iter().collect()
        }
    };
    for alias in &aliases {
        rows::set_alias(tx, adapter, alias, number)?;
    }
    rows::touch(tx, adapter)?;
    let count = rows::adapter(tx, adapter)?.aliases.len();
    limit("aliases of the adapter", count, limits.max_aliases)?;
    Ok(VersionName::new(adapter.clone(), number))
}

fn limit(what: &'static str, value: usize, limit: usize) -> Result<(), RegistryError> {
    if value > limit {
        return Err(RegistryError::Limit { what, value, limit });
    }
    Ok(())
}

fn require_active(version: &Version) -> Result<(), RegistryError> {
    if version.state == VersionState::Active {
        return Ok(());
    }
    Err(RegistryError::VersionNotActive {
        name: version.name.clone(),
        state: version.state,
        error: version.error.clone().unwrap_or_default(),
    })
}

fn check_etag(adapter: &Adapter, given: Option<&str>) -> Result<(), RegistryError> {
    match given {
        Some(given) if given != adapter.etag => Err(RegistryError::EtagMismatch {
            name: adapter.name.clone(),
            given: given.to_owned(),
            current: adapter.etag.clone(),
        }),
        _ => Ok(()),
    }
}

/// The resource that this request id made before, if it did.
fn seen(tx: &Transaction<'_>, request: &RequestKey) -> Result<Option<String>, RegistryError> {
    match earlier_use(tx, request)? {
        EarlierUse::None => Ok(None),
        EarlierUse::Same(resource) => Ok(Some(resource)),
        EarlierUse::Different => Err(RegistryError::RequestIdReused {
            request_id: request.request_id.clone(),
        }),
    }
}
