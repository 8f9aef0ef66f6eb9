//! Bulk jobs' rows and files against crashes, limits and names.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::io::Write;
use std::path::Path;

use super::*;
use crate::names::BulkJobId;

const LIMITS: BulkLimits = BulkLimits {
    max_jobs: 2,
    max_active: 1,
    max_id_length: 63,
    retention: Duration::from_secs(60),
};

async fn open(data: &Path) -> BulkStore {
    let database = Database::open(data).unwrap();
    database
        .write(|tx| {
            tx.execute(
                "INSERT OR IGNORE INTO tenants (id, display_name, create_time) VALUES ('acme', '', 0)",
                [],
            )?;
            Ok::<_, BulkError>(())
        })
        .await
        .unwrap();
    BulkStore::open(database, data, LIMITS).await.unwrap()
}

fn job(id: &str, items: u64) -> Job {
    Job {
        name: BulkJobName::new(
            TenantId::parse("acme").unwrap(),
            BulkJobId::parse(id).unwrap(),
        ),
        uid: format!("uid-{id}"),
        operation: Operation::Classify,
        version: Some("tenants/acme/adapters/a/versions/3".to_owned()),
        state: State::Queued,
        error: None,
        description: String::new(),
        input_bytes: 1,
        input_sha256: String::new(),
        progress: Progress {
            items,
            ..Progress::default()
        },
        create_time: 5,
        start_time: None,
        end_time: None,
        expire_time: None,
    }
}

fn done(items: u64, done: u64, output_bytes: u64) -> Progress {
    Progress {
        items,
        done,
        output_bytes,
        ..Progress::default()
    }
}

#[tokio::test]
async fn a_crash_costs_what_was_not_counted_and_nothing_else() {
    let data = tempfile::tempdir().unwrap();
    let store = open(data.path()).await;
    let input = b"one\r\ntwo\nthree\n".to_vec();
    store.create(job("j", 3), input, None).await.unwrap();
    let (key, found) = store.next().await.unwrap();
    let mut output = store.output(&found).await.unwrap();
    output.append(b"ONE\n").unwrap();
    assert!(store.commit(key, done(3, 1, 4)).await.unwrap());
    // Written, half of it torn, and never counted.
    output.append(b"TWO\nTH").unwrap();
    drop((store, output));
    // And what a crash between files and row leaves.
    let orphan = data.path().join("bulk/uid-orphan");
    std::fs::create_dir(&orphan).unwrap();

    let store = open(data.path()).await;
    assert!(!orphan.exists(), "files without a row are removed");
    let (_, found) = store.next().await.unwrap();
    assert_eq!(
        (found.state, found.progress),
        (State::Running, done(3, 1, 4))
    );
    let mut input = store.input(&found).await.unwrap();
    let mut left = Vec::new();
    while let Some(line) = input.next_line().unwrap() {
        left.push(String::from_utf8(line).unwrap());
    }
    assert_eq!(left, ["two", "three"], "answered lines are not read again");
    let mut output = store.output(&found).await.unwrap();
    output.append(b"TWO\n").unwrap();
    let whole = store.read_output(&found, 0, 100).await.unwrap();
    assert_eq!(whole, b"ONE\nTWO\n");
    assert_eq!(store.read_output(&found, 4, 2).await.unwrap(), b"TW");
}

#[tokio::test]
async fn an_output_that_lost_bytes_is_no_output() {
    let data = tempfile::tempdir().unwrap();
    let store = open(data.path()).await;
    let mut found = store
        .create(job("j", 3), b"x".to_vec(), None)
        .await
        .unwrap();
    found.progress.output_bytes = 7;
    let error = store.output(&found).await.map(drop).unwrap_err();
    assert!(error.to_string().contains("its row counts 7"), "{error}");
}

#[tokio::test]
async fn ended_jobs_go_with_their_time_and_running_ones_stay() {
    let data = tempfile::tempdir().unwrap();
    let store = open(data.path()).await;
    let create = |id: &str| store.create(job(id, 1), b"x".to_vec(), None);
    let first = create("a").await.unwrap();
    let mut again = job("a", 1);
    // Each job has files of its own, whatever it is called.
    again.uid = "uid-again".to_owned();
    let again = store.create(again, b"x".to_vec(), None).await;
    assert!(matches!(again, Err(BulkError::Exists { .. })));
    create("b").await.unwrap();
    let error = create("c").await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "bulk jobs of the tenant would be 3, the limit is 2"
    );
    assert!(
        !data.path().join("bulk/uid-c").exists(),
        "a refused job leaves no files"
    );
    let early = store.delete(first.name.clone()).await.unwrap_err();
    assert!(early.to_string().contains("cancel it first"), "{early}");
    let (key, running) = store.next().await.unwrap();
    assert_eq!(running.name, first.name, "the oldest comes first");
    let cancelled = store.cancel(first.name.clone()).await.unwrap();
    assert_eq!(cancelled.state, State::Cancelled);
    assert!(
        !store.commit(key, done(1, 1, 9)).await.unwrap(),
        "nothing is counted after the end"
    );
    store.end(key, State::Succeeded, None).await.unwrap();
    let found = store.get(first.name.clone()).await.unwrap();
    assert_eq!(
        (found.state, found.progress.done),
        (State::Cancelled, 0),
        "an end is final"
    );
    store.expire().await.unwrap();
    assert!(store.get(first.name.clone()).await.is_ok());
    store
        .inner
        .database
        .write(|tx| {
            tx.execute("UPDATE bulk_jobs SET expire_time = 1 WHERE job = 'a'", [])?;
            Ok::<_, BulkError>(())
        })
        .await
        .unwrap();
    store.expire().await.unwrap();
    assert!(matches!(
        store.get(first.name).await,
        Err(BulkError::NotFound { .. })
    ));
    assert!(!data.path().join("bulk/uid-a").exists());
    assert!(data.path().join("bulk/uid-b").exists());
}

#[tokio::test]
async fn a_torn_directory_from_an_earlier_try_is_no_obstacle() {
    let data = tempfile::tempdir().unwrap();
    let store = open(data.path()).await;
    let path = data.path().join("bulk/uid-j");
    std::fs::create_dir(&path).unwrap();
    std::fs::File::create(path.join("input.jsonl"))
        .unwrap()
        .write_all(b"half")
        .unwrap();
    drop(store);
    let store = open(data.path()).await;
    assert!(store.create(job("j", 1), b"x".to_vec(), None).await.is_ok());
}
