//! Tenants and API keys: who exists, and who a presented key is.
//!
//! A key reads `esp_{id}_{secret}`: the id finds its row, the secret has 256 random bits and only its SHA-256 is kept, so it
//! is shown once. Until the first key exists a server on loopback trusts everybody (`Principal::LocalAnonymous`); from then
//! on calls need a key, except that tenants and keys can still be managed on loopback until an admin key exists
//! (`Principal::LocalBootstrap`) or the configuration names one. Not bound to loopback, every call needs a key. This file
//! must not know headers or transports.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicI64, AtomicU8, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use dashmap::DashMap;
use rand::Rng;
use rusqlite::{OptionalExtension, Row, Transaction};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use crate::database::{
    Database, DatabaseError, EarlierUse, RequestKey, earlier_use, forget_requests_for, now_ms,
    remember_request,
};
use crate::names::{ApiKeyId, ApiKeyName, KeyParent, TenantId, TenantName};
use crate::paging::{Page, PageRequest};
use crate::principal::{AccessError, Principal};

/// How long a checked key is believed without asking the database: a key that another process revokes ends after this.
const BELIEVE_MS: i64 = 5_000;
/// Keys that are remembered as checked; beyond that all are forgotten at once.
const REMEMBERED_KEYS: usize = 100_000;

/// Why tenants or keys could not be read or changed.
#[derive(Debug, thiserror::Error)]
pub enum TenantError {
    /// The caller may not.
    #[error(transparent)]
    Access(#[from] AccessError),
    /// No such tenant.
    #[error("{name} does not exist")]
    TenantNotFound {
        /// The tenant.
        name: TenantName,
    },
    /// No such key.
    #[error("{name} does not exist")]
    KeyNotFound {
        /// The key.
        name: ApiKeyName,
    },
    /// The id is taken.
    #[error("{name} exists already")]
    TenantExists {
        /// The tenant.
        name: TenantName,
    },
    /// The tenant still owns something and `force` was not set, or a job of it has not ended.
    #[error("{name} still has {what}")]
    TenantInUse {
        /// The tenant.
        name: TenantName,
        /// What it still has.
        what: String,
    },
    /// A field of the new key contradicts another.
    #[error("{field}: {reason}")]
    InvalidField {
        /// The field.
        field: &'static str,
        /// What is wrong.
        reason: String,
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
    /// The request id was used with another payload.
    #[error("request_id {request_id:?} was used before with another payload")]
    RequestIdReused {
        /// The id.
        request_id: String,
    },
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl From<rusqlite::Error> for TenantError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error.into())
    }
}

/// A customer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tenant {
    /// Its id.
    pub id: TenantId,
    /// For people.
    pub display_name: String,
    /// Unix milliseconds.
    pub create_time: i64,
}

/// What a key may do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyRole {
    /// Everything inside its tenant.
    Tenant,
    /// Everything inside these tenants; all when the list is empty.
    Service(BTreeSet<TenantId>),
    /// Everything, tenants and keys included.
    Admin,
}

/// A key without its secret.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiKey {
    /// Its name.
    pub name: ApiKeyName,
    /// For people.
    pub display_name: String,
    /// What it may do.
    pub role: KeyRole,
    /// Unix milliseconds.
    pub create_time: i64,
    /// When it ends by itself.
    pub expire_time: Option<i64>,
    /// When it was revoked.
    pub revoke_time: Option<i64>,
}

/// What a new key is to be.
#[derive(Debug, Clone)]
pub struct NewKey {
    /// Whose key.
    pub parent: KeyParent,
    /// What it may do; must fit the parent.
    pub role: KeyRole,
    /// For people.
    pub display_name: String,
    /// When it ends by itself.
    pub expire_time: Option<i64>,
}

/// What decides, beside the stored keys, who is let in.
#[derive(Debug, Clone)]
pub struct AccessPolicy {
    /// The service key of the configuration, a whole credential as clients send it; acts as an admin key.
    pub service_key: Option<String>,
    /// Whether the server is bound to loopback addresses only.
    pub loopback_only: bool,
}

/// Bounds on tenants and keys.
#[derive(Debug, Clone, Copy)]
pub struct TenantLimits {
    /// Tenants on this server.
    pub max_tenants: usize,
    /// Keys of one tenant, and of the server, that are not revoked.
    pub max_keys: usize,
    /// Bytes of a display name.
    pub max_display_name_bytes: usize,
    /// Characters of a tenant's id.
    pub max_id_length: usize,
}

