//! The rows of bulk jobs: every SQL statement on them, and nothing that decides.

use std::collections::HashSet;

use rusqlite::{OptionalExtension, Row, Transaction};

use super::{BulkError, BulkLimits, Job, JobKey, Operation, Progress, State};
use crate::database::{
    DatabaseError, EarlierUse, RequestKey, earlier_use, forget_requests_for, now_ms,
    remember_request,
};
use crate::names::{BulkJobId, BulkJobName, TenantId, TenantName};
use crate::paging::PageRequest;

const COLUMNS: &str = "id, tenant, job, uid, operation, version, state, error, description, input_bytes, input_sha256, \
     items, done, failed, input_tokens, output_tokens, output_bytes, create_time, start_time, end_time, expire_time";

fn damaged(column: &'static str, reason: impl std::fmt::Display) -> BulkError {
    BulkError::Database(DatabaseError::Damaged {
        column,
        reason: reason.to_string(),
    })
}

/// A row of [`COLUMNS`].
fn job(row: &Row<'_>) -> Result<(JobKey, Job), BulkError> {
    let text = |at: usize| row.get::<_, String>(at);
    let tenant = TenantId::parse(&text(1)?).map_err(|e| damaged("bulk_jobs.tenant", e))?;
    let id = BulkJobId::parse(&text(2)?).map_err(|e| damaged("bulk_jobs.job", e))?;
    let operation = text(4)?;
    let state = text(6)?;
    let job = Job {
        name: BulkJobName::new(tenant, id),
        uid: text(3)?,
        operation: Operation::parse(&operation)
            .ok_or_else(|| damaged("bulk_jobs.operation", &operation))?,
        version: row.get(5)?,
        state: State::parse(&state).ok_or_else(|| damaged("bulk_jobs.state", &state))?,
        error: row.get(7)?,
        description: text(8)?,
        input_bytes: row.get(9)?,
        input_sha256: text(10)?,
        progress: Progress {
            items: row.get(11)?,
            done: row.get(12)?,
            failed: row.get(13)?,
            input_tokens: row.get(14)?,
            output_tokens: row.get(15)?,
            output_bytes: row.get(16)?,
        },
        create_time: row.get(17)?,
        start_time: row.get(18)?,
        end_time: row.get(19)?,
        expire_time: row.get(20)?,
    };
    Ok((JobKey(row.get(0)?), job))
}

pub(super) fn require_tenant(tx: &Transaction<'_>, tenant: &TenantId) -> Result<(), BulkError> {
    let exists: bool = tx.query_row(
        "SELECT EXISTS (SELECT 1 FROM tenants WHERE id = ?1)",
        [tenant.as_str()],
        |row| row.get(0),
    )?;
    if exists {
        return Ok(());
    }
    Err(BulkError::TenantNotFound {
        name: TenantName(tenant.clone()),
    })
}

fn find(tx: &Transaction<'_>, name: &BulkJobName) -> Result<Option<(JobKey, Job)>, BulkError> {
    let sql = format!("SELECT {COLUMNS} FROM bulk_jobs WHERE tenant = ?1 AND job = ?2");
    let mut query = tx.prepare_cached(&sql)?;
    let mut rows = query.query((name.tenant.as_str(), name.job.as_str()))?;
    rows.next()?.map(job).transpose()
}

pub(super) fn by_name(
    tx: &Transaction<'_>,
    name: &BulkJobName,
) -> Result<(JobKey, Job), BulkError> {
    if let Some(found) = find(tx, name)? {
        return Ok(found);
    }
    require_tenant(tx, &name.tenant)?;
    Err(BulkError::NotFound { name: name.clone() })
}

/// Newest first; the page's key is the row id.
pub(super) fn list(
    tx: &Transaction<'_>,
    tenant: &TenantId,
    page: &PageRequest,
) -> Result<Vec<(JobKey, Job)>, BulkError> {
    let before = page
        .after
        .as_deref()
        .and_then(|after| after.parse().ok())
        .unwrap_or(i64::MAX);
    let sql = format!(
        "SELECT {COLUMNS} FROM bulk_jobs WHERE tenant = ?1 AND id < ?2 ORDER BY id DESC LIMIT ?3"
    );
    let mut query = tx.prepare_cached(&sql)?;
    let mut rows = query.query((tenant.as_str(), before, page.size + 1))?;
    let mut jobs = Vec::new();
    while let Some(row) = rows.next()? {
        jobs.push(job(row)?);
    }
    Ok(jobs)
}

