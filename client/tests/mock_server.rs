//! The client against a server that misbehaves on purpose: busy, slow, gone in the middle,
//! sending wrong bytes. Real sockets, no model.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::Path,
    pin::Pin,
    process::{Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use espalier_client::{AdapterUpload, Client, ClientConfig, Error, Timeouts, v1};
use futures::{Stream, StreamExt, stream};
use sha2::{Digest, Sha256};
use tonic::{Code, Request, Response, Status, Streaming, transport::Server};
use tonic_types::{ErrorDetails, StatusExt};
use v1::{
    adapter_service_server::{AdapterService, AdapterServiceServer},
    download_adapter_version_response::Payload as Download,
    model_service_server::{ModelService, ModelServiceServer},
    training_event::Event,
    training_service_server::{TrainingService, TrainingServiceServer},
    upload_adapter_version_request::Payload as Upload,
};

type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// What the server has seen, and how it is to behave.
#[derive(Default)]
struct Script {
    /// Calls that are answered with UNAVAILABLE before one succeeds.
    busy: u32,
    /// What busy answers ask to wait.
    retry_after: Option<Duration>,
    /// In place of success.
    refuse: Option<Code>,
    /// Before the answer.
    delay: Duration,
    /// Wrong bytes in downloads.
    corrupt: bool,
    calls: u32,
    headers: Vec<(Option<String>, Option<String>)>,
    request_ids: Vec<String>,
    uploaded: Vec<(i32, u64, Vec<u8>)>,
    watched_from: Vec<u64>,
}

#[derive(Clone, Default)]
struct Mock(Arc<Mutex<Script>>);

impl Mock {
    fn with(change: impl FnOnce(&mut Script)) -> Self {
        let mock = Self::default();
        change(&mut mock.0.lock().unwrap());
        mock
    }

    fn see<T>(&self, request: &Request<T>) -> Result<(), Status> {
        let mut script = self.0.lock().unwrap();
        script.calls += 1;
        let get = |key: &str| Some(request.metadata().get(key)?.to_str().unwrap().to_owned());
        let found = (get("authorization"), get("grpc-timeout"));
        script.headers.push(found);
        if script.busy > 0 {
            script.busy -= 1;
            let mut details = ErrorDetails::new();
            details.set_error_info(
                "SERVER_OVERLOADED",
                "espalier.v1",
                HashMap::from([("queue".to_owned(), "9".to_owned())]),
            );
            if let Some(wait) = script.retry_after {
                details.set_retry_info(Some(wait));
            }
            return Err(Status::with_error_details(
                Code::Unavailable,
                "full",
                details,
            ));
        }
        script
            .refuse
            .map_or(Ok(()), |code| Err(Status::new(code, "refused")))
    }

    async fn start(&self) -> SocketAddr {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
        let server = Server::builder()
            .add_service(ModelServiceServer::new(self.clone()))
            .add_service(AdapterServiceServer::new(self.clone()))
            .add_service(TrainingServiceServer::new(self.clone()));
        tokio::spawn(server.serve_with_incoming(incoming));
        address
    }

    async fn client(&self) -> Client {
        let mut config = ClientConfig::new(self.start().await.to_string());
        config.api_key = Some("esp_k_secret".to_owned());
        config.tenant = Some("acme".to_owned());
        config.timeouts.control = Duration::from_secs(10);
        Client::connect(config).await.unwrap()
    }
}

/// A service whose other calls nobody makes here.
macro_rules! service {
    ($service:ident { $($body:tt)* } unused { $($name:ident($request:ty) -> $reply:ty;)* }) => {
        #[tonic::async_trait]
        impl $service for Mock {
            $($body)*
            $(async fn $name(&self, _: Request<$request>) -> Result<Response<$reply>, Status> {
                Err(Status::unimplemented(stringify!($name)))
            })*
        }
    };
}

service!(ModelService {
    async fn get_server_info(
        &self,
        request: Request<v1::GetServerInfoRequest>,
    ) -> Result<Response<v1::ServerInfo>, Status> {
        self.see(&request)?;
        let delay = self.0.lock().unwrap().delay;
        tokio::time::sleep(delay).await;
        Ok(Response::new(v1::ServerInfo { version: "9.9".to_owned(), ..Default::default() }))
    }

    async fn list_models(
        &self,
        _: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        Ok(Response::new(v1::ListModelsResponse::default()))
    }
} unused {
    get_model(v1::GetModelRequest) -> v1::Model;
});

service!(AdapterService {
    type DownloadAdapterVersionStream = Replies<v1::DownloadAdapterVersionResponse>;

    async fn upload_adapter_version(
        &self,
        request: Request<Streaming<v1::UploadAdapterVersionRequest>>,
    ) -> Result<Response<v1::UploadAdapterVersionResponse>, Status> {
        let verdict = self.see(&request);
        let mut messages = request.into_inner();
        let Some(Upload::Metadata(metadata)) = messages.message().await?.unwrap().payload else {
            return Err(Status::invalid_argument("metadata first"));
        };
        self.0.lock().unwrap().request_ids.push(metadata.request_id.clone());
        // Refused after the first message, while the client is still sending.
        verdict?;
        while let Some(message) = messages.message().await? {
            let Some(Upload::Chunk(chunk)) = message.payload else {
                return Err(Status::invalid_argument("metadata twice"));
            };
            assert!(chunk.data.len() <= 1 << 20);
            let item = (chunk.part, chunk.offset, chunk.data);
            self.0.lock().unwrap().uploaded.push(item);
        }
        let version = v1::AdapterVersion {
            name: format!("{}/versions/1", metadata.parent),
            parts: metadata.parts,
            ..Default::default()
        };
        Ok(Response::new(v1::UploadAdapterVersionResponse { version: Some(version), report: None }))
    }

    async fn download_adapter_version(
        &self,
        request: Request<v1::DownloadAdapterVersionRequest>,
    ) -> Result<Response<Self::DownloadAdapterVersionStream>, Status> {
        self.see(&request)?;
        let (mut messages, files) = (Vec::new(), files());
        let info = |(part, bytes): &(v1::ArtifactPart, Vec<u8>)| v1::ArtifactPartInfo {
            part: (*part).into(),
            size_bytes: bytes.len() as u64,
            sha256: hex::encode(Sha256::digest(bytes)),
        };
        let version = v1::AdapterVersion {
            name: request.get_ref().name.clone(),
            parts: files.iter().map(info).collect(),
            ..Default::default()
        };
        messages.push(Download::Version(version));
        for (part, mut bytes) in files {
            if self.0.lock().unwrap().corrupt && part == v1::ArtifactPart::Weights {
                bytes[100] ^= 1;
            }
            for (at, piece) in bytes.chunks(100_000).enumerate() {
                messages.push(Download::Chunk(v1::ArtifactChunk {
                    part: part.into(),
                    offset: at as u64 * 100_000,
                    data: piece.to_vec(),
                }));
            }
        }
        let reply = |payload| Ok(v1::DownloadAdapterVersionResponse { payload: Some(payload) });
        Ok(Response::new(stream::iter(messages).map(reply).boxed()))
    }

    async fn set_adapter_aliases(
        &self,
        request: Request<v1::SetAdapterAliasesRequest>,
    ) -> Result<Response<v1::Adapter>, Status> {
        self.see(&request)?;
        Ok(Response::new(v1::Adapter::default()))
    }

    async fn delete_adapter(
        &self,
        request: Request<v1::DeleteAdapterRequest>,
    ) -> Result<Response<()>, Status> {
        self.see(&request)?;
        Ok(Response::new(()))
    }
} unused {
    create_adapter(v1::CreateAdapterRequest) -> v1::Adapter;
    get_adapter(v1::GetAdapterRequest) -> v1::Adapter;
    list_adapters(v1::ListAdaptersRequest) -> v1::ListAdaptersResponse;
    get_adapter_version(v1::GetAdapterVersionRequest) -> v1::AdapterVersion;
    list_adapter_versions(v1::ListAdapterVersionsRequest) -> v1::ListAdapterVersionsResponse;
    delete_adapter_version(v1::DeleteAdapterVersionRequest) -> ();
    combine_adapters(v1::CombineAdaptersRequest) -> v1::AdapterVersion;
    list_residency(v1::ListResidencyRequest) -> v1::ListResidencyResponse;
    get_residency(v1::GetResidencyRequest) -> v1::AdapterResidency;
    warm_adapter_version(v1::WarmAdapterVersionRequest) -> v1::AdapterResidency;
    pin_adapter_version(v1::PinAdapterVersionRequest) -> v1::AdapterResidency;
    unpin_adapter_version(v1::UnpinAdapterVersionRequest) -> v1::AdapterResidency;
    set_merge_policy(v1::SetMergePolicyRequest) -> v1::AdapterVersion;
});

service!(TrainingService {
    type WatchTrainingJobStream = Replies<v1::TrainingEvent>;

    /// Breaks after each second event; what it resumes with overlaps and is mixed with heartbeats.
    async fn watch_training_job(
        &self,
        request: Request<v1::WatchTrainingJobRequest>,
    ) -> Result<Response<Self::WatchTrainingJobStream>, Status> {
        let from = request.get_ref().from_sequence;
        self.0.lock().unwrap().watched_from.push(from);
        let beat = v1::TrainingEvent {
            sequence: from.saturating_sub(1),
            event: Some(Event::Heartbeat(v1::WatchHeartbeat {})),
            ..Default::default()
        };
        let mut replies = vec![Ok(beat)];
        for sequence in from.saturating_sub(1).max(1)..=(from + 2).min(7) {
            let state = match sequence {
                7 => v1::TrainingJobState::Succeeded,
                _ => v1::TrainingJobState::Running,
            };
            replies.push(Ok(v1::TrainingEvent {
                sequence,
                state: state.into(),
                event: Some(Event::Step(v1::StepReport::default())),
                ..Default::default()
            }));
        }
        if from + 2 < 7 {
            replies.push(Err(Status::unavailable("going away")));
        }
        Ok(Response::new(stream::iter(replies).boxed()))
    }
} unused {
    create_training_job(v1::CreateTrainingJobRequest) -> v1::CreateTrainingJobResponse;
    get_training_job(v1::GetTrainingJobRequest) -> v1::TrainingJob;
    list_training_jobs(v1::ListTrainingJobsRequest) -> v1::ListTrainingJobsResponse;
    cancel_training_job(v1::CancelTrainingJobRequest) -> v1::TrainingJob;
    pause_training_job(v1::PauseTrainingJobRequest) -> v1::TrainingJob;
    resume_training_job(v1::ResumeTrainingJobRequest) -> v1::TrainingJob;
    upload_dataset(Streaming<v1::UploadDatasetRequest>) -> v1::UploadDatasetResponse;
    get_dataset(v1::GetDatasetRequest) -> v1::Dataset;
    list_datasets(v1::ListDatasetsRequest) -> v1::ListDatasetsResponse;
    delete_dataset(v1::DeleteDatasetRequest) -> ();
});

/// An adapter's files; the weights need several chunks.
fn files() -> Vec<(v1::ArtifactPart, Vec<u8>)> {
    let weights = (0..1_300_003_u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8);
    vec![
        (
            v1::ArtifactPart::Config,
            br#"{"peft_type": "LORA"}"#.to_vec(),
        ),
        (v1::ArtifactPart::Weights, weights.collect()),
        (v1::ArtifactPart::Labels, br#"["a","b"]"#.to_vec()),
    ]
}

fn write_files(dir: &Path) {
    for (part, bytes) in files() {
        std::fs::write(dir.join(espalier_client::transfer::file_name(part)), bytes).unwrap();
    }
}

#[tokio::test]
async fn a_busy_server_is_asked_again_after_the_wait_it_names() {
    let mock = Mock::with(|script| {
        script.busy = 2;
        script.retry_after = Some(Duration::from_millis(300));
    });
    let client = mock.client().await;
    let begin = Instant::now();
    let info = client.server_info().await.unwrap();
    assert_eq!(info.version, "9.9");
    // Its own waits would have been 0.1 s and 0.2 s.
    assert!(
        begin.elapsed() >= Duration::from_millis(600),
        "{:?}",
        begin.elapsed()
    );
    let script = mock.0.lock().unwrap();
    assert_eq!(script.calls, 3);
    for (authorization, timeout) in &script.headers {
        assert_eq!(authorization.as_deref(), Some("Bearer esp_k_secret"));
        assert!(timeout.is_some());
    }
}

#[tokio::test]
async fn a_server_that_stays_busy_is_given_up() {
    let mock = Mock::with(|script| script.busy = 100);
    let error = mock.client().await.server_info().await.unwrap_err();
    assert_eq!((error.code, error.attempts), (Code::Unavailable, 4));
    assert_eq!(error.reason, "SERVER_OVERLOADED");
    assert_eq!(error.metadata["queue"], "9");
    assert_eq!(mock.0.lock().unwrap().calls, 4);
}

#[tokio::test]
async fn other_codes_are_not_retried() {
    for code in [
        Code::Internal,
        Code::ResourceExhausted,
        Code::Aborted,
        Code::NotFound,
    ] {
        let mock = Mock::with(|script| script.refuse = Some(code));
        let error = mock.client().await.server_info().await.unwrap_err();
        assert_eq!((error.code, error.attempts), (code, 1));
        assert_eq!(mock.0.lock().unwrap().calls, 1);
    }
}

#[tokio::test]
async fn a_call_that_must_not_happen_twice_is_made_once() {
    let mock = Mock::with(|script| script.busy = 1);
    let client = mock.client().await;
    let request = v1::SetAdapterAliasesRequest {
        etag: "e1".to_owned(),
        ..Default::default()
    };
    let error = client.set_adapter_aliases(request).await.unwrap_err();
    assert_eq!((error.code, error.attempts), (Code::Unavailable, 1));
}

#[tokio::test]
async fn what_an_earlier_attempt_deleted_counts_as_deleted() {
    let mock = Mock::with(|script| {
        script.busy = 1;
        script.refuse = Some(Code::NotFound);
    });
    let client = mock.client().await;
    client
        .delete_adapter(v1::DeleteAdapterRequest::default())
        .await
        .unwrap();
    let error = client
        .delete_adapter(v1::DeleteAdapterRequest::default())
        .await
        .unwrap_err();
    assert_eq!(
        error.code,
        Code::NotFound,
        "the first attempt found nothing"
    );
}

#[tokio::test]
async fn a_slow_call_ends_at_its_deadline() {
    let mock = Mock::with(|script| script.delay = Duration::from_secs(30));
    let mut config = ClientConfig::new(format!("http://{}", mock.start().await));
    config.timeouts = Timeouts::all(Duration::from_millis(200));
    let client = Client::connect(config).await.unwrap();
    let begin = Instant::now();
    let error = client.server_info().await.unwrap_err();
    assert_eq!(
        (error.code, error.reason.as_str()),
        (Code::DeadlineExceeded, "CLIENT_DEADLINE")
    );
    assert!(begin.elapsed() < Duration::from_secs(5));
}

#[tokio::test]
async fn an_upload_is_whole_in_order_and_the_same_after_a_retry() {
    let dir = tempfile::tempdir().unwrap();
    write_files(dir.path());
    let mock = Mock::with(|script| script.busy = 1);
    let client = mock.client().await;
    let upload = AdapterUpload {
        adapter: client.names().adapter("tickets").unwrap(),
        dir: dir.path().to_owned(),
        ..Default::default()
    };
    let reply = client.upload_adapter(upload).await.unwrap();
    let version = reply.version.unwrap();
    assert_eq!(version.name, "tenants/acme/adapters/tickets/versions/1");
    let script = mock.0.lock().unwrap();
    assert_eq!(script.calls, 2);
    assert_eq!(script.request_ids[0], script.request_ids[1]);
    assert!(!script.request_ids[0].is_empty());
    let mut found: Vec<(i32, Vec<u8>)> = Vec::new();
    for (part, offset, data) in &script.uploaded {
        if found.last().is_none_or(|last| last.0 != *part) {
            found.push((*part, Vec::new()));
        }
        let bytes = &mut found.last_mut().unwrap().1;
        assert_eq!(*offset, bytes.len() as u64);
        bytes.extend_from_slice(data);
    }
    assert!(script.uploaded.len() > 3, "the weights came in one piece");
    let expected = files();
    assert_eq!(found.len(), expected.len());
    for ((part, bytes), (info, (expected_part, expected_bytes))) in
        found.iter().zip(version.parts.iter().zip(&expected))
    {
        assert_eq!(*part, i32::from(*expected_part));
        assert!(bytes == expected_bytes);
        assert_eq!(info.size_bytes, bytes.len() as u64);
        assert_eq!(info.sha256, hex::encode(Sha256::digest(bytes)));
    }
}

#[tokio::test]
async fn a_download_takes_its_name_only_when_its_checksum_is_right() {
    let dir = tempfile::tempdir().unwrap();
    let client = Mock::default().client().await;
    let name = "tenants/acme/adapters/tickets";
    client.download_adapter(name, dir.path()).await.unwrap();
    for (part, bytes) in files() {
        let path = dir.path().join(espalier_client::transfer::file_name(part));
        assert!(std::fs::read(path).unwrap() == bytes);
    }
    assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);

    let broken = tempfile::tempdir().unwrap();
    let client = Mock::with(|script| script.corrupt = true).client().await;
    let error = client
        .download_adapter(name, broken.path())
        .await
        .unwrap_err();
    assert_eq!(error.code, Code::DataLoss);
    assert!(
        error.message.contains("adapter_model.safetensors"),
        "{error}"
    );
    assert!(!broken.path().join("adapter_model.safetensors").exists());
}

#[tokio::test]
async fn a_watch_is_taken_up_where_it_broke() {
    let mock = Mock::default();
    let client = mock.client().await;
    let events = client
        .watch_training_job("tenants/acme/trainingJobs/j", 0)
        .await
        .unwrap();
    let events: Vec<Result<v1::TrainingEvent, Error>> = events.collect().await;
    let numbers: Vec<u64> = events
        .into_iter()
        .map(|event| event.unwrap().sequence)
        .collect();
    assert_eq!(numbers, [1, 2, 3, 4, 5, 6, 7]);
    let from = mock.0.lock().unwrap().watched_from.clone();
    assert_eq!(from, [0, 3, 6]);
}

/// The command with arguments and a clean environment.
fn espalier(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_espalier"));
    command.args(arguments);
    for variable in ["ESPALIER_SERVER", "ESPALIER_API_KEY", "ESPALIER_TENANT"] {
        command.env_remove(variable);
    }
    command
}

#[test]
fn a_server_that_is_not_there_is_an_error_with_a_next_step() {
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let server = format!("http://127.0.0.1:{port}");
    let output = espalier(&["status", "--server", &server]).output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    assert!(output.stdout.is_empty());
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains(&server) && text.contains("next: "), "{text}");

    let output = espalier(&["status", "--json", "--server", &server])
        .output()
        .unwrap();
    let error: serde_json::Value = serde_json::from_slice(&output.stderr).unwrap();
    assert_eq!(error["error"]["code"], "UNAVAILABLE");
    assert_eq!(error["error"]["reason"], "CLIENT_CONNECT");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_closed_pipe_ends_a_command_quietly() {
    let server = Mock::default().start().await.to_string();
    let run = move || {
        let mut child = espalier(&["status", "--server", &server])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        drop(child.stdout.take());
        child.wait_with_output().unwrap()
    };
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(0), "{text}");
    assert!(text.is_empty(), "{text}");
}

#[tokio::test(flavor = "multi_thread")]
async fn results_are_json_when_asked() {
    let server = Mock::default().start().await.to_string();
    let run = move || {
        espalier(&["status", "--json", "--server", &server])
            .output()
            .unwrap()
    };
    let output = tokio::task::spawn_blocking(run).await.unwrap();
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["server"]["version"], "9.9");
    assert!(output.status.success() && output.stderr.is_empty());
}
