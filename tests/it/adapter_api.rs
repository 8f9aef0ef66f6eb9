//! Adapters over a real socket on the tiny model: in and out byte for byte, aliases, what is refused and how, and that
//! adapters in memory change nothing for anybody but those who ask for them.

use std::collections::BTreeMap;
use std::path::Path;

use espalier_adapters::config::{LoraConfig, Site};
use espalier_adapters::version::AdapterArtifact;
use espalier_adapters::weights::{AdapterWeights, ScoreHead, SiteAdapter};
use espalier_adapters::{gguf, peft};
use espalier_client::{AdapterUpload, Client, Error, v1};
use espalier_tests::{TINY, TestServer};
use futures::future::join_all;
use sha2::{Digest, Sha256};
use tempfile::TempDir;
use tonic::Code;
use v1::upload_adapter_version_request::Payload;

use crate::client_side::{SERVICE_KEY, answer, client, greedy, register, tenant};

/// An adapter of its own for every seed: rank, sites and head differ, alpha is not the rank.
fn artifact(seed: u64) -> AdapterArtifact {
    let base = espalier_engine::model::load(TINY)
        .unwrap()
        .config
        .base_shape();
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut numbers = |count: usize| -> Vec<f32> {
        let mut next = || {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 24) as f32 * 0.6 - 0.3
        };
        (0..count).map(|_| next()).collect()
    };
    let rank = [3, 4, 6][seed as usize % 3];
    let sites: Vec<Site> = Site::ALL.into_iter().skip(seed as usize % 2).collect();
    let mut config = LoraConfig::new(rank, 2.5 * rank as f64, &sites);
    let mut weights = AdapterWeights::default();
    for layer in 0..base.layers {
        for &site in &sites {
            let (inputs, outputs) = base.dims(site);
            let adapter = SiteAdapter {
                r: rank,
                scale: 2.5,
                a: numbers(rank * inputs).into(),
                b: numbers(outputs * rank).into(),
                magnitude: None,
            };
            weights.sites.insert((layer, site), adapter);
        }
    }
    if seed % 3 == 2 {
        config = config.with_score_head();
        let labels = ["bug", "praise", "question"].map(str::to_owned).to_vec();
        let weight = numbers(labels.len() * base.hidden);
        weights.head = Some(ScoreHead {
            labels,
            weight,
            ..ScoreHead::default()
        });
    }
    peft::write(&config, &weights).unwrap()
}

fn directory(artifact: &AdapterArtifact) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    peft::to_dir(artifact, dir.path()).unwrap();
    dir
}

fn upload(client: &Client, adapter: &str, dir: &Path) -> AdapterUpload {
    AdapterUpload {
        adapter: client.names().adapter(adapter).unwrap(),
        dir: dir.to_owned(),
        create_if_missing: true,
        ..Default::default()
    }
}

/// Uploads the adapter of a seed.
pub(crate) async fn push(client: &Client, adapter: &str, seed: u64) -> v1::AdapterVersion {
    let dir = directory(&artifact(seed));
    let reply = client
        .upload_adapter(upload(client, adapter, dir.path()))
        .await;
    reply.unwrap().version.unwrap()
}

/// Two tenants of a server with a service key, each with a key of its own.
pub(crate) async fn two_tenants(server: &TestServer) -> (Client, Client) {
    let mut found = Vec::new();
    for name in ["acme", "globex"] {
        let admin = client(server.addr, name, Some(SERVICE_KEY)).await;
        register(&admin, name).await;
        let request = v1::CreateApiKeyRequest {
            parent: format!("tenants/{name}"),
            api_key: None,
        };
        let key = admin.create_api_key(request).await.unwrap().secret;
        found.push(client(server.addr, name, Some(&key)).await);
    }
    let globex = found.pop().unwrap();
    (found.pop().unwrap(), globex)
}

pub(crate) fn refused<T>(result: Result<T, Error>) -> Error {
    match result {
        Ok(_) => panic!("it was not refused"),
        Err(error) => error,
    }
}

/// What a refusal is to a program.
pub(crate) fn reason<T>(result: Result<T, Error>) -> (Code, String) {
    let error = refused(result);
    (error.code, error.reason.clone())
}

