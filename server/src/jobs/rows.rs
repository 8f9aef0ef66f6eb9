//! The rows of jobs, their events and checkpoints: every SQL statement on them, and nothing that decides.

use rusqlite::{OptionalExtension, Row, Transaction};
use serde::Serialize;
use serde::de::DeserializeOwned;
use uuid::Uuid;

use super::classification::ClassificationResult;
use super::events::{DataStats, Event, Happening, Job, JobFailure, JobState, Outcome, Progress};
use super::spec::JobSpec;
use super::{JobError, JobKey};
use crate::artifact_store::BlobDigest;
use crate::database::{DatabaseError, now_ms};
use crate::names::{AdapterName, JobId, JobName, TenantId, TenantName};
use crate::paging::PageRequest;

pub(super) fn damaged(column: &'static str, reason: impl std::fmt::Display) -> JobError {
    JobError::Database(DatabaseError::Damaged {
        column,
        reason: reason.to_string(),
    })
}

fn from_json<T: DeserializeOwned>(column: &'static str, text: &str) -> Result<T, JobError> {
    serde_json::from_str(text).map_err(|error| damaged(column, error))
}

fn to_json(column: &'static str, value: &impl Serialize) -> Result<String, JobError> {
    serde_json::to_string(value).map_err(|error| damaged(column, error))
}

/// A job about to be stored.
pub(super) struct NewJob {
    pub(super) name: JobName,
    pub(super) adapter: AdapterName,
    pub(super) spec: JobSpec,
    pub(super) stats: DataStats,
    pub(super) progress: Progress,
    pub(super) train: BlobDigest,
    pub(super) valid: Option<BlobDigest>,
}

/// Stores a queued job with its first event.
pub(super) fn insert(tx: &Transaction<'_>, new: &NewJob) -> Result<JobKey, JobError> {
    let now = now_ms();
    tx.execute(
        "INSERT INTO jobs (tenant, job, uid, state, spec, stats, adapter, from_version, train_digest, valid_digest, \
         progress, next_seq, attempt, cancel_asked, create_time, update_time) VALUES (?1, ?2, ?3, 'queued', ?4, ?5, \
         (SELECT id FROM adapters WHERE tenant = ?1 AND adapter = ?6), ?7, ?8, ?9, ?10, 1, 0, 0, ?11, ?11)",
        (
            new.name.tenant.as_str(),
            new.name.job.as_str(),
            Uuid::new_v4().to_string(),
            to_json("jobs.spec", &new.spec)?,
            to_json("jobs.stats", &new.stats)?,
            new.adapter.adapter.as_str(),
            &new.spec.from_version,
            new.train.0.as_slice(),
            new.valid.map(|digest| digest.0.to_vec()),
            to_json("jobs.progress", &new.progress)?,
            now,
        ),
    )?;
    let key = JobKey(tx.last_insert_rowid());
    let created = Happening::State {
        from: None,
        to: JobState::Queued,
        reason: "created".to_owned(),
        error: None,
    };
    append(tx, key, JobState::Queued, &new.progress, &[created])?;
    Ok(key)
}

/// Appends events under the job's next numbers, with the state and progress that hold after them.
pub(super) fn append(
    tx: &Transaction<'_>,
    key: JobKey,
    state: JobState,
    progress: &Progress,
    happenings: &[Happening],
) -> Result<(), JobError> {
    let now = now_ms();
    let first: u64 = tx
        .prepare_cached(
            "UPDATE jobs SET next_seq = next_seq + ?2, progress = ?3, update_time = ?4 WHERE id = ?1 \
             RETURNING next_seq - ?2",
        )?
        .query_row(
            (key.0, happenings.len(), to_json("jobs.progress", progress)?, now),
            |row| row.get(0),
        )?;
    let mut insert =
        tx.prepare_cached("INSERT INTO job_events (job, seq, time, body) VALUES (?1, ?2, ?3, ?4)")?;
    for (sequence, happening) in (first..).zip(happenings) {
        let body = to_json("job_events.body", &(state, progress, happening))?;
        insert.execute((key.0, sequence, now, body))?;
    }
    Ok(())
}

