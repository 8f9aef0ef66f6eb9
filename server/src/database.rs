//! The embedded database: names, versions, aliases, jobs and their events in one SQLite file that survives `kill -9`.
//!
//! SQLite blocks, the runtime must not: one thread owns the writing connection and one the reading connection, and both are
//! asked through channels. A closure runs inside one transaction; a caller that goes away does not undo what it asked for.
//! `synchronous = FULL` in WAL mode means that a commit that was answered is on the disk. This file must not know what the
//! tables mean.

use std::fs::{File, TryLockError};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rusqlite::{Connection, OpenFlags, OptionalExtension, Transaction, TransactionBehavior};
use tokio::sync::oneshot;

/// The migrations in order: `PRAGMA user_version` counts how many are applied.
const MIGRATIONS: &[&str] = &[
    include_str!("schema.sql"),
    include_str!("schema_serving.sql"),
    include_str!("schema_bulk.sql"),
    include_str!("schema_jobs.sql"),
    include_str!("schema_classification.sql"),
];

/// Request ids are remembered this long.
const REQUEST_ID_LIFETIME: Duration = Duration::from_secs(30 * 24 * 3600);

/// Why the database did not answer.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// SQLite refused: disk full, file damaged, constraint broken.
    #[error("the database failed: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// The directory or the lock file could not be made.
    #[error("cannot open the data directory {path}: {source}")]
    Open {
        /// The path that failed.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Another server works on the same data directory.
    #[error("the data directory {path} is in use by another process")]
    InUse {
        /// The data directory.
        path: PathBuf,
    },
    /// The file was written by a newer server.
    #[error("the database has schema version {found}, this server knows {known}")]
    TooNew {
        /// Version found in the file.
        found: usize,
        /// Newest version that this build can read.
        known: usize,
    },
    /// A stored value does not read back: the row is damaged or from another build.
    #[error("a stored value of {column} does not read back: {reason}")]
    Damaged {
        /// Table and column.
        column: &'static str,
        /// What was wrong.
        reason: String,
    },
    /// The database thread is gone or the closure panicked.
    #[error("the database thread did not answer")]
    Closed,
}

type Task = Box<dyn FnOnce(&mut Connection) + Send>;

/// Handle on the two database threads. Cheap to clone; the threads end when the last handle is dropped.
#[derive(Clone)]
pub struct Database {
    writer: mpsc::Sender<Task>,
    reader: mpsc::Sender<Task>,
}

/// Keeps a second server off the same data directory for as long as it lives.
pub struct DataDirLock {
    _file: File,
}

impl DataDirLock {
    /// Takes the lock of `data_dir`, creating the directory. The system drops it when the process dies, however it dies.
    pub fn take(data_dir: &Path) -> Result<Self, DatabaseError> {
        let open = |source| DatabaseError::Open {
            path: data_dir.to_owned(),
            source,
        };
        std::fs::create_dir_all(data_dir).map_err(open)?;
        let file = File::create(data_dir.join("lock")).map_err(open)?;
        match file.try_lock() {
            Ok(()) => Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => Err(DatabaseError::InUse {
                path: data_dir.to_owned(),
            }),
            Err(TryLockError::Error(source)) => Err(open(source)),
        }
    }
}

impl Database {
    /// Opens or creates `espalier.db` in `data_dir` and brings its schema up to date.
    pub fn open(data_dir: &Path) -> Result<Self, DatabaseError> {
        std::fs::create_dir_all(data_dir).map_err(|source| DatabaseError::Open {
            path: data_dir.to_owned(),
            source,
        })?;
        let path = data_dir.join("espalier.db");
        let mut writer = Connection::open(&path)?;
        writer.pragma_update(None, "journal_mode", "WAL")?;
        writer.pragma_update(None, "synchronous", "FULL")?;
        writer.pragma_update(None, "foreign_keys", true)?;
        writer.busy_timeout(Duration::from_secs(10))?;
        migrate(&mut writer)?;
        forget_old_requests(&writer)?;
        let reader = Connection::open_with_flags(
            &path,
            OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX,
        )?;
        reader.busy_timeout(Duration::from_secs(10))?;
        Ok(Self {
            writer: spawn("database-writer", writer, &path)?,
            reader: spawn("database-reader", reader, &path)?,
        })
    }