/// Who may enter without a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Door {
    /// No key exists.
    Open = 0,
    /// Keys exist, none of them an admin's.
    Bootstrap = 1,
    /// Nobody.
    Closed = 2,
}

struct Believed {
    principal: Principal,
    key: ApiKeyId,
    until: i64,
}

/// Tenants and keys. Cheap to clone.
#[derive(Clone)]
pub struct TenantStore {
    inner: Arc<Inner>,
}

struct Inner {
    database: Database,
    limits: TenantLimits,
    policy: RwLock<Policy>,
    door: AtomicU8,
    door_checked: AtomicI64,
    /// By SHA-256 of the whole credential.
    believed: DashMap<[u8; 32], Believed>,
}

struct Policy {
    service_key: Option<[u8; 32]>,
    loopback_only: bool,
}

impl TenantStore {
    /// A store on an open database.
    pub async fn open(
        database: Database,
        limits: TenantLimits,
        policy: &AccessPolicy,
    ) -> Result<Self, TenantError> {
        let door = database.read(read_door).await?;
        let service_key = policy
            .service_key
            .as_ref()
            .map(|key| Sha256::digest(key).into());
        Ok(Self {
            inner: Arc::new(Inner {
                database,
                limits,
                policy: RwLock::new(Policy {
                    service_key,
                    loopback_only: policy.loopback_only,
                }),
                door: AtomicU8::new(door as u8),
                door_checked: AtomicI64::new(now_ms()),
                believed: DashMap::new(),
            }),
        })
    }

    /// Whether any key is stored, of a tenant or of the server; a key in the configuration does not count.
    pub fn has_keys(&self) -> bool {
        self.inner.door.load(Ordering::SeqCst) != Door::Open as u8
    }

    /// Whether a caller without a key is let in at all, for the start-up log.
    pub fn is_open(&self) -> bool {
        self.anonymous_door(self.inner.door.load(Ordering::SeqCst)) != Door::Closed
    }

    /// Who shows `credential` (the text after `Bearer `)?
    pub async fn authenticate(&self, credential: Option<&str>) -> Result<Principal, TenantError> {
        match credential {
            None => self.anonymous().await,
            Some(credential) => self.check(credential).await,
        }
    }

    async fn anonymous(&self) -> Result<Principal, TenantError> {
        // Another process may have made the first key (`espalierd keys create`), so the door is looked at again.
        let now = now_ms();
        if now - self.inner.door_checked.load(Ordering::SeqCst) > 1_000 {
            self.look_at_door().await?;
        }
        match self.anonymous_door(self.inner.door.load(Ordering::SeqCst)) {
            Door::Open => Ok(Principal::LocalAnonymous),
            Door::Bootstrap => Ok(Principal::LocalBootstrap),
            Door::Closed => Err(AccessError::CredentialsMissing.into()),
        }
    }

    fn anonymous_door(&self, stored: u8) -> Door {
        let policy = self
            .inner
            .policy
            .read()
            .unwrap_or_else(PoisonError::into_inner);
        if policy.service_key.is_some() || !policy.loopback_only {
            return Door::Closed;
        }
        match stored {
            0 => Door::Open,
            1 => Door::Bootstrap,
            _ => Door::Closed,
        }
    }

    async fn look_at_door(&self) -> Result<(), TenantError> {
        let door = self.inner.database.read(read_door).await?;
        self.inner.door.store(door as u8, Ordering::SeqCst);
        self.inner.door_checked.store(now_ms(), Ordering::SeqCst);
        Ok(())
    }