async fn adapters(client: &Client, page_size: i32, page_token: &str) -> v1::ListAdaptersResponse {
    let request = v1::ListAdaptersRequest {
        parent: client.names().parent().unwrap(),
        page_size,
        page_token: page_token.to_owned(),
    };
    client.list_adapters(request).await.unwrap()
}

async fn residency(client: &Client) -> v1::ListResidencyResponse {
    let request = v1::ListResidencyRequest {
        parent: client.names().parent().unwrap(),
        ..Default::default()
    };
    client.list_residency(request).await.unwrap()
}

#[tokio::test]
async fn what_goes_in_comes_out_byte_for_byte_and_survives_a_restart() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let mut before = Vec::new();
    for seed in 0..3 {
        let artifact = artifact(seed);
        let dir = directory(&artifact);
        let name = format!("a{seed}");
        let mut upload = upload(&acme, &name, dir.path());
        upload.profile = Some(v1::ServingProfile {
            prompt_template: Some("Q: {prompt} A:".to_owned()),
            ..Default::default()
        });
        let reply = acme.upload_adapter(upload).await.unwrap();
        assert!(reply.report.unwrap().accepted);
        let version = reply.version.unwrap();
        assert_eq!(
            version.name,
            format!("tenants/acme/adapters/a{seed}/versions/1")
        );
        assert_eq!(version.digest, artifact.digest().to_string());
        assert_eq!(version.size_bytes, artifact.bytes() as u64);
        assert_eq!(version.aliases, ["default"]);
        assert_eq!(version.labels.len(), if seed == 2 { 3 } else { 0 });
        assert_eq!(version.parts.len(), if seed == 2 { 3 } else { 2 });

        let out = tempfile::tempdir().unwrap();
        let downloaded = acme
            .download_adapter(&version.name, out.path())
            .await
            .unwrap();
        assert_eq!(downloaded, version);
        let limits = peft::Limits::default();
        let came = peft::from_dir(out.path(), &limits).unwrap();
        assert_eq!(came.config_json, artifact.config_json);
        assert_eq!(came.safetensors, artifact.safetensors);
        assert_eq!(came.labels_json, artifact.labels_json);
        let (text, by) = answer(&acme, Some(&name), "once upon", 16).await;
        assert_eq!(by, std::slice::from_ref(&version.name));
        before.push((name, version, text));
    }
    let (base, _) = answer(&acme, None, "once upon", 16).await;
    assert!(before.iter().all(|(_, _, text)| *text != base));
    let held = residency(&acme).await;
    assert_eq!(held.residency.len(), 3);
    for one in &held.residency {
        assert_eq!(one.level(), v1::ResidencyLevel::Resident);
        assert!(one.bytes > 0 && one.leases == 0 && one.error.is_empty());
    }
    assert!(held.used_bytes >= held.residency.iter().map(|one| one.bytes).sum());
    assert_eq!(held.budget_bytes, 64 << 20);

    drop(acme);
    let server = TestServer::start_in(server.ended().await, &[]).await;
    let acme = client(server.addr, "acme", None).await;
    assert!(residency(&acme).await.residency.is_empty());
    assert_eq!(adapters(&acme, 0, "").await.adapters.len(), 3);
    for (name, version, text) in before {
        assert_eq!(
            acme.get_adapter_version(&version.name).await.unwrap(),
            version
        );
        assert_eq!(answer(&acme, Some(&name), "once upon", 16).await.0, text);
    }
    server.ended().await;
}

