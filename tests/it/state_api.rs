//! Tenants, adapters, datasets and jobs through the wire: what goes in comes out byte for byte, what is foreign looks like
//! what is absent, and what was acknowledged is there after `kill -9`.

use std::collections::BTreeMap;

use espalier_adapters::config::{LoraConfig, Modules, Site};
use espalier_adapters::peft;
use espalier_adapters::version::AdapterArtifact;
use espalier_adapters::weights::{AdapterWeights, SiteAdapter};
use espalier_proto::v1;
use espalier_proto::v1::adapter_service_client::AdapterServiceClient;
use espalier_proto::v1::tenant_service_client::TenantServiceClient;
use espalier_proto::v1::training_service_client::TrainingServiceClient;
use espalier_tests::{Daemon, TINY, TestServer, connect};
use sha2::{Digest, Sha256};
use tonic::service::Interceptor;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::inference_api::refused;

#[derive(Clone)]
struct Key(Option<String>);

impl Interceptor for Key {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Some(key) = &self.0 {
            let value = format!("Bearer {key}").parse().unwrap();
            request.metadata_mut().insert("authorization", value);
        }
        Ok(request)
    }
}

type Wire = InterceptedService<Channel, Key>;

fn tenants(channel: &Channel, key: Option<&str>) -> TenantServiceClient<Wire> {
    TenantServiceClient::with_interceptor(channel.clone(), Key(key.map(str::to_owned)))
}

fn adapters(channel: &Channel, key: Option<&str>) -> AdapterServiceClient<Wire> {
    AdapterServiceClient::with_interceptor(channel.clone(), Key(key.map(str::to_owned)))
}

fn training(channel: &Channel, key: Option<&str>) -> TrainingServiceClient<Wire> {
    TrainingServiceClient::with_interceptor(channel.clone(), Key(key.map(str::to_owned)))
}

/// A tenant and a key of its own.
async fn tenant(channel: &Channel, id: &str) -> String {
    let mut client = tenants(channel, None);
    let request = v1::CreateTenantRequest {
        tenant_id: id.to_owned(),
        ..Default::default()
    };
    client.create_tenant(request).await.unwrap();
    let request = v1::CreateApiKeyRequest {
        parent: format!("tenants/{id}"),
        api_key: None,
    };
    client
        .create_api_key(request)
        .await
        .unwrap()
        .into_inner()
        .secret
}

/// A LoRA of rank 2 on the tiny model's q projections; `seed` decides its numbers.
fn lora(seed: u64, hidden: usize) -> AdapterArtifact {
    let number = |at: usize| (at as f32 * 0.37 + seed as f32).sin() * 0.1;
    let site = |layer: usize| SiteAdapter {
        r: 2,
        scale: 4.0,
        a: (0..2 * hidden).map(|at| number(at + layer)).collect(),
        b: (0..2 * hidden).map(|at| number(at + 7 + layer)).collect(),
        magnitude: None,
    };
    let config = LoraConfig {
        target_modules: Modules::sites(&[Site::Q]),
        ..LoraConfig::new(2, 8.0, &[Site::Q])
    };
    let weights = AdapterWeights {
        sites: BTreeMap::from([((0, Site::Q), site(0)), ((1, Site::Q), site(1))]),
        ..AdapterWeights::default()
    };
    peft::write(&config, &weights).unwrap()
}

fn parts(artifact: &AdapterArtifact) -> [(v1::ArtifactPart, &[u8]); 2] {
    [
        (v1::ArtifactPart::Config, &artifact.config_json),
        (v1::ArtifactPart::Weights, &artifact.safetensors),
    ]
}

fn messages(
    parent: &str,
    artifact: &AdapterArtifact,
    change: impl FnOnce(&mut v1::UploadAdapterVersionMetadata),
) -> Vec<v1::UploadAdapterVersionRequest> {
    use v1::upload_adapter_version_request::Payload;
    let mut metadata = v1::UploadAdapterVersionMetadata {
        parent: parent.to_owned(),
        parts: parts(artifact)
            .iter()
            .map(|(part, bytes)| v1::ArtifactPartInfo {
                part: (*part).into(),
                size_bytes: bytes.len() as u64,
                sha256: hex::encode(Sha256::digest(bytes)),
            })
            .collect(),
        create_if_missing: true,
        ..Default::default()
    };
    change(&mut metadata);
    let mut payloads = vec![Payload::Metadata(metadata)];
    for (part, bytes) in parts(artifact) {
        // Small and uneven, so that offsets matter.
        for (index, data) in bytes.chunks(777).enumerate() {
            payloads.push(Payload::Chunk(v1::ArtifactChunk {
                part: part.into(),
                offset: index as u64 * 777,
                data: data.to_vec(),
            }));
        }
    }
    payloads
        .into_iter()
        .map(|payload| v1::UploadAdapterVersionRequest {
            payload: Some(payload),
        })
        .collect()
}