    async fn check(&self, credential: &str) -> Result<Principal, TenantError> {
        let hash: [u8; 32] = Sha256::digest(credential).into();
        {
            let policy = self
                .inner
                .policy
                .read()
                .unwrap_or_else(PoisonError::into_inner);
            if let Some(expected) = &policy.service_key
                && bool::from(expected.ct_eq(&hash))
            {
                return Ok(Principal::Admin { key: None });
            }
        }
        let now = now_ms();
        if let Some(believed) = self.inner.believed.get(&hash)
            && believed.until > now
        {
            return Ok(believed.principal.clone());
        }
        let (id, secret) = split_credential(credential).ok_or(AccessError::CredentialsInvalid)?;
        let secret: [u8; 32] = Sha256::digest(secret).into();
        let found: Option<StoredKey> = self
            .inner
            .database
            .read(move |tx| read_key(tx, &id))
            .await?;
        // An unknown id is compared too, so that time does not tell it from a wrong secret.
        let stored = found.as_ref().map_or([0; 32], |f| f.secret);
        let same = bool::from(stored.ct_eq(&secret));
        let Some(StoredKey { key, .. }) = found.filter(|f| same && f.key.is_valid_at(now)) else {
            return Err(AccessError::CredentialsInvalid.into());
        };
        let until = key.expire_time.unwrap_or(i64::MAX).min(now + BELIEVE_MS);
        let principal = principal_of(&key);
        if self.inner.believed.len() >= REMEMBERED_KEYS {
            self.inner.believed.clear();
        }
        let believed = Believed {
            principal: principal.clone(),
            key: key.name.key,
            until,
        };
        self.inner.believed.insert(hash, believed);
        Ok(principal)
    }

    /// Registers a tenant.
    pub async fn create_tenant(
        &self,
        id: TenantId,
        display_name: String,
        request: Option<RequestKey>,
    ) -> Result<Tenant, TenantError> {
        let limits = self.inner.limits;
        limit(
            "tenant_id characters",
            id.as_str().len(),
            limits.max_id_length,
        )?;
        limit(
            "display_name bytes",
            display_name.len(),
            limits.max_display_name_bytes,
        )?;
        self.inner
            .database
            .write(move |tx| {
                if let Some(request) = &request {
                    match earlier_use(tx, request)? {
                        EarlierUse::None => {
                            remember_request(tx, request, &format!("tenants/{id}"))?
                        }
                        EarlierUse::Same(_) => return read_tenant(tx, &id),
                        EarlierUse::Different => {
                            return Err(TenantError::RequestIdReused {
                                request_id: request.request_id.clone(),
                            });
                        }
                    }
                }
                let taken: bool = tx.query_row(
                    "SELECT EXISTS (SELECT 1 FROM tenants WHERE id = ?1)",
                    [id.as_str()],
                    |row| row.get(0),
                )?;
                if taken {
                    return Err(TenantError::TenantExists {
                        name: TenantName(id),
                    });
                }
                let count: usize =
                    tx.query_row("SELECT count(*) FROM tenants", [], |r| r.get(0))?;
                limit("tenants", count + 1, limits.max_tenants)?;
                let create_time = now_ms();
                tx.execute(
                    "INSERT INTO tenants (id, display_name, create_time) VALUES (?1, ?2, ?3)",
                    (id.as_str(), &display_name, create_time),
                )?;
                Ok(Tenant {
                    id,
                    display_name,
                    create_time,
                })
            })
            .await
    }

    /// One tenant.
    pub async fn get_tenant(&self, id: TenantId) -> Result<Tenant, TenantError> {
        self.inner
            .database
            .read(move |tx| read_tenant(tx, &id))
            .await
    }

    /// All tenants by name; the page's key is the id.
    pub async fn list_tenants(&self, page: PageRequest) -> Result<Page<Tenant>, TenantError> {
        self.inner
            .database
            .read(move |tx| {
                let mut query = tx.prepare_cached(
                    "SELECT id, display_name, create_time FROM tenants WHERE id > ?1 ORDER BY id LIMIT ?2",
                )?;
                let rows = query
                    .query_map(
                        (page.after.as_deref().unwrap_or(""), page.size + 1),
                        tenant_row,
                    )?
                    .collect::<Result<Vec<_>, _>>()?;
                let tenants = rows.into_iter().collect::<Result<Vec<_>, _>>()?;
                Ok(Page::cut(tenants, &page, |t| t.id.to_string()))
            })
            .await
    }

    /// Removes a tenant; with `force` all that it owns too. Refused while one of its jobs has not ended.
    pub async fn delete_tenant(&self, id: TenantId, force: bool) -> Result<(), TenantError> {
        self.inner
            .database
            .write(move |tx| delete_tenant(tx, &id, force))
            .await?;
        self.inner.believed.clear();
        self.look_at_door().await
    }

