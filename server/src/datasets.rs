//! Datasets: named, immutable rows, checked in full when they are uploaded so that a job never meets a bad line.
//!
//! The bytes lie in the artifact store, what was found in them in the database. A job keeps a claim of its own on the bytes,
//! so deleting a dataset can never take them from a job. This file must not know tokens, models or how bytes arrive.

use std::collections::BTreeMap;

use espalier_adapters::train::dataset::{
    self, ColumnNames, DataLimits, DataReport, Dataset as Rows, Format, Kind,
};
use espalier_adapters::train::statistics::label_counts;
use rusqlite::{OptionalExtension, Transaction};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::artifact_store::{ArtifactStore, BlobDigest, Pin, StoreError};
use crate::database::{
    Database, DatabaseError, EarlierUse, RequestKey, earlier_use, forget_requests_for, now_ms,
    remember_request,
};
use crate::names::{DatasetId, DatasetName, TenantId, TenantName};
use crate::paging::{Page, PageRequest};

/// Why a dataset could not be kept, had or removed.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// No such tenant.
    #[error("{name} does not exist")]
    TenantNotFound {
        /// The tenant.
        name: TenantName,
    },
    /// No such dataset.
    #[error("{name} does not exist")]
    NotFound {
        /// The dataset.
        name: DatasetName,
    },
    /// The id is taken; datasets do not change.
    #[error("{name} exists already")]
    Exists {
        /// The dataset.
        name: DatasetName,
    },
    /// A job that has not ended needs it.
    #[error("{name} is in use by {by}")]
    InUse {
        /// The dataset.
        name: DatasetName,
        /// The job.
        by: String,
    },
    /// Lines that are no good rows: all of them.
    #[error("{0}")]
    Data(Box<DataReport>),
    /// A count is over its limit.
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
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The database failed.
    #[error(transparent)]
    Database(#[from] DatabaseError),
}

impl From<rusqlite::Error> for DatasetError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Database(error.into())
    }
}

/// How a dataset's bytes are read, and what was found in them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataShape {
    /// How rows are spelled.
    pub format: Format,
    /// The columns they were read with.
    pub columns: ColumnNames,
    /// What the rows are.
    pub kind: Kind,
    /// How many rows.
    pub rows: u64,
    /// Rows by label; empty without labels.
    pub label_counts: BTreeMap<String, u64>,
    /// Doubtful lines that were taken nevertheless.
    pub warnings: DataReport,
}

/// A dataset.
#[derive(Debug, Clone)]
pub struct Dataset {
    /// Its name.
    pub name: DatasetName,
    /// SHA-256 of its bytes.
    pub digest: BlobDigest,
    /// Its bytes.
    pub size: u64,
    /// What is in it.
    pub shape: DataShape,
    /// Unix milliseconds.
    pub create_time: i64,
}

/// Bounds on datasets.
#[derive(Debug, Clone, Copy)]
pub struct DatasetLimits {
    /// Datasets of one tenant.
    pub max_datasets: usize,
    /// Characters of a dataset's id.
    pub max_id_length: usize,
    /// Bounds on bytes, rows and fields.
    pub data: DataLimits,
}

/// Datasets of all tenants. Cheap to clone.
#[derive(Clone)]
pub struct DatasetStore {
    database: Database,
    store: ArtifactStore,
    limits: DatasetLimits,
}

/// Reads rows and sums up what they are.
///
/// # Errors
/// The report of every bad line.
pub fn inspect(
    bytes: &[u8],
    format: Format,
    columns: &ColumnNames,
    limits: &DataLimits,
) -> Result<(Rows, DataShape), DataReport> {
    let rows = dataset::parse(bytes, format, columns, limits)?;
    let shape = DataShape {
        format,
        columns: columns.clone(),
        kind: rows.kind,
        rows: rows.rows.len() as u64,
        label_counts: label_counts(rows.rows.iter()),
        warnings: rows.report.clone(),
    };
    Ok((rows, shape))
}