    /// Runs `work` in one write transaction: committed when it returns `Ok`, rolled back otherwise.
    pub async fn write<T, E, F>(&self, work: F) -> Result<T, E>
    where
        F: FnOnce(&Transaction<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: From<DatabaseError> + Send + 'static,
    {
        let answer = send(&self.writer, |connection| {
            in_transaction(connection, TransactionBehavior::Immediate, work)
        });
        answer
            .await
            .unwrap_or_else(|_| Err(DatabaseError::Closed.into()))
    }

    /// Runs `work` on one consistent snapshot that includes every write answered before.
    pub async fn read<T, E, F>(&self, work: F) -> Result<T, E>
    where
        F: FnOnce(&Transaction<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: From<DatabaseError> + Send + 'static,
    {
        let answer = send(&self.reader, |connection| {
            in_transaction(connection, TransactionBehavior::Deferred, work)
        });
        answer
            .await
            .unwrap_or_else(|_| Err(DatabaseError::Closed.into()))
    }

    /// [`Database::write`] for threads outside the runtime. Must not be called on a runtime thread.
    pub fn write_blocking<T, E, F>(&self, work: F) -> Result<T, E>
    where
        F: FnOnce(&Transaction<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: From<DatabaseError> + Send + 'static,
    {
        let answer = send(&self.writer, |connection| {
            in_transaction(connection, TransactionBehavior::Immediate, work)
        });
        answer
            .blocking_recv()
            .unwrap_or_else(|_| Err(DatabaseError::Closed.into()))
    }

    /// [`Database::read`] for threads outside the runtime. Must not be called on a runtime thread.
    pub fn read_blocking<T, E, F>(&self, work: F) -> Result<T, E>
    where
        F: FnOnce(&Transaction<'_>) -> Result<T, E> + Send + 'static,
        T: Send + 'static,
        E: From<DatabaseError> + Send + 'static,
    {
        let answer = send(&self.reader, |connection| {
            in_transaction(connection, TransactionBehavior::Deferred, work)
        });
        answer
            .blocking_recv()
            .unwrap_or_else(|_| Err(DatabaseError::Closed.into()))
    }
}

/// Milliseconds since 1970.
pub fn now_ms() -> i64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |d| i64::try_from(d.as_millis()).unwrap_or(i64::MAX))
}

fn in_transaction<T, E, F>(
    connection: &mut Connection,
    behavior: TransactionBehavior,
    work: F,
) -> Result<T, E>
where
    F: FnOnce(&Transaction<'_>) -> Result<T, E>,
    E: From<DatabaseError>,
{
    let transaction = connection
        .transaction_with_behavior(behavior)
        .map_err(DatabaseError::from)?;
    let value = work(&transaction)?;
    transaction.commit().map_err(DatabaseError::from)?;
    Ok(value)
}

/// Queues `work`; the answer's sender is dropped when the thread is gone or the closure panics.
fn send<R, F>(queue: &mpsc::Sender<Task>, work: F) -> oneshot::Receiver<R>
where
    F: FnOnce(&mut Connection) -> R + Send + 'static,
    R: Send + 'static,
{
    let (answer, receiver) = oneshot::channel();
    // A refused send drops the task and with it `answer`, which the receiver reports as closed.
    let _ = queue.send(Box::new(move |connection| {
        let _ = answer.send(work(connection));
    }));
    receiver
}

fn spawn(
    name: &str,
    mut connection: Connection,
    path: &Path,
) -> Result<mpsc::Sender<Task>, DatabaseError> {
    let (sender, receiver) = mpsc::channel::<Task>();
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            for task in receiver {
                // The unwinding transaction rolls back, so the connection is whole for the next task.
                if catch_unwind(AssertUnwindSafe(|| task(&mut connection))).is_err() {
                    tracing::error!("a database task panicked and was rolled back");
                }
            }
        })
        .map_err(|source| DatabaseError::Open {
            path: path.to_owned(),
            source,
        })?;
    Ok(sender)
}

fn migrate(connection: &mut Connection) -> Result<(), DatabaseError> {
    let known = MIGRATIONS.len();
    let transaction = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
    let found: i64 = transaction.query_row("PRAGMA user_version", [], |row| row.get(0))?;
    let found = usize::try_from(found).unwrap_or(usize::MAX);
    if found > known {
        return Err(DatabaseError::TooNew { found, known });
    }
    for migration in &MIGRATIONS[found..] {
        transaction.execute_batch(migration)?;
    }
    transaction.pragma_update(None, "user_version", known as i64)?;
    transaction.commit()?;
    Ok(())
}

fn forget_old_requests(connection: &Connection) -> Result<(), DatabaseError> {
    let oldest = now_ms() - REQUEST_ID_LIFETIME.as_millis() as i64;
    connection.execute("DELETE FROM requests WHERE create_time < ?1", [oldest])?;
    Ok(())
}

/// One use of an idempotency key (AIP-155).
#[derive(Debug, Clone)]
pub struct RequestKey {
    /// Scope of the id: a tenant, or `-` for the server.
    pub tenant: String,
    /// The method it was sent to.
    pub method: &'static str,
    /// What the client chose.
    pub request_id: String,
    /// SHA-256 of everything else in the request.
    pub payload: [u8; 32],
}

/// What an idempotency key was used for before.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EarlierUse {
    /// Never: go on, then [`remember_request`].
    None,
    /// With the same payload; this resource came out.
    Same(String),
    /// With another payload: refuse with `REQUEST_ID_REUSED`.
    Different,
}

/// Looks an idempotency key up.
pub fn earlier_use(tx: &Transaction<'_>, key: &RequestKey) -> Result<EarlierUse, DatabaseError> {
    let row: Option<(Vec<u8>, String)> = tx
        .query_row(
            "SELECT payload_sha256, resource FROM requests WHERE tenant = ?1 AND method = ?2 AND request_id = ?3",
            (&key.tenant, key.method, &key.request_id),
            |row| Ok((row.get(0)?, row.get(1)?)),
        )
        .optional()?;
    Ok(match row {
        None => EarlierUse::None,
        Some((payload, resource)) if payload == key.payload => EarlierUse::Same(resource),
        Some(_) => EarlierUse::Different,
    })
}