    /// Makes a key; the second value is the credential, which nobody can show again.
    pub async fn create_key(&self, new: NewKey) -> Result<(ApiKey, String), TenantError> {
        let limits = self.inner.limits;
        limit(
            "display_name bytes",
            new.display_name.len(),
            limits.max_display_name_bytes,
        )?;
        check_role(&new)?;
        let id = random_id()?;
        let secret = hex::encode(rand::rng().random::<[u8; 32]>());
        let credential = format!("esp_{id}_{secret}");
        let key = ApiKey {
            name: ApiKeyName {
                parent: new.parent,
                key: id,
            },
            display_name: new.display_name,
            role: new.role,
            create_time: now_ms(),
            expire_time: new.expire_time,
            revoke_time: None,
        };
        let stored = key.clone();
        self.inner
            .database
            .write(move |tx| insert_key(tx, &stored, &secret, limits.max_keys))
            .await?;
        self.look_at_door().await?;
        Ok((key, credential))
    }

    /// Keys of a parent, by id; revoked ones included. The page's key is the id.
    pub async fn list_keys(
        &self,
        parent: KeyParent,
        page: PageRequest,
    ) -> Result<Page<ApiKey>, TenantError> {
        self.inner
            .database
            .read(move |tx| {
                if let Some(tenant) = parent.tenant() {
                    read_tenant(tx, tenant)?;
                }
                let mut query = tx.prepare_cached(
                    "SELECT id, tenant, role, tenants, secret_sha256, display_name, create_time, expire_time, revoke_time \
                     FROM api_keys WHERE tenant IS ?1 AND id > ?2 ORDER BY id LIMIT ?3",
                )?;
                let after = page.after.as_deref().unwrap_or("");
                let rows = query
                    .query_map(
                        (parent.tenant().map(TenantId::as_str), after, page.size + 1),
                        |row| Ok(key_row(row)),
                    )?
                    .collect::<Result<Vec<_>, _>>()?;
                let keys = rows.into_iter().collect::<Result<Vec<_>, _>>()?;
                let keys = keys.into_iter().map(|stored| stored.key).collect();
                Ok(Page::cut(keys, &page, |k: &ApiKey| k.name.key.to_string()))
            })
            .await
    }

    /// Ends a key at once; ending it twice keeps the first time.
    pub async fn revoke_key(&self, name: ApiKeyName) -> Result<ApiKey, TenantError> {
        let id = name.key.clone();
        let key = self
            .inner
            .database
            .write(move |tx| {
                let found = read_key(tx, &name.key)?.filter(|stored| stored.key.name == name);
                let Some(StoredKey { mut key, .. }) = found else {
                    return Err(TenantError::KeyNotFound { name });
                };
                let time = *key.revoke_time.get_or_insert_with(now_ms);
                tx.execute(
                    "UPDATE api_keys SET revoke_time = ?2 WHERE id = ?1",
                    (key.name.key.as_str(), time),
                )?;
                Ok(key)
            })
            .await?;
        self.inner.believed.retain(|_, believed| believed.key != id);
        Ok(key)
    }
}

impl ApiKey {
    fn is_valid_at(&self, now: i64) -> bool {
        self.revoke_time.is_none() && self.expire_time.is_none_or(|end| now < end)
    }
}

struct StoredKey {
    key: ApiKey,
    secret: [u8; 32],
}

fn limit(what: &'static str, value: usize, limit: usize) -> Result<(), TenantError> {
    if value > limit {
        return Err(TenantError::Limit { what, value, limit });
    }
    Ok(())
}

fn principal_of(key: &ApiKey) -> Principal {
    let id = key.name.key.clone();
    match (&key.role, &key.name.parent) {
        (KeyRole::Admin, _) => Principal::Admin { key: Some(id) },
        (KeyRole::Tenant, KeyParent::Tenant(tenant)) => Principal::Tenant {
            tenant: tenant.clone(),
            key: id,
        },
        // A tenant role without a tenant is never stored; were it read, it would reach nothing.
        (KeyRole::Tenant, KeyParent::Server) => Principal::Service {
            key: id,
            tenants: Some(Arc::default()),
        },
        (KeyRole::Service(tenants), _) => Principal::Service {
            key: id,
            tenants: (!tenants.is_empty()).then(|| Arc::new(tenants.clone())),
        },
    }
}