#[tokio::test]
async fn aliases_move_together_or_not_at_all_and_hold_what_they_name() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let name = "tenants/acme/adapters/a";
    let (one, two) = (push(&acme, "a", 0).await, push(&acme, "a", 1).await);
    // An upload does not take the default from a version that has it.
    let adapter = acme.get_adapter(name).await.unwrap();
    assert_eq!((adapter.aliases.len(), adapter.latest_version), (1, 2));
    assert_eq!(adapter.aliases[0].version, one.name);
    let change = |set: &[(&str, &str)], remove: &[&str], etag: &str| v1::SetAdapterAliasesRequest {
        name: name.to_owned(),
        set: set
            .iter()
            .map(|(alias, version)| ((*alias).to_owned(), (*version).to_owned()))
            .collect::<BTreeMap<_, _>>(),
        remove: remove.iter().map(|alias| (*alias).to_owned()).collect(),
        etag: etag.to_owned(),
    };
    let moves = change(
        &[("canary", "1"), ("default", &two.name)],
        &[],
        &adapter.etag,
    );
    let moved = acme.set_adapter_aliases(moves.clone()).await.unwrap();
    let pairs: Vec<_> = moved
        .aliases
        .iter()
        .map(|one| (one.alias.as_str(), one.version.as_str()))
        .collect();
    assert_eq!(
        pairs,
        [
            ("canary", one.name.as_str()),
            ("default", two.name.as_str())
        ]
    );
    assert_eq!(
        reason(acme.set_adapter_aliases(moves).await),
        (Code::Aborted, "ETAG_MISMATCH".to_owned())
    );
    for (reference, version) in [("a@canary", &one), ("a", &two), ("a/1", &one)] {
        let (_, by) = answer(&acme, Some(reference), "x", 2).await;
        assert_eq!(by, std::slice::from_ref(&version.name), "{reference}");
    }
    // One of the two does not exist: neither moves.
    let half = change(&[("canary", "2"), ("beta", "9")], &[], "");
    assert_eq!(
        reason(acme.set_adapter_aliases(half).await).0,
        Code::NotFound
    );
    assert_eq!(acme.get_adapter(name).await.unwrap(), moved);
    let in_use = (Code::FailedPrecondition, "RESOURCE_IN_USE".to_owned());
    assert_eq!(reason(acme.delete_adapter_version(&one.name).await), in_use);
    let delete = |force| v1::DeleteAdapterRequest {
        name: name.to_owned(),
        force,
        ..Default::default()
    };
    assert_eq!(reason(acme.delete_adapter(delete(false)).await), in_use);
    acme.set_adapter_aliases(change(&[], &["canary"], ""))
        .await
        .unwrap();
    acme.delete_adapter_version(&one.name).await.unwrap();
    let request = greedy(&acme, Some("a/1"), "x", 1);
    assert_eq!(
        reason(acme.generate(request).await),
        (Code::NotFound, "ADAPTER_VERSION_NOT_FOUND".to_owned())
    );
    let request = greedy(&acme, Some("a@canary"), "x", 1);
    assert_eq!(
        reason(acme.generate(request).await),
        (Code::NotFound, "ADAPTER_ALIAS_NOT_FOUND".to_owned())
    );
    // A number is never given twice.
    assert_eq!(push(&acme, "a", 2).await.name, format!("{name}/versions/3"));
    acme.delete_adapter(delete(true)).await.unwrap();
    let request = greedy(&acme, Some("a"), "x", 1);
    assert_eq!(
        reason(acme.generate(request).await),
        (Code::NotFound, "ADAPTER_NOT_FOUND".to_owned())
    );
    server.ended().await;
}

/// The artifact with several things wrong at once.
fn broken() -> AdapterArtifact {
    let mut artifact = artifact(0);
    let file = safetensors::SafeTensors::deserialize(&artifact.safetensors).unwrap();
    let mut tensors: BTreeMap<String, (Vec<usize>, Vec<u8>)> = file
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, (view.shape().to_vec(), view.data().to_vec())))
        .collect();
    let names: Vec<String> = tensors.keys().cloned().collect();
    let nan = tensors.get_mut(&names[0]).unwrap();
    nan.1[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let shape = tensors.get_mut(&names[2]).unwrap();
    shape.0.reverse();
    let lost = tensors.remove(&names[5]).unwrap();
    tensors.insert(
        "base_model.model.model.embed_tokens.lora_A.weight".to_owned(),
        lost,
    );
    let views = tensors.iter().map(|(name, (shape, bytes))| {
        let dtype = safetensors::Dtype::F32;
        let view = safetensors::tensor::TensorView::new(dtype, shape.clone(), bytes).unwrap();
        (name.as_str(), view)
    });
    artifact.safetensors = safetensors::serialize(views, None).unwrap();
    artifact
}