impl DatasetStore {
    /// Datasets on an open database and store.
    pub fn new(database: Database, store: ArtifactStore, limits: DatasetLimits) -> Self {
        Self {
            database,
            store,
            limits,
        }
    }

    /// The bounds that were configured.
    pub fn limits(&self) -> &DatasetLimits {
        &self.limits
    }

    /// Checks bytes as rows beside the runtime, storing nothing.
    pub async fn check(
        &self,
        bytes: Vec<u8>,
        format: Format,
        columns: ColumnNames,
    ) -> Result<(Vec<u8>, DataShape), DatasetError> {
        let limits = self.limits.data;
        let checked = self
            .store
            .run(move |_| {
                let found = inspect(&bytes, format, &columns, &limits);
                Ok(found.map(|(_, shape)| (bytes, shape)))
            })
            .await?;
        checked.map_err(|report| DatasetError::Data(Box::new(report)))
    }

    /// Keeps checked bytes under a name. They and the name are durable when this returns.
    pub async fn create(
        &self,
        name: DatasetName,
        bytes: Vec<u8>,
        shape: DataShape,
        request: Option<RequestKey>,
    ) -> Result<Dataset, DatasetError> {
        let size = bytes.len() as u64;
        let pin = self.store.run(move |store| store.put(&bytes)).await?;
        let limits = self.limits;
        let dataset = Dataset {
            name,
            digest: pin.digest(),
            size,
            shape,
            create_time: now_ms(),
        };
        self.database
            .write(move |tx| insert(tx, dataset, request.as_ref(), &limits, &pin))
            .await
    }

    /// One dataset.
    pub async fn get(&self, name: DatasetName) -> Result<Dataset, DatasetError> {
        self.database.read(move |tx| read(tx, &name)).await
    }

    /// A tenant's datasets by name; the page's key is the id.
    pub async fn list(
        &self,
        tenant: TenantId,
        page: PageRequest,
    ) -> Result<Page<Dataset>, DatasetError> {
        self.database
            .read(move |tx| {
                require_tenant(tx, &tenant)?;
                let mut query = tx.prepare_cached(
                    "SELECT dataset FROM datasets WHERE tenant = ?1 AND dataset > ?2 ORDER BY dataset LIMIT ?3",
                )?;
                let after = page.after.as_deref().unwrap_or("");
                let ids = query
                    .query_map((tenant.as_str(), after, page.size + 1), |row| row.get(0))?
                    .collect::<Result<Vec<String>, _>>()?;
                let datasets = ids
                    .iter()
                    .map(|id| {
                        let id = DatasetId::parse(id).map_err(|e| damaged("datasets.dataset", e))?;
                        read(tx, &DatasetName::new(tenant.clone(), id))
                    })
                    .collect::<Result<Vec<_>, _>>()?;
                Ok(Page::cut(datasets, &page, |d| d.name.dataset.to_string()))
            })
            .await
    }

    /// Removes a dataset and returns its digest, whose bytes the caller releases. Refused while a job that has not ended
    /// was created from it.
    pub async fn delete(&self, name: DatasetName) -> Result<BlobDigest, DatasetError> {
        self.database
            .write(move |tx| {
                let dataset = read(tx, &name)?;
                let job: Option<String> = tx
                    .query_row(
                        "SELECT job FROM unfinished_jobs WHERE tenant = ?1 \
                         AND (train_digest = ?2 OR valid_digest = ?2) LIMIT 1",
                        (name.tenant.as_str(), dataset.digest.0.as_slice()),
                        |row| row.get(0),
                    )
                    .optional()?;
                if let Some(job) = job {
                    let by = format!("tenants/{}/trainingJobs/{job}", name.tenant);
                    return Err(DatasetError::InUse { name, by });
                }
                tx.execute(
                    "DELETE FROM datasets WHERE tenant = ?1 AND dataset = ?2",
                    (name.tenant.as_str(), name.dataset.as_str()),
                )?;
                forget_requests_for(tx, &name.to_string())?;
                Ok(dataset.digest)
            })
            .await
    }
}