/// Fixes payload and resource of an idempotency key, in the transaction that makes the resource.
pub fn remember_request(
    tx: &Transaction<'_>,
    key: &RequestKey,
    resource: &str,
) -> Result<(), DatabaseError> {
    tx.execute(
        "INSERT INTO requests (tenant, method, request_id, payload_sha256, resource, create_time) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        (
            &key.tenant,
            key.method,
            &key.request_id,
            key.payload.as_slice(),
            resource,
            now_ms(),
        ),
    )?;
    Ok(())
}

/// Forgets which request made `resource`, in the transaction that deletes it: a retry then makes it anew.
pub fn forget_requests_for(tx: &Transaction<'_>, resource: &str) -> Result<(), DatabaseError> {
    tx.execute("DELETE FROM requests WHERE resource = ?1", [resource])?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    async fn insert(db: &Database, id: &'static str) -> Result<(), DatabaseError> {
        db.write(move |tx| {
            tx.execute("INSERT INTO tenants VALUES (?1, '', 0)", [id])?;
            Ok(())
        })
        .await
    }

    async fn count(db: &Database) -> i64 {
        db.read(|tx| {
            Ok::<_, DatabaseError>(tx.query_row("SELECT count(*) FROM tenants", [], |r| r.get(0))?)
        })
        .await
        .unwrap()
    }

    #[tokio::test]
    async fn a_commit_is_there_after_a_drop_without_shutdown() {
        let dir = tempfile::tempdir().unwrap();
        let db = Database::open(dir.path()).unwrap();
        insert(&db, "acme").await.unwrap();
        let failed = db
            .write(|tx| {
                tx.execute("INSERT INTO tenants VALUES ('globex', '', 0)", [])?;
                Err::<(), _>(DatabaseError::Closed)
            })
            .await;
        assert!(failed.is_err());
        // The old handle stays open on purpose: a killed process closes nothing either.
        let again = Database::open(dir.path()).unwrap();
        assert_eq!(count(&again).await, 1);
    }

    #[tokio::test]
    async fn a_panicking_task_rolls_back_and_the_thread_lives_on() {
        let dir = tempfile::tempdir().unwrap();
        let db = Database::open(dir.path()).unwrap();
        let lost: Result<(), DatabaseError> = db
            .write(|tx| {
                tx.execute("INSERT INTO tenants VALUES ('x', '', 0)", [])?;
                panic!("on purpose")
            })
            .await;
        assert!(matches!(lost, Err(DatabaseError::Closed)));
        insert(&db, "acme").await.unwrap();
        assert_eq!(count(&db).await, 1);
    }

    #[tokio::test]
    async fn a_dropped_caller_does_not_undo_its_write() {
        let dir = tempfile::tempdir().unwrap();
        let db = Database::open(dir.path()).unwrap();
        let mut future = Box::pin(insert(&db, "acme"));
        let _ = futures::poll!(&mut future);
        drop(future);
        insert(&db, "globex").await.unwrap();
        assert_eq!(count(&db).await, 2);
    }

    #[test]
    fn a_newer_schema_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        drop(Database::open(dir.path()).unwrap());
        let raw = Connection::open(dir.path().join("espalier.db")).unwrap();
        raw.pragma_update(None, "user_version", 99).unwrap();
        let error = Database::open(dir.path()).err().unwrap();
        assert!(
            matches!(error, DatabaseError::TooNew { found: 99, .. }),
            "{error}"
        );
    }

    #[test]
    fn the_data_directory_has_one_master() {
        let dir = tempfile::tempdir().unwrap();
        let lock = DataDirLock::take(dir.path()).unwrap();
        assert!(matches!(
            DataDirLock::take(dir.path()),
            Err(DatabaseError::InUse { .. })
        ));
        drop(lock);
        assert!(DataDirLock::take(dir.path()).is_ok());
    }

    #[tokio::test]
    async fn request_ids_are_fixed_by_their_first_use() {
        let dir = tempfile::tempdir().unwrap();
        let db = Database::open(dir.path()).unwrap();
        let key = |payload: u8| RequestKey {
            tenant: "acme".into(),
            method: "Create",
            request_id: "r1".into(),
            payload: [payload; 32],
        };
        let (first, same, other) = (key(1), key(1), key(2));
        db.write(move |tx| {
            assert_eq!(earlier_use(tx, &first)?, EarlierUse::None);
            remember_request(tx, &first, "tenants/acme/adapters/a")
        })
        .await
        .unwrap();
        db.read(move |tx| {
            assert_eq!(
                earlier_use(tx, &same)?,
                EarlierUse::Same("tenants/acme/adapters/a".into())
            );
            assert_eq!(earlier_use(tx, &other)?, EarlierUse::Different);
            Ok::<_, DatabaseError>(())
        })
        .await
        .unwrap();
    }
}