#[tokio::test]
async fn a_dry_run_lists_every_finding_and_stores_nothing() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let (bad, good) = (directory(&broken()), directory(&artifact(0)));
    let mut dry = upload(&acme, "a", bad.path());
    dry.validate_only = true;
    let reply = acme.upload_adapter(dry).await.unwrap();
    let report = reply.report.unwrap();
    assert!(reply.version.is_none() && !report.accepted);
    let errors: Vec<_> = report
        .findings
        .iter()
        .filter(|finding| finding.severity() == v1::Severity::Error)
        .collect();
    for rule in ["not_finite", "shape", "missing_tensor"] {
        assert!(
            errors.iter().any(|one| one.rule == rule),
            "{rule}: {report:?}"
        );
    }
    assert!(
        errors
            .iter()
            .any(|one| one.subject.contains("embed_tokens")),
        "{report:?}"
    );
    assert!(errors.len() >= 4 && errors.iter().all(|one| !one.subject.is_empty()));
    let error = refused(acme.upload_adapter(upload(&acme, "a", bad.path())).await);
    assert_eq!(
        error.metadata["errors"],
        errors.len().to_string(),
        "{error}"
    );
    let mut dry = upload(&acme, "a", good.path());
    dry.validate_only = true;
    let reply = acme.upload_adapter(dry).await.unwrap();
    assert!(reply.report.unwrap().accepted);
    let would = reply.version.unwrap();
    assert!(would.name.is_empty() && would.digest == artifact(0).digest().to_string());
    assert!(adapters(&acme, 0, "").await.adapters.is_empty());
    server.ended().await;
}

/// An upload's messages, for a test to spoil: the metadata, then one chunk a file.
fn messages(artifact: &AdapterArtifact) -> Vec<Payload> {
    let files = [
        (v1::ArtifactPart::Config, &artifact.config_json),
        (v1::ArtifactPart::Weights, &artifact.safetensors),
    ];
    let info = |(part, bytes): &(v1::ArtifactPart, &Vec<u8>)| v1::ArtifactPartInfo {
        part: (*part).into(),
        size_bytes: bytes.len() as u64,
        sha256: hex::encode(Sha256::digest(bytes)),
    };
    let metadata = v1::UploadAdapterVersionMetadata {
        parent: "tenants/acme/adapters/a".to_owned(),
        parts: files.iter().map(info).collect(),
        create_if_missing: true,
        ..Default::default()
    };
    let chunk = |(part, bytes): (v1::ArtifactPart, &Vec<u8>)| {
        Payload::Chunk(v1::ArtifactChunk {
            part: part.into(),
            offset: 0,
            data: bytes.clone(),
        })
    };
    let mut all = vec![Payload::Metadata(metadata)];
    all.extend(files.map(chunk));
    all
}

async fn send(client: &Client, payloads: Vec<Payload>) -> (Code, String) {
    let mut stub = v1::adapter_service_client::AdapterServiceClient::new(client.channel());
    let message = |payload| v1::UploadAdapterVersionRequest {
        payload: Some(payload),
    };
    let stream = futures::stream::iter(payloads.into_iter().map(message).collect::<Vec<_>>());
    match stub.upload_adapter_version(stream).await {
        Ok(_) => (Code::Ok, String::new()),
        Err(status) => reason::<()>(Err(Error::from(status))),
    }
}

fn metadata(payloads: &mut [Payload]) -> &mut v1::UploadAdapterVersionMetadata {
    match &mut payloads[0] {
        Payload::Metadata(metadata) => metadata,
        Payload::Chunk(_) => panic!("the metadata comes first"),
    }
}

fn chunk(payloads: &mut [Payload], at: usize) -> &mut v1::ArtifactChunk {
    match &mut payloads[at] {
        Payload::Chunk(chunk) => chunk,
        Payload::Metadata(_) => panic!("chunks follow"),
    }
}

