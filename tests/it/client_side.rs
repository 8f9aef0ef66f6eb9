//! What the tests about adapters and training say through the typed client: connect for a tenant, describe a job in few
//! words, follow it to its end. It must not know what any test is about.

use std::net::SocketAddr;
use std::path::Path;

use espalier_client::{Client, ClientConfig, v1};
use futures::StreamExt;

/// The same in every test that configures one.
pub(crate) const SERVICE_KEY: &str = "0123456789abcdef0123456789abcdef";

/// A client for one tenant's short names, with or without a key.
pub(crate) async fn client(addr: SocketAddr, tenant: &str, key: Option<&str>) -> Client {
    let mut config = ClientConfig::new(format!("http://{addr}"));
    config.tenant = Some(tenant.to_owned());
    config.api_key = key.map(str::to_owned);
    // The machine may be busy with other tests.
    config.timeouts.connect = std::time::Duration::from_secs(30);
    Client::connect(config).await.unwrap()
}

/// Registers the client's tenant.
pub(crate) async fn register(client: &Client, tenant: &str) {
    let request = v1::CreateTenantRequest {
        tenant_id: tenant.to_owned(),
        ..Default::default()
    };
    client.create_tenant(request).await.unwrap();
}

/// A client of a server without keys, its tenant registered.
pub(crate) async fn tenant(addr: SocketAddr, name: &str) -> Client {
    let client = client(addr, name, None).await;
    register(&client, name).await;
    client
}

/// Rows of prompt and completion, as JSONL.
pub(crate) fn completions(rows: &[(String, String)]) -> Vec<u8> {
    let line = |(prompt, completion): &(String, String)| {
        serde_json::json!({"prompt": prompt, "completion": completion}).to_string() + "\n"
    };
    rows.iter().map(line).collect::<String>().into_bytes()
}

/// Rows of text and label, as JSONL.
pub(crate) fn labelled(rows: &[(&str, &str)]) -> Vec<u8> {
    let line = |(text, label): &(&str, &str)| {
        serde_json::json!({"text": text, "label": label}).to_string() + "\n"
    };
    rows.iter().map(line).collect::<String>().into_bytes()
}

/// Rows inside a request.
pub(crate) fn inline(content: Vec<u8>) -> v1::TrainingData {
    let rows = v1::InlineData {
        format: v1::DataFormat::Jsonl.into(),
        content,
        ..Default::default()
    };
    v1::TrainingData {
        source: Some(v1::training_data::Source::Inline(rows)),
    }
}

/// Rows of a dataset by its whole name.
pub(crate) fn dataset(name: &str) -> v1::TrainingData {
    v1::TrainingData {
        source: Some(v1::training_data::Source::Dataset(name.to_owned())),
    }
}

/// A supervised job of so many steps; the seed makes it repeatable.
pub(crate) fn supervised(
    client: &Client,
    adapter: &str,
    data: v1::TrainingData,
    steps: u64,
) -> v1::TrainingSpec {
    v1::TrainingSpec {
        adapter: client.names().adapter(adapter).unwrap(),
        method: Some(v1::training_spec::Method::Supervised(
            v1::SupervisedMethod::default(),
        )),
        data: Some(data),
        hyper_parameters: Some(v1::HyperParameters {
            max_steps: Some(steps),
            // The bound above decides, not the passes.
            epochs: Some(100.0),
            batch_size: Some(4),
            learning_rate: Some(5e-3),
            warmup_steps: Some(0),
            schedule: v1::LearningRateSchedule::Constant.into(),
            ..Default::default()
        }),
        lora: Some(v1::LoraConfig {
            rank: Some(4),
            alpha: Some(8.0),
            ..Default::default()
        }),
        seed: Some(11),
        ..Default::default()
    }
}

/// A classification job.
pub(crate) fn classification(
    client: &Client,
    adapter: &str,
    data: v1::TrainingData,
    head_only: bool,
) -> v1::TrainingSpec {
    let method = v1::ClassificationMethod {
        head_only: Some(head_only),
        ..Default::default()
    };
    v1::TrainingSpec {
        method: Some(v1::training_spec::Method::Classification(method)),
        ..supervised(client, adapter, data, 60)
    }
}

/// The call that creates a job for the spec.
pub(crate) fn create(client: &Client, spec: v1::TrainingSpec) -> v1::CreateTrainingJobRequest {
    v1::CreateTrainingJobRequest {
        parent: client.names().parent().unwrap(),
        spec: Some(spec),
        ..Default::default()
    }
}

/// Creates a job and gives its name.
pub(crate) async fn start(client: &Client, spec: v1::TrainingSpec) -> String {
    let reply = client.create_training_job(create(client, spec)).await;
    reply.unwrap().job.unwrap().name
}

/// All events of a job from a number on, waiting for its end.
pub(crate) async fn events(client: &Client, job: &str, from: u64) -> Vec<v1::TrainingEvent> {
    let replies = client.watch_training_job(job, from).await.unwrap();
    replies.map(|event| event.unwrap()).collect().await
}

/// Waits for a job's end; it must have succeeded.
pub(crate) async fn succeeded(client: &Client, job: &str) -> v1::TrainingJob {
    events(client, job, 0).await;
    let job = client.get_training_job(job).await.unwrap();
    assert_eq!(
        job.state(),
        v1::TrainingJobState::Succeeded,
        "{:?}",
        job.error
    );
    job
}

/// A greedy continuation of exactly so many tokens, by an adapter or by the base.
pub(crate) fn greedy(
    client: &Client,
    adapter: Option<&str>,
    text: &str,
    tokens: u32,
) -> v1::GenerateRequest {
    v1::GenerateRequest {
        target: Some(client.target(adapter).unwrap()),
        ..crate::inference_api::generate(text, tokens)
    }
}

/// The text of a greedy continuation and the versions that answered.
pub(crate) async fn answer(
    client: &Client,
    adapter: Option<&str>,
    text: &str,
    tokens: u32,
) -> (String, Vec<String>) {
    let request = greedy(client, adapter, text, tokens);
    let reply = client.generate(request).await.unwrap();
    let applied = reply.effective.unwrap().adapters;
    (
        reply.candidates[0].text.clone(),
        applied.into_iter().map(|one| one.version).collect(),
    )
}

/// A stream of a greedy continuation, read to its end: the text and the versions that its first message named.
pub(crate) async fn streamed(
    client: &Client,
    request: v1::GenerateRequest,
) -> (String, Vec<String>) {
    use v1::generate_chunk::Event;
    let mut replies = client.stream_generate(request).await.unwrap();
    let (mut text, mut versions, mut ended) = (String::new(), Vec::new(), false);
    while let Some(chunk) = replies.next().await {
        match chunk.unwrap().event.unwrap() {
            Event::Started(started) => {
                let applied = started.effective.unwrap().adapters;
                versions = applied.into_iter().map(|one| one.version).collect();
            }
            Event::Delta(delta) => text.push_str(&delta.text),
            Event::Finished(_) => {}
            Event::Ended(_) => ended = true,
        }
    }
    assert!(ended, "a stream ended without its last message");
    (text, versions)
}

/// A file to upload.
pub(crate) fn file(dir: &Path, name: &str, content: &[u8]) -> std::path::PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, content).unwrap();
    path
}