async fn upload(
    client: &mut AdapterServiceClient<Wire>,
    messages: Vec<v1::UploadAdapterVersionRequest>,
) -> Result<v1::UploadAdapterVersionResponse, Status> {
    let stream = tokio_stream::iter(messages);
    Ok(client.upload_adapter_version(stream).await?.into_inner())
}

async fn download(
    client: &mut AdapterServiceClient<Wire>,
    name: &str,
) -> Result<(v1::AdapterVersion, Vec<u8>, Vec<u8>), Status> {
    use v1::download_adapter_version_response::Payload;
    let request = v1::DownloadAdapterVersionRequest {
        name: name.to_owned(),
        ..Default::default()
    };
    let mut stream = client.download_adapter_version(request).await?.into_inner();
    let (mut header, mut config, mut weights) = (None, Vec::new(), Vec::new());
    while let Some(message) = stream.message().await? {
        match message.payload.unwrap() {
            Payload::Version(version) => header = Some(version),
            Payload::Chunk(chunk) => {
                let file = match chunk.part() {
                    v1::ArtifactPart::Config => &mut config,
                    _ => &mut weights,
                };
                assert_eq!(chunk.offset, file.len() as u64);
                file.extend(chunk.data);
            }
        }
    }
    Ok((header.unwrap(), config, weights))
}

#[tokio::test]
async fn an_adapter_goes_in_and_comes_out_byte_for_byte() {
    let server = TestServer::start(&[]).await;
    let channel = server.channel().await;
    let key = tenant(&channel, "acme").await;
    let mut client = adapters(&channel, Some(&key));
    let name = "tenants/acme/adapters/style";
    let artifact = lora(1, 64);
    let dry = messages(name, &artifact, |m| m.validate_only = true);
    let dry = upload(&mut client, dry).await.unwrap();
    assert!(dry.report.unwrap().accepted && dry.version.unwrap().name.is_empty());
    let get = v1::GetAdapterRequest {
        name: name.to_owned(),
    };
    let (code, reason, _) = refused(client.get_adapter(get.clone()).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::NotFound, "ADAPTER_NOT_FOUND")
    );
    let with_id = |m: &mut v1::UploadAdapterVersionMetadata| m.request_id = "r-1".to_owned();
    let first = upload(&mut client, messages(name, &artifact, with_id))
        .await
        .unwrap();
    let first = first.version.unwrap();
    assert_eq!(first.name, format!("{name}/versions/1"));
    assert_eq!(first.digest, artifact.digest().to_string());
    assert_eq!(first.aliases, ["default"]);
    let again = upload(&mut client, messages(name, &artifact, with_id))
        .await
        .unwrap();
    assert_eq!(again.version.unwrap().name, first.name);
    let other = messages(name, &lora(2, 64), with_id);
    let (_, reason, _) = refused(upload(&mut client, other).await);
    assert_eq!(reason, "REQUEST_ID_REUSED");
    let canary = messages(name, &lora(2, 64), |m| {
        m.set_aliases = vec!["canary".to_owned()]
    });
    upload(&mut client, canary).await.unwrap();
    let (header, config, weights) = download(&mut client, name).await.unwrap();
    assert_eq!(header.name, first.name);
    assert_eq!(
        (config, weights),
        (artifact.config_json, artifact.safetensors)
    );
    let adapter = client.get_adapter(get).await.unwrap().into_inner();
    assert_eq!((adapter.version_count, adapter.aliases.len()), (2, 2));
    let set = |etag: &str| v1::SetAdapterAliasesRequest {
        name: name.to_owned(),
        set: BTreeMap::from([("default".to_owned(), "2".to_owned())]),
        remove: vec!["canary".to_owned()],
        etag: etag.to_owned(),
    };
    client
        .set_adapter_aliases(set(&adapter.etag))
        .await
        .unwrap();
    let (code, reason, _) = refused(client.set_adapter_aliases(set(&adapter.etag)).await);
    assert_eq!((code, reason.as_str()), (Code::Aborted, "ETAG_MISMATCH"));
    let delete = |version: &str| v1::DeleteAdapterVersionRequest {
        name: version.to_owned(),
    };
    let (_, reason, _) = refused(
        client
            .delete_adapter_version(delete(&format!("{name}/versions/2")))
            .await,
    );
    assert_eq!(reason, "RESOURCE_IN_USE");
    client
        .delete_adapter_version(delete(&first.name))
        .await
        .unwrap();
}