#[tokio::test]
async fn hostile_uploads_are_refused_by_name_and_leave_nothing() {
    let server = TestServer::start(&[("max_adapter_bytes", "256KiB")]).await;
    let acme = tenant(server.addr, "acme").await;
    type Spoil = fn(&mut Vec<Payload>);
    let cases: [(&str, Code, Spoil); 14] = [
        ("CHECKSUM_MISMATCH", Code::Aborted, |all| {
            chunk(all, 2).data[999] ^= 1
        }),
        ("CHECKSUM_MISMATCH", Code::Aborted, |all| {
            metadata(all).parts[0].sha256 = "0".repeat(64);
        }),
        // Shorter and longer than announced.
        ("CHECKSUM_MISMATCH", Code::Aborted, |all| {
            chunk(all, 2).data.truncate(2000)
        }),
        ("CHECKSUM_MISMATCH", Code::Aborted, |all| {
            chunk(all, 1).data.push(b' ')
        }),
        ("UPLOAD_OFFSET_MISMATCH", Code::Aborted, |all| {
            let whole = chunk(all, 2);
            let mut rest = whole.clone();
            rest.data = whole.data.split_off(100);
            rest.offset = 101;
            all.push(Payload::Chunk(rest));
        }),
        ("ARTIFACT_TOO_LARGE", Code::InvalidArgument, |all| {
            metadata(all).parts[1].size_bytes = (256 << 10) + 1;
        }),
        ("ARTIFACT_TOO_LARGE", Code::InvalidArgument, |all| {
            metadata(all).parts[0].size_bytes = u64::MAX;
            metadata(all).parts[1].size_bytes = u64::MAX;
        }),
        ("ARTIFACT_FORMAT_FORBIDDEN", Code::InvalidArgument, |all| {
            let mut pickle = b"PK\x03\x04".to_vec();
            pickle.extend([0; 96]);
            let info = &mut metadata(all).parts[1];
            info.size_bytes = pickle.len() as u64;
            info.sha256 = hex::encode(Sha256::digest(&pickle));
            chunk(all, 2).data = pickle;
        }),
        ("ARTIFACT_FORMAT_FORBIDDEN", Code::InvalidArgument, |all| {
            let pickle = b"\x80\x02}q\x00(X\x05\x00\x00\x00state".to_vec();
            let info = &mut metadata(all).parts[1];
            info.size_bytes = pickle.len() as u64;
            info.sha256 = hex::encode(Sha256::digest(&pickle));
            chunk(all, 2).data = pickle;
        }),
        ("INVALID_FIELD", Code::InvalidArgument, |all| {
            drop(all.remove(0))
        }),
        ("INVALID_FIELD", Code::InvalidArgument, |all| all.swap(1, 2)),
        ("INVALID_FIELD", Code::InvalidArgument, |all| {
            metadata(all).parts[1].part = 99
        }),
        ("INVALID_FIELD", Code::InvalidArgument, |all| {
            metadata(all).parts[1].part = v1::ArtifactPart::Gguf.into();
        }),
        ("ARTIFACT_MALFORMED", Code::InvalidArgument, |all| {
            metadata(all).parts.truncate(1);
        }),
    ];
    let good = artifact(0);
    assert!(good.bytes() < 256 << 10, "the limit is above the good one");
    for (at, (reason, code, spoil)) in cases.into_iter().enumerate() {
        let mut payloads = messages(&good);
        spoil(&mut payloads);
        assert_eq!(
            send(&acme, payloads).await,
            (code, reason.to_owned()),
            "case {at}"
        );
    }
    assert!(adapters(&acme, 0, "").await.adapters.is_empty());
    assert_eq!(send(&acme, messages(&good)).await.0, Code::Ok);
    server.ended().await;
}