fn damaged(column: &'static str, reason: impl std::fmt::Display) -> DatasetError {
    DatasetError::Database(DatabaseError::Damaged {
        column,
        reason: reason.to_string(),
    })
}

fn limit(what: &'static str, value: usize, limit: usize) -> Result<(), DatasetError> {
    if value > limit {
        return Err(DatasetError::Limit { what, value, limit });
    }
    Ok(())
}

fn require_tenant(tx: &Transaction<'_>, tenant: &TenantId) -> Result<(), DatasetError> {
    let exists: bool = tx
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM tenants WHERE id = ?1)")?
        .query_row([tenant.as_str()], |row| row.get(0))?;
    if exists {
        return Ok(());
    }
    Err(DatasetError::TenantNotFound {
        name: TenantName(tenant.clone()),
    })
}

/// One dataset, inside the caller's transaction.
pub(crate) fn read(tx: &Transaction<'_>, name: &DatasetName) -> Result<Dataset, DatasetError> {
    let mut query = tx.prepare_cached(
        "SELECT digest, size, shape, create_time FROM datasets WHERE tenant = ?1 AND dataset = ?2",
    )?;
    let found = query
        .query_row((name.tenant.as_str(), name.dataset.as_str()), |row| {
            Ok((
                row.get::<_, [u8; 32]>(0)?,
                row.get(1)?,
                row.get::<_, String>(2)?,
                row.get(3)?,
            ))
        })
        .optional()?;
    let Some((digest, size, shape, create_time)) = found else {
        require_tenant(tx, &name.tenant)?;
        return Err(DatasetError::NotFound { name: name.clone() });
    };
    Ok(Dataset {
        name: name.clone(),
        digest: BlobDigest(digest),
        size,
        shape: serde_json::from_str(&shape).map_err(|e| damaged("datasets.shape", e))?,
        create_time,
    })
}

/// `_pin` is held until the row is there.
fn insert(
    tx: &Transaction<'_>,
    dataset: Dataset,
    request: Option<&RequestKey>,
    limits: &DatasetLimits,
    _pin: &Pin,
) -> Result<Dataset, DatasetError> {
    let (tenant, id) = (&dataset.name.tenant, &dataset.name.dataset);
    require_tenant(tx, tenant)?;
    if let Some(request) = request {
        match earlier_use(tx, request)? {
            EarlierUse::None => remember_request(tx, request, &dataset.name.to_string())?,
            EarlierUse::Same(_) => return read(tx, &dataset.name),
            EarlierUse::Different => {
                return Err(DatasetError::RequestIdReused {
                    request_id: request.request_id.clone(),
                });
            }
        }
    }
    limit(
        "dataset_id characters",
        id.as_str().len(),
        limits.max_id_length,
    )?;
    if read(tx, &dataset.name).is_ok() {
        return Err(DatasetError::Exists { name: dataset.name });
    }
    let count: usize = tx.query_row(
        "SELECT count(*) FROM datasets WHERE tenant = ?1",
        [tenant.as_str()],
        |row| row.get(0),
    )?;
    limit("datasets of the tenant", count + 1, limits.max_datasets)?;
    let shape = serde_json::to_string(&dataset.shape).map_err(|e| damaged("datasets.shape", e))?;
    tx.execute(
        "INSERT INTO datasets (tenant, dataset, uid, digest, size, shape, create_time) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)",
        (
            tenant.as_str(),
            id.as_str(),
            Uuid::new_v4().to_string(),
            dataset.digest.0.as_slice(),
            dataset.size,
            shape,
            dataset.create_time,
        ),
    )?;
    Ok(dataset)
}