#[tokio::test]
async fn broken_uploads_are_refused_with_their_reason() {
    let server = TestServer::start(&[("max_adapter_bytes", "100KiB")]).await;
    let channel = server.channel().await;
    let key = tenant(&channel, "acme").await;
    let mut client = adapters(&channel, Some(&key));
    let name = "tenants/acme/adapters/style";
    let good = lora(1, 64);
    let mut check = async |messages, expected: (Code, &str)| {
        let (code, reason, _) = refused(upload(&mut client, messages).await);
        assert_eq!((code, reason.as_str()), expected);
    };
    let mut cut = messages(name, &good, |_| {});
    cut.pop();
    check(cut, (Code::Aborted, "CHECKSUM_MISMATCH")).await;
    let wrong = messages(name, &good, |m| m.parts[1].sha256 = "0".repeat(64));
    check(wrong, (Code::Aborted, "CHECKSUM_MISMATCH")).await;
    let mut swapped = messages(name, &good, |_| {});
    let last = swapped.len() - 1;
    swapped.swap(last - 1, last);
    check(swapped, (Code::Aborted, "UPLOAD_OFFSET_MISMATCH")).await;
    let large = messages(name, &good, |m| m.parts[1].size_bytes = 1 << 40);
    check(large, (Code::InvalidArgument, "ARTIFACT_TOO_LARGE")).await;
    let huge = messages(name, &good, |m| m.parts[1].size_bytes = u64::MAX);
    check(huge, (Code::InvalidArgument, "ARTIFACT_TOO_LARGE")).await;
    check(
        messages(name, &lora(1, 32), |_| {}),
        (Code::FailedPrecondition, "ADAPTER_INCOMPATIBLE"),
    )
    .await;
    let text = AdapterArtifact {
        config_json: b"{".to_vec(),
        ..good.clone()
    };
    check(
        messages(name, &text, |_| {}),
        (Code::InvalidArgument, "ARTIFACT_MALFORMED"),
    )
    .await;
    let headless = messages(name, &good, |_| {}).split_off(1);
    check(headless, (Code::InvalidArgument, "INVALID_FIELD")).await;
    check(vec![], (Code::InvalidArgument, "INVALID_FIELD")).await;
    let unknown = messages(name, &good, |m| m.create_if_missing = false);
    check(unknown, (Code::NotFound, "ADAPTER_NOT_FOUND")).await;
    let foreign = messages("tenants/globex/adapters/a", &good, |_| {});
    check(foreign, (Code::PermissionDenied, "PERMISSION_DENIED")).await;
    let hostile = messages("tenants/acme/adapters/../../etc", &good, |_| {});
    check(hostile, (Code::InvalidArgument, "INVALID_FIELD")).await;
}

#[tokio::test]
async fn another_tenants_resources_look_like_absent_ones() {
    let server = TestServer::start(&[]).await;
    let channel = server.channel().await;
    let acme = tenant(&channel, "acme").await;
    let globex = tenant(&channel, "globex").await;
    let mut owner = adapters(&channel, Some(&acme));
    let name = "tenants/acme/adapters/style";
    upload(&mut owner, messages(name, &lora(1, 64), |_| {}))
        .await
        .unwrap();
    let mut stranger = adapters(&channel, Some(&globex));
    let mut seen = Vec::new();
    for adapter in [name, "tenants/acme/adapters/nothing"] {
        let version = format!("{adapter}/versions/1");
        let get = v1::GetAdapterRequest {
            name: adapter.to_owned(),
        };
        seen.push(refused(stranger.get_adapter(get).await));
        let get = v1::GetAdapterVersionRequest {
            name: version.clone(),
        };
        seen.push(refused(stranger.get_adapter_version(get).await));
        seen.push(refused(download(&mut stranger, &version).await));
        let delete = v1::DeleteAdapterVersionRequest { name: version };
        seen.push(refused(stranger.delete_adapter_version(delete).await));
    }
    for (code, reason, message) in &seen {
        assert_eq!(
            (*code, reason.as_str()),
            (Code::PermissionDenied, "PERMISSION_DENIED")
        );
        assert_eq!(message, &seen[0].2);
    }
    let mut jobs = training(&channel, Some(&globex));
    let get = v1::GetTrainingJobRequest {
        name: "tenants/acme/trainingJobs/j".to_owned(),
    };
    assert_eq!(
        refused(jobs.get_training_job(get).await).0,
        Code::PermissionDenied
    );
    let list = tenants(&channel, Some(&globex))
        .list_tenants(v1::ListTenantsRequest::default())
        .await
        .unwrap()
        .into_inner();
    assert_eq!(
        list.tenants.len(),
        1,
        "a tenant's key sees its tenant alone"
    );
    let (code, _, _) = refused(
        tenants(&channel, Some(&globex))
            .create_api_key(v1::CreateApiKeyRequest {
                parent: "tenants/globex".to_owned(),
                api_key: None,
            })
            .await,
    );
    assert_eq!(code, Code::PermissionDenied);
}

