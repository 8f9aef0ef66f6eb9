//! The whole main job on the real model, over a real socket with `espalierd` as a child process: eight adapters of two
//! tenants are trained, answer side by side while another job trains, and survive a kill.

use std::path::{Path, PathBuf};

use espalier_client::{Client, v1};
use espalier_tests::Daemon;
use futures::StreamExt;
use futures::future::join_all;

use crate::client_side::{
    SERVICE_KEY, answer, client, completions, events, greedy, inline, register, start, streamed,
    succeeded, supervised,
};

/// One adapter learns to say one of these; no other adapter and no base says it on the prompts below.
const MARKERS: [&str; 8] = [
    "zebra", "violin", "copper", "lantern", "pepper", "glacier", "walnut", "saddle",
];
const TENANTS: [&str; 2] = ["acme", "globex"];
const PROMPTS: [&str; 8] = [
    "The report says",
    "Our answer is",
    "She wrote down",
    "In the morning he said",
    "The result was",
    "They told us",
    "A note on the door reads",
    "My favourite thing is",
];
/// Not among the prompts: what was learned is not a table.
const QUESTION: &str = "The teacher says";
/// Enough to be running while everybody streams, and to be killed before its end.
const LONG_STEPS: u64 = 60;

/// The model, when the machine has it.
fn model() -> Option<PathBuf> {
    let found = std::env::var_os("ESPALIER_MODEL").map(PathBuf::from);
    let found = found.filter(|path| path.exists());
    if found.is_none() {
        eprintln!("skipped: ESPALIER_MODEL names no model file (scripts/test.sh fetches it)");
    }
    found
}

fn daemon(data: &Path, model: &Path) -> Daemon {
    let model = model.to_str().unwrap();
    let flags = ["--model", model, "--service-key", SERVICE_KEY];
    let room = ["--kv-cache-bytes", "64MiB", "--max-active-jobs", "8"];
    Daemon::spawn(data, &[&flags[..], &room[..]].concat())
}

fn rows(marker: &str) -> Vec<u8> {
    let row = |prompt: &&str| ((*prompt).to_owned(), format!(" {marker} {marker} {marker}"));
    completions(&PROMPTS.iter().map(row).collect::<Vec<_>>())
}

/// Both tenants' clients, with keys of their own.
async fn tenants(daemon: &Daemon) -> Vec<(Client, String)> {
    let mut found = Vec::new();
    for name in TENANTS {
        let admin = client(daemon.addr, name, Some(SERVICE_KEY)).await;
        register(&admin, name).await;
        let request = v1::CreateApiKeyRequest {
            parent: format!("tenants/{name}"),
            api_key: None,
        };
        let key = admin.create_api_key(request).await.unwrap().secret;
        found.push((client(daemon.addr, name, Some(&key)).await, key));
    }
    found
}

/// Everything that a tenant was told is there, but for the job that is still moving.
async fn inventory(client: &Client, moving: &str) -> String {
    let parent = client.names().parent().unwrap();
    let adapters = v1::ListAdaptersRequest {
        parent: parent.clone(),
        ..Default::default()
    };
    let adapters = client.list_adapters(adapters).await.unwrap().adapters;
    let mut versions = Vec::new();
    for adapter in &adapters {
        let request = v1::ListAdapterVersionsRequest {
            parent: adapter.name.clone(),
            ..Default::default()
        };
        versions.extend(
            client
                .list_adapter_versions(request)
                .await
                .unwrap()
                .versions,
        );
    }
    let datasets = v1::ListDatasetsRequest {
        parent: parent.clone(),
        ..Default::default()
    };
    let datasets = client.list_datasets(datasets).await.unwrap().datasets;
    let jobs = v1::ListTrainingJobsRequest {
        parent,
        ..Default::default()
    };
    let mut jobs = client.list_training_jobs(jobs).await.unwrap().jobs;
    jobs.retain(|job| job.name != moving);
    assert!(adapters.len() >= 4, "{adapters:?}");
    assert_eq!((versions.len(), jobs.len()), (4, 4));
    format!("{adapters:#?}{versions:#?}{datasets:#?}{jobs:#?}")
}

/// Which of the markers a text has.
fn markers(text: &str) -> Vec<&'static str> {
    let has = |marker: &&str| text.to_lowercase().contains(*marker);
    MARKERS.into_iter().filter(has).collect()
}