/// Moves a job to another state and appends the event that says so.
pub(super) fn change_state(
    tx: &Transaction<'_>,
    key: JobKey,
    to: JobState,
    reason: &str,
    error: Option<JobFailure>,
) -> Result<(), JobError> {
    let (from, progress): (String, String) = tx.query_row(
        "SELECT state, progress FROM jobs WHERE id = ?1",
        [key.0],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?;
    let from = JobState::parse(&from).ok_or_else(|| damaged("jobs.state", &from))?;
    if from.is_final() {
        return Ok(());
    }
    let stored = error
        .as_ref()
        .map(|e| to_json("jobs.error", e))
        .transpose()?;
    let now = now_ms();
    tx.execute(
        "UPDATE jobs SET state = ?2, error = ?3, update_time = ?4, \
         start_time = CASE WHEN ?2 = 'running' THEN coalesce(start_time, ?4) ELSE start_time END, \
         end_time = CASE WHEN ?5 THEN ?4 ELSE NULL END WHERE id = ?1",
        (key.0, to.as_str(), stored, now, to.is_final()),
    )?;
    let progress: Progress = from_json("jobs.progress", &progress)?;
    let happening = Happening::State {
        from: Some(from),
        to,
        reason: reason.to_owned(),
        error,
    };
    append(tx, key, to, &progress, &[happening])?;
    if to.is_final() {
        drop_checkpoint(tx, key)?;
    }
    Ok(())
}

/// Names the version that a job made, and notes what it cost and what its head is worth.
pub(super) fn set_result(
    tx: &Transaction<'_>,
    key: JobKey,
    version: &str,
    outcome: &Outcome,
    result: Option<&ClassificationResult>,
) -> Result<(), JobError> {
    let result = result.map(|r| to_json("jobs.result", r)).transpose()?;
    tx.execute(
        "UPDATE jobs SET version = ?2, outcome = ?3, result = ?4 WHERE id = ?1",
        (key.0, version, to_json("jobs.outcome", outcome)?, result),
    )?;
    Ok(())
}

const COLUMNS: &str = "id, tenant, job, state, error, spec, stats, progress, version, next_seq, attempt, cancel_asked, \
     create_time, start_time, end_time, pause_asked, outcome, result";

fn job_row(row: &Row<'_>) -> Result<(JobKey, Job), JobError> {
    let text = |index: usize| row.get::<_, String>(index);
    let tenant = TenantId::parse(&text(1)?).map_err(|e| damaged("jobs.tenant", e))?;
    let id = JobId::parse(&text(2)?).map_err(|e| damaged("jobs.job", e))?;
    let state = text(3)?;
    let error: Option<String> = row.get(4)?;
    let result: Option<String> = row.get(17)?;
    let next: u64 = row.get(9)?;
    let outcome: Option<String> = row.get(16)?;
    let job = Job {
        name: JobName::new(tenant, id),
        state: JobState::parse(&state).ok_or_else(|| damaged("jobs.state", state))?,
        error: error.map(|e| from_json("jobs.error", &e)).transpose()?,
        spec: from_json("jobs.spec", &text(5)?)?,
        stats: from_json("jobs.stats", &text(6)?)?,
        progress: from_json("jobs.progress", &text(7)?)?,
        version: row.get(8)?,
        result: result.map(|r| from_json("jobs.result", &r)).transpose()?,
        last_sequence: next - 1,
        attempt: row.get(10)?,
        cancel_asked: row.get(11)?,
        create_time: row.get(12)?,
        start_time: row.get(13)?,
        end_time: row.get(14)?,
        pause_asked: row.get(15)?,
        outcome: outcome
            .map(|outcome| from_json("jobs.outcome", &outcome))
            .transpose()?,
    };
    Ok((JobKey(row.get(0)?), job))
}

/// The tenant exists, or an error says that it does not.
pub(super) fn tenant_exists(tx: &Transaction<'_>, tenant: &TenantId) -> Result<(), JobError> {
    let exists: bool = tx
        .prepare_cached("SELECT EXISTS (SELECT 1 FROM tenants WHERE id = ?1)")?
        .query_row([tenant.as_str()], |row| row.get(0))?;
    if exists {
        return Ok(());
    }
    Err(JobError::TenantNotFound {
        name: TenantName(tenant.clone()),
    })
}

/// One job by name.
pub(super) fn by_name(tx: &Transaction<'_>, name: &JobName) -> Result<(JobKey, Job), JobError> {
    let sql = format!("SELECT {COLUMNS} FROM jobs WHERE tenant = ?1 AND job = ?2");
    let found = tx
        .prepare_cached(&sql)?
        .query_row((name.tenant.as_str(), name.job.as_str()), |row| {
            Ok(job_row(row))
        })
        .optional()?;
    match found {
        Some(job) => job,
        None => {
            tenant_exists(tx, &name.tenant)?;
            Err(JobError::NotFound { name: name.clone() })
        }
    }
}

/// One job by key.
pub(super) fn by_key(tx: &Transaction<'_>, key: JobKey) -> Result<Job, JobError> {
    let sql = format!("SELECT {COLUMNS} FROM jobs WHERE id = ?1");
    let (_, job) = tx
        .prepare_cached(&sql)?
        .query_row([key.0], |row| Ok(job_row(row)))??;
    Ok(job)
}

/// One page of a tenant's jobs, newest first, and the first of the next; with each its key.
pub(super) fn list(
    tx: &Transaction<'_>,
    tenant: &TenantId,
    page: &PageRequest,
) -> Result<Vec<(JobKey, Job)>, JobError> {
    let before = match &page.after {
        None => i64::MAX,
        Some(after) => after.parse().map_err(|e| damaged("page_token", e))?,
    };
    let sql = format!(
        "SELECT {COLUMNS} FROM jobs WHERE tenant = ?1 AND id < ?2 ORDER BY id DESC LIMIT ?3"
    );
    let mut query = tx.prepare_cached(&sql)?;
    let rows = query
        .query_map((tenant.as_str(), before, page.size + 1), |row| {
            Ok(job_row(row))
        })?
        .collect::<Result<Vec<_>, _>>()?;
    rows.into_iter().collect()
}

/// Jobs of a tenant that have not ended.
pub(super) fn unfinished_of(tx: &Transaction<'_>, tenant: &TenantId) -> Result<usize, JobError> {
    let sql = "SELECT count(*) FROM unfinished_jobs WHERE tenant = ?1";
    Ok(tx.query_row(sql, [tenant.as_str()], |row| row.get(0))?)
}

/// All jobs that have not ended, oldest first.
pub(super) fn unfinished(tx: &Transaction<'_>) -> Result<Vec<(JobKey, Job)>, JobError> {
    let sql = format!("SELECT {COLUMNS} FROM unfinished_jobs ORDER BY id");
    let mut query = tx.prepare(&sql)?;
    let rows = query
        .query_map([], |row| Ok(job_row(row)))?
        .collect::<Result<Vec<_>, _>>()?;
    rows.into_iter().collect()
}

/// Takes the next queued job: of the tenant with the fewest jobs at work, first those that had begun before a restart, then of
/// the tenant whose turn is longest ago, then the oldest. Its state becomes `preparing`.
pub(super) fn claim(tx: &Transaction<'_>) -> Result<Option<(JobKey, Job)>, JobError> {
    let key: Option<i64> = tx
        .prepare_cached(
            "SELECT q.id FROM jobs q WHERE q.state = 'queued' ORDER BY \
             (SELECT count(*) FROM jobs a WHERE a.tenant = q.tenant AND a.state IN ('preparing', 'running')), \
             q.attempt = 0, \
             (SELECT coalesce(max(s.start_time), 0) FROM jobs s WHERE s.tenant = q.tenant), q.id LIMIT 1",
        )?
        .query_row([], |row| row.get(0))
        .optional()?;
    let Some(key) = key.map(JobKey) else {
        return Ok(None);
    };
    tx.execute(
        "UPDATE jobs SET attempt = attempt + 1 WHERE id = ?1",
        [key.0],
    )?;
    change_state(tx, key, JobState::Preparing, "its turn came", None)?;
    Ok(Some((key, by_key(tx, key)?)))
}

/// Puts a job that has not ended back in the queue, or aside when it was told to pause.
pub(super) fn set_aside(tx: &Transaction<'_>, key: JobKey, reason: &str) -> Result<(), JobError> {
    let (_, pause) = asked(tx, key)?;
    if pause {
        change_state(tx, key, JobState::Paused, "paused", None)
    } else {
        change_state(tx, key, JobState::Queued, reason, None)
    }
}

/// Whether a job was told to end, and to pause.
pub(super) fn asked(tx: &Transaction<'_>, key: JobKey) -> Result<(bool, bool), JobError> {
    Ok(tx.query_row(
        "SELECT cancel_asked, pause_asked FROM jobs WHERE id = ?1",
        [key.0],
        |row| Ok((row.get(0)?, row.get(1)?)),
    )?)
}

/// Notes whether a job is to be put aside.
pub(super) fn ask_pause(tx: &Transaction<'_>, key: JobKey, pause: bool) -> Result<(), JobError> {
    tx.execute(
        "UPDATE jobs SET pause_asked = ?2 WHERE id = ?1",
        (key.0, pause),
    )?;
    Ok(())
}

/// Jobs that wait for a place.
pub(super) fn queued(tx: &Transaction<'_>) -> Result<u32, JobError> {
    let sql = "SELECT count(*) FROM jobs WHERE state = 'queued'";
    Ok(tx.query_row(sql, [], |row| row.get(0))?)
}

/// Notes that a job is to end.
pub(super) fn ask_cancel(tx: &Transaction<'_>, key: JobKey) -> Result<(), JobError> {
    tx.execute("UPDATE jobs SET cancel_asked = 1 WHERE id = ?1", [key.0])?;
    Ok(())
}

/// Digests of a job's rows: to train on, to measure on.
pub(super) fn data_of(
    tx: &Transaction<'_>,
    key: JobKey,
) -> Result<(BlobDigest, Option<BlobDigest>), JobError> {
    Ok(tx.query_row(
        "SELECT train_digest, valid_digest FROM jobs WHERE id = ?1",
        [key.0],
        |row| {
            let valid: Option<[u8; 32]> = row.get(1)?;
            Ok((BlobDigest(row.get(0)?), valid.map(BlobDigest)))
        },
    )?)
}

/// The digest of a job's newest checkpoint.
pub(super) fn checkpoint(
    tx: &Transaction<'_>,
    key: JobKey,
) -> Result<Option<BlobDigest>, JobError> {
    Ok(tx
        .query_row(
            "SELECT digest FROM checkpoints WHERE job = ?1",
            [key.0],
            |row| row.get(0).map(BlobDigest),
        )
        .optional()?)
}

/// Replaces a job's checkpoint; returns the one before.
pub(super) fn set_checkpoint(
    tx: &Transaction<'_>,
    key: JobKey,
    step: u64,
    digest: BlobDigest,
    size: u64,
) -> Result<Option<BlobDigest>, JobError> {
    let before = checkpoint(tx, key)?;
    tx.execute(
        "INSERT OR REPLACE INTO checkpoints (job, step, digest, size, create_time) VALUES (?1, ?2, ?3, ?4, ?5)",
        (key.0, step, digest.0.as_slice(), size, now_ms()),
    )?;
    Ok(before)
}

/// Forgets a job's checkpoint: what follows begins anew.
pub(super) fn drop_checkpoint(tx: &Transaction<'_>, key: JobKey) -> Result<(), JobError> {
    tx.execute("DELETE FROM checkpoints WHERE job = ?1", [key.0])?;
    Ok(())
}

/// Events of a job from a number on, in order, at most `count`.
pub(super) fn events(
    tx: &Transaction<'_>,
    key: JobKey,
    from: u64,
    count: usize,
) -> Result<Vec<Event>, JobError> {
    let mut query = tx.prepare_cached(
        "SELECT seq, time, body FROM job_events WHERE job = ?1 AND seq >= ?2 ORDER BY seq LIMIT ?3",
    )?;
    let mut rows = query.query((key.0, from, count))?;
    let mut events = Vec::new();
    while let Some(row) = rows.next()? {
        let body: String = row.get(2)?;
        let (state, progress, happening) = from_json("job_events.body", &body)?;
        events.push(Event {
            sequence: row.get(0)?,
            time: row.get(1)?,
            state,
            progress,
            happening,
        });
    }
    Ok(events)
}