fn check_role(new: &NewKey) -> Result<(), TenantError> {
    let invalid = |field, reason: &str| {
        Err(TenantError::InvalidField {
            field,
            reason: reason.to_owned(),
        })
    };
    match (&new.parent, &new.role) {
        (KeyParent::Server, KeyRole::Tenant) => invalid(
            "api_key.role",
            "a TENANT key belongs under tenants/{tenant}, not under tenants/-",
        ),
        (KeyParent::Tenant(_), KeyRole::Service(_) | KeyRole::Admin) => invalid(
            "api_key.role",
            "SERVICE and ADMIN keys belong under tenants/-, not under a tenant",
        ),
        _ if new.expire_time.is_some_and(|end| end <= now_ms()) => {
            invalid("api_key.expire_time", "it lies in the past")
        }
        _ => Ok(()),
    }
}

/// 12 characters of an alphabet without look-alikes.
fn random_id() -> Result<ApiKeyId, TenantError> {
    const ALPHABET: &[u8] = b"abcdefghjkmnpqrstuvwxyz23456789";
    let mut random = rand::rng();
    let text: String = (0..12)
        .map(|_| char::from(ALPHABET[random.random_range(0..ALPHABET.len())]))
        .collect();
    ApiKeyId::parse(&text).map_err(|error| damaged("api_keys.id", error))
}

fn split_credential(credential: &str) -> Option<(ApiKeyId, &str)> {
    let (id, secret) = credential.strip_prefix("esp_")?.split_once('_')?;
    (secret.len() == 64).then_some((ApiKeyId::parse(id).ok()?, secret))
}

fn damaged(column: &'static str, reason: impl std::fmt::Display) -> TenantError {
    TenantError::Database(DatabaseError::Damaged {
        column,
        reason: reason.to_string(),
    })
}

fn read_door(tx: &Transaction<'_>) -> Result<Door, TenantError> {
    // Revoked keys count: taking the last key away must not open the server.
    let (all, admins): (i64, i64) = tx.query_row(
        "SELECT count(*), count(CASE WHEN role = 'admin' THEN 1 END) FROM api_keys",
        [],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;
    Ok(match (all, admins) {
        (0, _) => Door::Open,
        (_, 0) => Door::Bootstrap,
        _ => Door::Closed,
    })
}

fn tenant_row(row: &Row<'_>) -> rusqlite::Result<Result<Tenant, TenantError>> {
    let id: String = row.get(0)?;
    let (display_name, create_time) = (row.get(1)?, row.get(2)?);
    Ok(TenantId::parse(&id)
        .map(|id| Tenant {
            id,
            display_name,
            create_time,
        })
        .map_err(|error| damaged("tenants.id", error)))
}

/// The tenant, or [`TenantError::TenantNotFound`].
pub(crate) fn read_tenant(tx: &Transaction<'_>, id: &TenantId) -> Result<Tenant, TenantError> {
    tx.query_row(
        "SELECT id, display_name, create_time FROM tenants WHERE id = ?1",
        [id.as_str()],
        tenant_row,
    )
    .optional()?
    .ok_or_else(|| TenantError::TenantNotFound {
        name: TenantName(id.clone()),
    })?
}

fn key_row(row: &Row<'_>) -> Result<StoredKey, TenantError> {
    let id: String = row.get(0)?;
    let tenant: Option<String> = row.get(1)?;
    let role: String = row.get(2)?;
    let tenants: String = row.get(3)?;
    let secret: Vec<u8> = row.get(4)?;
    let parse = |text: &str| TenantId::parse(text).map_err(|e| damaged("api_keys.tenant", e));
    let parent = match tenant {
        None => KeyParent::Server,
        Some(tenant) => KeyParent::Tenant(parse(&tenant)?),
    };
    let role = match role.as_str() {
        "tenant" => KeyRole::Tenant,
        "admin" => KeyRole::Admin,
        "service" => KeyRole::Service(
            tenants
                .split_whitespace()
                .map(parse)
                .collect::<Result<_, _>>()?,
        ),
        other => return Err(damaged("api_keys.role", other)),
    };
    let key = ApiKeyId::parse(&id).map_err(|e| damaged("api_keys.id", e))?;
    Ok(StoredKey {
        key: ApiKey {
            name: ApiKeyName { parent, key },
            role,
            display_name: row.get(5)?,
            create_time: row.get(6)?,
            expire_time: row.get(7)?,
            revoke_time: row.get(8)?,
        },
        secret: secret
            .try_into()
            .map_err(|_| damaged("api_keys.secret_sha256", "not 32 bytes"))?,
    })
}

fn read_key(tx: &Transaction<'_>, id: &ApiKeyId) -> Result<Option<StoredKey>, TenantError> {
    tx.query_row(
        "SELECT id, tenant, role, tenants, secret_sha256, display_name, create_time, expire_time, revoke_time \
         FROM api_keys WHERE id = ?1",
        [id.as_str()],
        |row| Ok(key_row(row)),
    )
    .optional()?
    .transpose()
}

fn insert_key(
    tx: &Transaction<'_>,
    key: &ApiKey,
    secret: &str,
    max_keys: usize,
) -> Result<(), TenantError> {
    let tenant = key.name.parent.tenant();
    let mut wanted: Vec<&TenantId> = tenant.into_iter().collect();
    let (role, tenants) = match &key.role {
        KeyRole::Tenant => ("tenant", String::new()),
        KeyRole::Admin => ("admin", String::new()),
        KeyRole::Service(tenants) => {
            wanted.extend(tenants);
            let list: Vec<&str> = tenants.iter().map(TenantId::as_str).collect();
            ("service", list.join(" "))
        }
    };
    for tenant in wanted {
        read_tenant(tx, tenant)?;
    }
    let count: usize = tx.query_row(
        "SELECT count(*) FROM api_keys WHERE tenant IS ?1 AND revoke_time IS NULL",
        [tenant.map(TenantId::as_str)],
        |row| row.get(0),
    )?;
    limit("API keys of the parent", count + 1, max_keys)?;
    let hash: [u8; 32] = Sha256::digest(secret).into();
    tx.execute(
        "INSERT INTO api_keys (id, tenant, role, tenants, secret_sha256, display_name, create_time, expire_time) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        (
            key.name.key.as_str(),
            tenant.map(TenantId::as_str),
            role,
            tenants,
            hash.as_slice(),
            &key.display_name,
            key.create_time,
            key.expire_time,
        ),
    )?;
    Ok(())
}