/// Stores a queued job, or finds the one that this request made before.
pub(super) fn insert(
    tx: &Transaction<'_>,
    new: &Job,
    request: Option<&RequestKey>,
    limits: &BulkLimits,
) -> Result<Job, BulkError> {
    let (tenant, id) = (&new.name.tenant, &new.name.job);
    require_tenant(tx, tenant)?;
    if let Some(request) = request {
        match earlier_use(tx, request)? {
            EarlierUse::None => remember_request(tx, request, &new.name.to_string())?,
            EarlierUse::Same(name) => {
                let name =
                    BulkJobName::parse(&name).map_err(|e| damaged("requests.resource", e))?;
                return Ok(by_name(tx, &name)?.1);
            }
            EarlierUse::Different => {
                return Err(BulkError::RequestIdReused {
                    request_id: request.request_id.clone(),
                });
            }
        }
    }
    let bound = |what, value, limit| {
        if value > limit {
            return Err(BulkError::Limit { what, value, limit });
        }
        Ok(())
    };
    bound(
        "bulk_job_id characters",
        id.as_str().len(),
        limits.max_id_length,
    )?;
    if find(tx, &new.name)?.is_some() {
        return Err(BulkError::Exists {
            name: new.name.clone(),
        });
    }
    let count: usize = tx.query_row(
        "SELECT count(*) FROM bulk_jobs WHERE tenant = ?1",
        [tenant.as_str()],
        |row| row.get(0),
    )?;
    bound("bulk jobs of the tenant", count + 1, limits.max_jobs)?;
    tx.execute(
        "INSERT INTO bulk_jobs (tenant, job, uid, operation, version, state, description, input_bytes, input_sha256, items, \
         done, failed, input_tokens, output_tokens, output_bytes, create_time) \
         VALUES (?1, ?2, ?3, ?4, ?5, 'queued', ?6, ?7, ?8, ?9, 0, 0, 0, 0, 0, ?10)",
        (
            tenant.as_str(),
            id.as_str(),
            &new.uid,
            new.operation.as_str(),
            &new.version,
            &new.description,
            new.input_bytes,
            &new.input_sha256,
            new.progress.items,
            new.create_time,
        ),
    )?;
    Ok(new.clone())
}

/// A job that ran when the server went down waits for its turn again.
pub(super) fn queue_again(tx: &Transaction<'_>) -> Result<(), BulkError> {
    tx.execute(
        "UPDATE bulk_jobs SET state = 'queued' WHERE state = 'running'",
        [],
    )?;
    Ok(())
}

pub(super) fn uids(tx: &Transaction<'_>) -> Result<HashSet<String>, BulkError> {
    let mut query = tx.prepare("SELECT uid FROM bulk_jobs")?;
    let uids = query.query_map([], |row| row.get(0))?;
    Ok(uids.collect::<Result<_, _>>()?)
}

/// The oldest queued job of the tenant with the fewest running ones, running from now on.
pub(super) fn take_next(tx: &Transaction<'_>) -> Result<Option<(JobKey, Job)>, BulkError> {
    let key: Option<i64> = tx
        .query_row(
            "SELECT id FROM bulk_jobs AS waiting WHERE state = 'queued' ORDER BY \
             (SELECT count(*) FROM bulk_jobs AS other WHERE other.tenant = waiting.tenant AND other.state = 'running'), id \
             LIMIT 1",
            [],
            |row| row.get(0),
        )
        .optional()?;
    let Some(key) = key else {
        return Ok(None);
    };
    tx.execute(
        "UPDATE bulk_jobs SET state = 'running', start_time = coalesce(start_time, ?2) WHERE id = ?1",
        (key, now_ms()),
    )?;
    let sql = format!("SELECT {COLUMNS} FROM bulk_jobs WHERE id = ?1");
    let mut query = tx.prepare(&sql)?;
    let mut rows = query.query([key])?;
    rows.next()?.map(job).transpose()
}

/// False when the job does not run any more.
pub(super) fn commit(
    tx: &Transaction<'_>,
    key: JobKey,
    progress: &Progress,
) -> Result<bool, BulkError> {
    let changed = tx.execute(
        "UPDATE bulk_jobs SET done = ?2, failed = ?3, input_tokens = ?4, output_tokens = ?5, output_bytes = ?6 \
         WHERE id = ?1 AND state = 'running'",
        (
            key.0,
            progress.done,
            progress.failed,
            progress.input_tokens,
            progress.output_tokens,
            progress.output_bytes,
        ),
    )?;
    Ok(changed > 0)
}

/// Ends a job that has not ended.
pub(super) fn end(
    tx: &Transaction<'_>,
    key: JobKey,
    state: State,
    error: Option<String>,
    expires: i64,
) -> Result<(), BulkError> {
    tx.execute(
        "UPDATE bulk_jobs SET state = ?2, error = ?3, end_time = ?4, expire_time = ?5 \
         WHERE id = ?1 AND state IN ('queued', 'running')",
        (key.0, state.as_str(), error, now_ms(), expires),
    )?;
    Ok(())
}

pub(super) fn delete(tx: &Transaction<'_>, key: JobKey, job: &Job) -> Result<(), BulkError> {
    tx.execute("DELETE FROM bulk_jobs WHERE id = ?1", [key.0])?;
    forget_requests_for(tx, &job.name.to_string())?;
    Ok(())
}

/// Removes jobs whose time is over; gives the names of their directories.
pub(super) fn delete_expired(tx: &Transaction<'_>, now: i64) -> Result<Vec<String>, BulkError> {
    let sql = format!("SELECT {COLUMNS} FROM bulk_jobs WHERE expire_time < ?1");
    let mut expired = Vec::new();
    {
        let mut query = tx.prepare(&sql)?;
        let mut rows = query.query([now])?;
        while let Some(row) = rows.next()? {
            expired.push(job(row)?);
        }
    }
    for (key, job) in &expired {
        delete(tx, *key, job)?;
    }
    Ok(expired.into_iter().map(|(_, job)| job.uid).collect())
}