#[tokio::test]
async fn another_tenant_cannot_tell_what_exists() {
    let server = TestServer::start(&[("service_key", SERVICE_KEY)]).await;
    let (acme, globex) = two_tenants(&server).await;
    push(&acme, "there", 0).await;
    let dir = directory(&artifact(1));
    let mut answers = Vec::new();
    for id in ["there", "nowhere"] {
        let name = format!("tenants/acme/adapters/{id}");
        let version = format!("{name}/versions/1");
        let out = tempfile::tempdir().unwrap();
        let versions = v1::ListAdapterVersionsRequest {
            parent: name.clone(),
            ..Default::default()
        };
        let delete = v1::DeleteAdapterRequest {
            name: name.clone(),
            force: true,
            ..Default::default()
        };
        let aim = |name: &str| greedy(&globex, Some(name), "x", 1);
        answers.push([
            refused(globex.get_adapter(&name).await),
            refused(globex.get_adapter_version(&version).await),
            refused(globex.get_adapter_version(&format!("{name}@default")).await),
            refused(globex.list_adapter_versions(versions).await),
            refused(globex.delete_adapter(delete).await),
            refused(globex.delete_adapter_version(&version).await),
            refused(globex.set_alias(&name, "mine", "1").await),
            refused(globex.download_adapter(&version, out.path()).await),
            refused(globex.generate(aim(&name)).await),
            refused(globex.generate(aim(&version)).await),
            refused(
                globex
                    .upload_adapter(upload(&globex, &name, dir.path()))
                    .await,
            ),
        ]);
    }
    for (there, nowhere) in answers[0].iter().zip(&answers[1]) {
        assert_eq!(
            (there.code, there.reason.as_str()),
            (Code::PermissionDenied, "PERMISSION_DENIED")
        );
        assert_eq!(
            (there.code, &there.reason, &there.message, &there.metadata),
            (
                nowhere.code,
                &nowhere.reason,
                &nowhere.message,
                &nowhere.metadata
            )
        );
        assert_eq!(there.field_violations, nowhere.field_violations);
    }
    // Its own list knows nothing of the neighbour's, in memory or on disk.
    answer(&acme, Some("there"), "x", 1).await;
    assert!(adapters(&globex, 0, "").await.adapters.is_empty());
    assert!(residency(&globex).await.residency.is_empty());
    assert_eq!(residency(&acme).await.residency.len(), 1);
    server.ended().await;
}

#[tokio::test]
async fn lists_are_paged_and_tokens_belong_to_their_list() {
    let server = TestServer::start(&[("max_page_size", "50")]).await;
    let acme = tenant(server.addr, "acme").await;
    for id in ["e", "b", "d", "a", "c"] {
        let request = v1::CreateAdapterRequest {
            parent: "tenants/acme".to_owned(),
            adapter_id: id.to_owned(),
            ..Default::default()
        };
        acme.create_adapter(request).await.unwrap();
    }
    let (mut found, mut token, mut pages) = (Vec::new(), String::new(), 0);
    loop {
        let page = adapters(&acme, 2, &token).await;
        found.extend(page.adapters.into_iter().map(|one| one.name));
        (token, pages) = (page.next_page_token, pages + 1);
        if token.is_empty() {
            break;
        }
        assert!(pages < 9, "the list does not end");
    }
    let short: Vec<_> = found
        .iter()
        .map(|name| espalier_client::names::short(name))
        .collect();
    assert_eq!((short, pages), (vec!["a", "b", "c", "d", "e"], 3));
    let token = adapters(&acme, 2, "").await.next_page_token;
    let field = |error: Error| error.field_violations[0].field.clone();
    let ask = async |page_size, page_token: &str| {
        let request = v1::ListAdaptersRequest {
            parent: "tenants/acme".to_owned(),
            page_size,
            page_token: page_token.to_owned(),
        };
        acme.list_adapters(request).await
    };
    assert_eq!(field(refused(ask(-1, "").await)), "page_size");
    assert_eq!(field(refused(ask(1, "rubbish").await)), "page_token");
    let datasets = v1::ListDatasetsRequest {
        parent: "tenants/acme".to_owned(),
        page_token: token,
        ..Default::default()
    };
    assert_eq!(
        field(refused(acme.list_datasets(datasets).await)),
        "page_token"
    );
    assert_eq!(ask(i32::MAX, "").await.unwrap().adapters.len(), 5);
    server.ended().await;
}

/// What must not depend on neighbours, bit for bit.
#[derive(Debug, PartialEq)]
struct Said {
    candidates: Vec<v1::Candidate>,
    vectors: Vec<Vec<u32>>,
}