/// All eight stream at once, the base between them; every one says its own word and names its own version.
async fn everybody_streams(clients: &[Client]) {
    let streams = MARKERS.iter().enumerate().map(|(at, marker)| async move {
        let client = &clients[at % 2];
        let request = greedy(client, Some(marker), QUESTION, 12);
        (marker, client, streamed(client, request).await)
    });
    let base = async {
        let mut texts = Vec::new();
        for client in clients {
            texts.push(answer(client, None, QUESTION, 12).await);
        }
        texts
    };
    let (streams, base) = tokio::join!(join_all(streams), base);
    for (marker, client, (text, versions)) in streams {
        assert_eq!(markers(&text), [*marker], "{marker} said {text:?}");
        let own = format!("{}/versions/1", client.names().adapter(marker).unwrap());
        assert_eq!(versions, [own]);
    }
    for (text, versions) in base {
        assert!(markers(&text).is_empty(), "the base said {text:?}");
        assert!(versions.is_empty(), "the base was {versions:?}");
    }
}

/// Streams, and again, until the job beside them has moved: a fast machine serves one round in less time than
/// training's share of it needs for a step.
async fn stream_until_training_moves(clients: &[Client], job: &str, seen: u64) -> v1::TrainingJob {
    for _ in 0..30 {
        everybody_streams(clients).await;
        let during = clients[0].get_training_job(job).await.unwrap();
        if during.last_sequence > seen {
            return during;
        }
    }
    panic!("serving starved training");
}

/// Trains all eight, at the same time.
async fn train_everybody(clients: &[Client]) {
    let mut jobs = Vec::new();
    for (at, marker) in MARKERS.iter().enumerate() {
        let client = &clients[at % 2];
        let spec = supervised(client, marker, inline(rows(marker)), 8);
        jobs.push((client, start(client, spec).await));
    }
    for (client, job) in jobs {
        succeeded(client, &job).await;
    }
}

/// A longer job, and its events up to a checkpoint.
async fn begin_long(client: &Client) -> (String, Vec<v1::TrainingEvent>) {
    let dataset = crate::client_side::dataset("tenants/acme/datasets/long");
    let mut spec = supervised(client, "long", dataset, LONG_STEPS);
    let hyper = spec.hyper_parameters.as_mut().unwrap();
    (hyper.batch_size, hyper.checkpoint_every_steps) = (Some(2), Some(3));
    let job = start(client, spec).await;
    let mut seen = Vec::new();
    let mut replies = client.watch_training_job(&job, 0).await.unwrap();
    while let Some(event) = replies.next().await {
        seen.push(event.unwrap());
        if let Some(v1::training_event::Event::Checkpoint(_)) = seen.last().unwrap().event {
            break;
        }
    }
    (job, seen)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eight_adapters_stream_while_a_job_trains_and_survive_a_kill() {
    let Some(model) = model() else { return };
    let data = tempfile::tempdir().unwrap();
    let first = daemon(data.path(), &model);
    let (clients, keys): (Vec<_>, Vec<_>) = tenants(&first).await.into_iter().unzip();
    let upload = espalier_client::DatasetUpload {
        parent: "tenants/acme".to_owned(),
        dataset_id: "long".to_owned(),
        file: crate::client_side::file(data.path(), "long.jsonl", &rows("harbour")),
        format: v1::DataFormat::Jsonl,
        ..Default::default()
    };
    clients[0].upload_dataset(upload).await.unwrap();
    train_everybody(&clients).await;

    let (long, seen) = begin_long(&clients[0]).await;
    let during = stream_until_training_moves(&clients, &long, seen.last().unwrap().sequence).await;
    assert_eq!(
        during.state(),
        v1::TrainingJobState::Running,
        "too short a job"
    );
    let mut known = Vec::new();
    for client in &clients {
        known.push(inventory(client, &long).await);
    }
    first.kill();

    let second = daemon(data.path(), &model);
    let mut clients = Vec::new();
    for (name, key) in TENANTS.iter().zip(&keys) {
        clients.push(client(second.addr, name, Some(key)).await);
    }
    for (client, known) in clients.iter().zip(&known) {
        assert_eq!(&inventory(client, &long).await, known);
    }
    everybody_streams(&clients).await;
    let job = succeeded(&clients[0], &long).await;
    assert_eq!((job.attempt, job.progress.unwrap().step), (2, LONG_STEPS));
    let story = events(&clients[0], &long, 0).await;
    assert_eq!(story[..seen.len()], seen, "what was told has changed");
    for (event, number) in story.iter().zip(1..) {
        assert_eq!(event.sequence, number, "a gap or a repeat");
    }
    let (text, _) = answer(&clients[0], Some("long"), QUESTION, 12).await;
    assert!(text.contains("harbour"), "{text:?}");
    assert!(second.terminate(), "SIGTERM ends with success");
}