fn rows() -> Vec<u8> {
    (0..24)
        .map(|n| {
            format!(
                "{{\"prompt\": \"question {n}?\", \"completion\": \"answer {}\"}}\n",
                n % 5
            )
        })
        .collect::<String>()
        .into_bytes()
}

fn job(adapter: &str, steps: u64) -> v1::CreateTrainingJobRequest {
    let data = v1::TrainingData {
        source: Some(v1::training_data::Source::Inline(v1::InlineData {
            format: v1::DataFormat::Jsonl.into(),
            content: rows(),
            ..Default::default()
        })),
    };
    v1::CreateTrainingJobRequest {
        parent: "tenants/acme".to_owned(),
        spec: Some(v1::TrainingSpec {
            adapter: adapter.to_owned(),
            method: Some(v1::training_spec::Method::Supervised(
                v1::SupervisedMethod::default(),
            )),
            data: Some(data),
            hyper_parameters: Some(v1::HyperParameters {
                epochs: Some(100.0),
                max_steps: Some(steps),
                batch_size: Some(4),
                checkpoint_every_steps: Some(5),
                ..Default::default()
            }),
            seed: Some(11),
            ..Default::default()
        }),
        request_id: format!("create-{}", adapter.len()),
        validate_only: false,
    }
}

async fn events(
    client: &mut TrainingServiceClient<Wire>,
    job: &str,
    until: impl Fn(&v1::TrainingEvent) -> bool,
) -> Vec<v1::TrainingEvent> {
    let request = v1::WatchTrainingJobRequest {
        name: job.to_owned(),
        from_sequence: 0,
    };
    let mut stream = client
        .watch_training_job(request)
        .await
        .unwrap()
        .into_inner();
    let mut events = Vec::new();
    while let Ok(Some(event)) = stream.message().await {
        events.push(event);
        if events.last().is_some_and(&until) {
            break;
        }
    }
    events
}