async fn say(client: &Client, adapter: Option<&str>, prompt: &str) -> Said {
    let mut request = greedy(client, adapter, prompt, 12);
    request.logprobs = Some(v1::LogprobOptions { top: 2 });
    let sampling = request.sampling.as_mut().unwrap();
    (sampling.temperature, sampling.seed, sampling.n) = (Some(0.8), Some(5), Some(2));
    let embed = v1::EmbedRequest {
        target: Some(client.target(adapter).unwrap()),
        texts: vec![prompt.to_owned(), format!("{prompt} and more")],
        ..Default::default()
    };
    let (reply, vectors) = tokio::join!(client.generate(request), client.embed(embed));
    let bits = |one: v1::Embedding| one.values.iter().map(|value| value.to_bits()).collect();
    Said {
        candidates: reply.unwrap().candidates,
        vectors: vectors.unwrap().embeddings.into_iter().map(bits).collect(),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_mixed_batch_says_what_each_says_alone_and_the_base_is_untouched() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    for seed in 0..5 {
        push(&acme, &format!("a{seed}"), seed).await;
    }
    let asked: Vec<(Option<String>, String)> = (0..12)
        .map(|at| {
            let adapter = (at % 6 < 5).then(|| format!("a{}", at % 6));
            (adapter, format!("prompt {at} {}", "long ".repeat(at * 3)))
        })
        .collect();
    let mut alone = Vec::new();
    for (adapter, prompt) in &asked {
        alone.push(say(&acme, adapter.as_deref(), prompt).await);
    }
    let mixed = join_all(
        asked
            .iter()
            .map(|(adapter, prompt)| say(&acme, adapter.as_deref(), prompt)),
    );
    for ((said, alone), (adapter, _)) in mixed.await.iter().zip(&alone).zip(&asked) {
        assert_eq!(said, alone, "{adapter:?} in company");
    }
    let plain = TestServer::start(&[]).await;
    let nobody = tenant(plain.addr, "acme").await;
    for ((adapter, prompt), alone) in asked.iter().zip(&alone) {
        let base = say(&nobody, None, prompt).await;
        assert_eq!(base == *alone, adapter.is_none(), "{adapter:?}");
    }
    plain.ended().await;
    server.ended().await;
}

#[tokio::test]
async fn a_version_goes_out_as_one_file_for_llama_cpp_or_says_why_not() {
    let server = TestServer::start(&[("service_key", SERVICE_KEY)]).await;
    let (acme, globex) = two_tenants(&server).await;
    let version = push(&acme, "a", 1).await;
    let classifier = push(&acme, "b", 2).await;
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("a.gguf");
    let sent = acme.download_gguf("tenants/acme/adapters/a", &file).await;
    let sent = sent.unwrap();
    assert_eq!((&sent.name, &sent.digest), (&version.name, &version.digest));
    let bytes = std::fs::read(&file).unwrap();
    assert_eq!(sent.parts[0].size_bytes, bytes.len() as u64);
    let base = espalier_engine::model::load(TINY).unwrap().config;
    let limits = peft::Limits::default();
    let (config, weights, _) = peft::read(&artifact(1), &base.base_shape(), &limits).unwrap();
    let wanted = gguf::write_lora(&version.name, &config, &weights, &base.gguf_lora_base());
    assert!(bytes == wanted.unwrap(), "the file is not the library's");
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);

    let other = dir.path().join("b.gguf");
    let error = refused(acme.download_gguf(&classifier.name, &other).await);
    assert_eq!(
        (error.code, error.reason.as_str()),
        (Code::FailedPrecondition, "EXPORT_UNSUPPORTED")
    );
    assert!(error.message.contains("3 labels"), "{error}");
    assert!(!other.exists());
    let foreign = globex.download_gguf(&version.name, &other).await;
    assert_eq!(reason(foreign).0, Code::PermissionDenied);
    let unknown = v1::DownloadAdapterVersionRequest {
        name: version.name.clone(),
        format: 99,
    };
    let error = refused(acme.download_adapter_stream(unknown).await);
    assert!(error.message.contains("99 is no format"), "{error}");
    server.ended().await;
}