fn delete_tenant(tx: &Transaction<'_>, id: &TenantId, force: bool) -> Result<(), TenantError> {
    read_tenant(tx, id)?;
    let in_use = |what: String| {
        Err(TenantError::TenantInUse {
            name: TenantName(id.clone()),
            what,
        })
    };
    let count = |sql: &str| -> Result<i64, TenantError> {
        Ok(tx.query_row(sql, [id.as_str()], |row| row.get(0))?)
    };
    let running = count(
        "SELECT count(*) FROM jobs WHERE tenant = ?1 AND state IN ('queued', 'preparing', 'running')",
    )?;
    if running > 0 {
        return in_use(format!("{running} training jobs that have not ended"));
    }
    let bulk = count(
        "SELECT count(*) FROM bulk_jobs WHERE tenant = ?1 AND state IN ('queued', 'running')",
    )?;
    if bulk > 0 {
        return in_use(format!("{bulk} bulk jobs that have not ended"));
    }
    let adapters = count("SELECT count(*) FROM adapters WHERE tenant = ?1")?;
    let datasets = count("SELECT count(*) FROM datasets WHERE tenant = ?1")?;
    let jobs = count(
        "SELECT (SELECT count(*) FROM jobs WHERE tenant = ?1) + (SELECT count(*) FROM bulk_jobs WHERE tenant = ?1)",
    )?;
    if !force && adapters + datasets + jobs > 0 {
        return in_use(format!(
            "{adapters} adapters, {datasets} datasets and {jobs} jobs"
        ));
    }
    for sql in [
        "DELETE FROM aliases WHERE adapter IN (SELECT id FROM adapters WHERE tenant = ?1)",
        "DELETE FROM jobs WHERE tenant = ?1",
        // Their files go at the next start, with all that no row names.
        "DELETE FROM bulk_jobs WHERE tenant = ?1",
        "DELETE FROM adapters WHERE tenant = ?1",
        "DELETE FROM datasets WHERE tenant = ?1",
        "DELETE FROM requests WHERE tenant = ?1",
        "DELETE FROM api_keys WHERE tenant = ?1",
        "DELETE FROM tenants WHERE id = ?1",
    ] {
        tx.execute(sql, [id.as_str()])?;
    }
    forget_requests_for(tx, &format!("tenants/{id}"))?;
    Ok(())
}

#[cfg(test)]
#[path = "tenants_tests.rs"]
mod tests;