fn curve(events: &[v1::TrainingEvent]) -> Vec<(u64, f64)> {
    events
        .iter()
        .filter_map(|event| match &event.event {
            Some(v1::training_event::Event::Step(step)) => Some((step.step, step.loss)),
            _ => None,
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_job_killed_in_the_middle_ends_as_if_nothing_had_happened() {
    let data = tempfile::tempdir().unwrap();
    let flags = ["--model", TINY, "--kv-cache-bytes", "64MiB"];
    let daemon = Daemon::spawn(data.path(), &flags);
    let channel = connect(daemon.addr).await;
    let key = tenant(&channel, "acme").await;
    let kept = "tenants/acme/adapters/uploaded";
    let artifact = lora(3, 64);
    let mut client = adapters(&channel, Some(&key));
    upload(&mut client, messages(kept, &artifact, |_| {}))
        .await
        .unwrap();
    let mut jobs = training(&channel, Some(&key));
    let wanted = job("tenants/acme/adapters/a", 120);
    let made = jobs
        .create_training_job(wanted.clone())
        .await
        .unwrap()
        .into_inner()
        .job
        .unwrap();
    let before = events(&mut jobs, &made.name, |event| {
        matches!(&event.event, Some(v1::training_event::Event::Step(step)) if step.step >= 23)
    })
    .await;
    daemon.kill();
    let daemon = Daemon::spawn(data.path(), &flags);
    let channel = connect(daemon.addr).await;
    let mut jobs = training(&channel, Some(&key));
    // The retry of the create finds the job; what was shown before the crash is still the beginning of the story.
    let again = jobs
        .create_training_job(wanted)
        .await
        .unwrap()
        .into_inner()
        .job
        .unwrap();
    assert_eq!(again.name, made.name);
    let story = events(&mut jobs, &made.name, |_| false).await;
    assert_eq!(story[..before.len()], before[..]);
    let numbers: Vec<u64> = story.iter().map(|event| event.sequence).collect();
    assert_eq!(numbers, (1..=story.len() as u64).collect::<Vec<_>>());
    assert_eq!(
        story.last().unwrap().state(),
        v1::TrainingJobState::Succeeded
    );
    let whole = jobs
        .create_training_job(job("tenants/acme/adapters/bb", 120))
        .await
        .unwrap();
    let whole = whole.into_inner().job.unwrap();
    let uninterrupted = events(&mut jobs, &whole.name, |_| false).await;
    assert_eq!(curve(&story), curve(&uninterrupted));
    assert_eq!(curve(&story).len(), 120);
    let mut client = adapters(&channel, Some(&key));
    let (_, _, ours) = download(&mut client, "tenants/acme/adapters/a")
        .await
        .unwrap();
    let (_, _, theirs) = download(&mut client, "tenants/acme/adapters/bb")
        .await
        .unwrap();
    assert!(
        ours == theirs,
        "the resumed adapter differs from the uninterrupted one"
    );
    let (header, config, weights) = download(&mut client, kept).await.unwrap();
    assert_eq!(header.aliases, ["default"]);
    assert_eq!(
        (config, weights),
        (artifact.config_json, artifact.safetensors)
    );
    let job = jobs
        .get_training_job(v1::GetTrainingJobRequest { name: made.name })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(job.attempt, 2);
}

#[tokio::test]
async fn datasets_are_checked_line_by_line_and_shared_with_jobs() {
    let server = TestServer::start(&[]).await;
    let channel = server.channel().await;
    let key = tenant(&channel, "acme").await;
    let mut client = training(&channel, Some(&key));
    let send = |id: &str, text: &str, validate_only: bool| {
        use v1::upload_dataset_request::Payload;
        let metadata = v1::UploadDatasetMetadata {
            parent: "tenants/acme".to_owned(),
            dataset_id: id.to_owned(),
            format: v1::DataFormat::Csv.into(),
            size_bytes: text.len() as u64,
            sha256: hex::encode(Sha256::digest(text.as_bytes())),
            validate_only,
            ..Default::default()
        };
        let chunk = v1::DatasetChunk {
            offset: 0,
            data: text.as_bytes().to_vec(),
        };
        let payloads = [Payload::Metadata(metadata), Payload::Chunk(chunk)];
        tokio_stream::iter(payloads.map(|payload| v1::UploadDatasetRequest {
            payload: Some(payload),
        }))
    };
    let bad = "text,label\nfine,yes\n,no\nfine too,\n";
    let (code, reason, message) = refused(client.upload_dataset(send("d", bad, false)).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::InvalidArgument, "INVALID_FIELD")
    );
    assert!(
        message.contains("line 3") && message.contains("line 4"),
        "{message}"
    );
    let dry = client
        .upload_dataset(send("d", bad, true))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(dry.report.unwrap().problem_count, 2);
    let good: String = std::iter::once("text,label\n".to_owned())
        .chain((0..20).map(|n| format!("row {n},{}\n", ["a", "b"][n % 2])))
        .collect();
    let made = client
        .upload_dataset(send("d", &good, false))
        .await
        .unwrap()
        .into_inner()
        .dataset
        .unwrap();
    assert_eq!((made.rows, made.label_counts["b"]), (20, 10));
    let (_, reason, _) = refused(client.upload_dataset(send("d", &good, false)).await);
    assert_eq!(reason, "DATASET_EXISTS");
    let mut wanted = job("tenants/acme/adapters/c", 20);
    let spec = wanted.spec.as_mut().unwrap();
    spec.data = Some(v1::TrainingData {
        source: Some(v1::training_data::Source::Dataset(made.name.clone())),
    });
    spec.method = Some(v1::training_spec::Method::Classification(
        v1::ClassificationMethod {
            head_only: Some(true),
            ..Default::default()
        },
    ));
    spec.validation = Some(v1::training_spec::Validation::ValidationFraction(0.2));
    let started = client
        .create_training_job(wanted)
        .await
        .unwrap()
        .into_inner()
        .job
        .unwrap();
    let story = events(&mut client, &started.name, |_| false).await;
    let last = story.last().unwrap();
    assert_eq!(last.state(), v1::TrainingJobState::Succeeded, "{last:?}");
    let version = adapters(&channel, Some(&key))
        .get_adapter_version(v1::GetAdapterVersionRequest {
            name: "tenants/acme/adapters/c".to_owned(),
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(version.labels, ["a", "b"]);
    assert!(version.metrics.contains_key("accuracy"));
    let delete = v1::DeleteDatasetRequest { name: made.name };
    client.delete_dataset(delete.clone()).await.unwrap();
    assert_eq!(
        refused(client.delete_dataset(delete).await).1,
        "DATASET_NOT_FOUND"
    );
}
