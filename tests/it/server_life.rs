//! The server's own life: keys on every method, health, ids, drain, the binary and its configuration.

use std::time::Duration;

use espalier_proto::v1;
use espalier_tests::{Daemon, TestServer, connect, espalierd_command};
use http::uri::PathAndQuery;
use tokio_stream::StreamExt;
use tonic::transport::Channel;
use tonic::{Code, Request};
use tonic_health::pb::HealthCheckRequest;
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_prost::ProstCodec;

use crate::inference_api::{generate, inference, refused};

const KEY: &str = "0123456789abcdef0123456789abcdef";

/// Any method by its path, with an empty message.
async fn call(
    channel: Channel,
    path: &str,
    key: Option<&str>,
) -> Result<tonic::Response<()>, tonic::Status> {
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.unwrap();
    let mut request = Request::new(());
    if let Some(key) = key {
        request
            .metadata_mut()
            .insert("authorization", format!("Bearer {key}").parse().unwrap());
    }
    grpc.unary(
        request,
        PathAndQuery::try_from(path.to_owned()).unwrap(),
        ProstCodec::<(), ()>::default(),
    )
    .await
}

async fn serving(channel: Channel, service: &str) -> ServingStatus {
    let request = HealthCheckRequest {
        service: service.to_owned(),
    };
    HealthClient::new(channel)
        .check(request)
        .await
        .unwrap()
        .into_inner()
        .status()
}

#[tokio::test]
async fn every_method_of_the_contract_needs_a_key_once_one_exists() {
    let server = TestServer::start(&[("service_key", KEY)]).await;
    let channel = server.channel().await;
    let methods = espalier_server::method::contract();
    assert!(methods.len() > 20);
    let reflection = (
        "grpc.reflection.v1.ServerReflection".to_owned(),
        "ServerReflectionInfo".to_owned(),
    );
    for (service, method) in methods.into_iter().chain([
        reflection,
        ("no.such.Service".to_owned(), "Method".to_owned()),
    ]) {
        let path = format!("/{service}/{method}");
        let (code, reason, _) = refused(call(channel.clone(), &path, None).await);
        assert_eq!(
            (code, reason.as_str()),
            (Code::Unauthenticated, "CREDENTIALS_MISSING"),
            "{path}"
        );
        let (code, reason, _) = refused(call(channel.clone(), &path, Some("esp_wrong_key")).await);
        assert_eq!(
            (code, reason.as_str()),
            (Code::Unauthenticated, "CREDENTIALS_INVALID"),
            "{path}"
        );
    }
    assert!(
        call(
            channel.clone(),
            "/espalier.v1.ModelService/GetServerInfo",
            Some(KEY)
        )
        .await
        .is_ok()
    );
    assert_eq!(
        refused(call(channel.clone(), "/no.such.Service/Method", Some(KEY)).await).0,
        Code::Unimplemented
    );
    // Probes carry no keys.
    serving(channel, "").await;
    server.ended().await;
}

#[tokio::test]
async fn health_says_serving_when_warm_and_not_while_draining() {
    let mut server = TestServer::start(&[("lame_duck", "2s")]).await;
    let channel = server.channel().await;
    for service in [
        "",
        "espalier.v1.InferenceService",
        "espalier.v1.TrainingService",
    ] {
        let mut tries = 0;
        while serving(channel.clone(), service).await != ServingStatus::Serving {
            tries += 1;
            assert!(tries < 100, "{service} is not SERVING");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    server.begin_stop();
    let mut tries = 0;
    while serving(channel.clone(), "").await != ServingStatus::NotServing {
        tries += 1;
        assert!(tries < 50, "a draining server still says SERVING");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let mut client = v1::inference_service_client::InferenceServiceClient::new(channel);
    assert!(
        client.generate(generate("still here", 2)).await.is_ok(),
        "a lame duck still answers"
    );
    server.ended().await;
}

#[tokio::test]
async fn a_drain_lets_streams_finish_and_cuts_them_at_its_end() {
    let mut patient = TestServer::start(&[]).await;
    let mut client = inference(&patient).await;
    let mut stream = client
        .stream_generate(generate("finish me", 60))
        .await
        .unwrap()
        .into_inner();
    stream.next().await.unwrap().unwrap();
    patient.begin_stop();
    let mut ended = false;
    while let Some(chunk) = stream.next().await {
        ended = matches!(
            chunk.unwrap().event,
            Some(v1::generate_chunk::Event::Ended(_))
        );
    }
    assert!(ended, "the stream was cut although there was time");
    patient.ended().await;

    let mut hasty = TestServer::start(&[("drain_timeout", "0s")]).await;
    let mut client = inference(&hasty).await;
    let mut endless = generate("endless", 0);
    endless.stop = Some(v1::StopConditions {
        ignore_eos: Some(true),
        max_tokens: Some(450),
        ..Default::default()
    });
    endless.sampling = Some(v1::SamplingParams {
        n: Some(16),
        ..Default::default()
    });
    let mut stream = client.stream_generate(endless).await.unwrap().into_inner();
    stream.next().await.unwrap().unwrap();
    hasty.begin_stop();
    let mut last = None;
    while let Some(chunk) = stream.next().await {
        last = Some(chunk);
    }
    let (code, reason, _) = refused(last.unwrap());
    assert_eq!(
        (code, reason.as_str()),
        (Code::Unavailable, "SERVER_DRAINING")
    );
    hasty.ended().await;
}

#[tokio::test]
async fn the_request_id_comes_back_in_header_and_error() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    let mut request = Request::new(generate("x", 1));
    request
        .metadata_mut()
        .insert("x-request-id", "trace-me".parse().unwrap());
    let reply = client.generate(request).await.unwrap();
    assert_eq!(reply.metadata().get("x-request-id").unwrap(), "trace-me");
    assert_eq!(reply.into_inner().request_id, "trace-me");
    let mut wrong = Request::new(v1::GenerateRequest::default());
    wrong
        .metadata_mut()
        .insert("x-request-id", "trace-me-too".parse().unwrap());
    let status = client.generate(wrong).await.unwrap_err();
    let details = tonic_types::StatusExt::get_error_details(&status);
    assert_eq!(details.request_info().unwrap().request_id, "trace-me-too");
    server.ended().await;
}

#[tokio::test]
async fn the_model_says_what_it_can_and_where_its_limits_are() {
    let server = TestServer::start(&[("max_inputs", "5")]).await;
    let mut client = v1::model_service_client::ModelServiceClient::new(server.channel().await);
    let model = client
        .list_models(v1::ListModelsRequest::default())
        .await
        .unwrap()
        .into_inner()
        .models
        .remove(0);
    assert_eq!(
        (model.digest.len(), model.limits.unwrap().max_inputs),
        (64, 5)
    );
    assert!(model.capabilities.contains(&v1::Capability::Train.into()) && model.parameters > 0);
    let same = client
        .get_model(v1::GetModelRequest {
            name: model.name.clone(),
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(same, model);
    let unknown = v1::GetModelRequest {
        name: "models/other".to_owned(),
    };
    assert_eq!(refused(client.get_model(unknown).await).0, Code::NotFound);
    let info = client
        .get_server_info(v1::GetServerInfoRequest {})
        .await
        .unwrap()
        .into_inner();
    assert_eq!(info.state(), v1::ServerState::Serving);
    assert!(!info.authentication_required && info.base_model == model.name);
    server.ended().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_binary_starts_answers_and_stops_on_sigterm() {
    let data = tempfile::tempdir().unwrap();
    let daemon = Daemon::spawn(
        data.path(),
        &["--model", espalier_tests::TINY, "--kv-cache-bytes", "16MiB"],
    );
    let mut client =
        v1::inference_service_client::InferenceServiceClient::new(connect(daemon.addr).await);
    assert!(client.generate(generate("hello", 3)).await.is_ok());
    drop(client);
    let stopped = tokio::task::spawn_blocking(|| daemon.terminate())
        .await
        .unwrap();
    assert!(stopped, "SIGTERM ends with success");
    assert!(
        !data.path().join("ready").exists(),
        "the ready file is gone"
    );
}

#[test]
fn the_binary_prints_its_configuration_and_refuses_what_it_cannot_use() {
    let run = |args: &[&str], env: &[(&str, &str)]| {
        let output = espalierd_command()
            .args(args)
            .envs(env.iter().copied())
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8_lossy(bytes).into_owned();
        (
            output.status.success(),
            text(&output.stdout),
            text(&output.stderr),
        )
    };
    let (ok, printed, _) = run(
        &["config", "--max-inputs", "9"],
        &[("ESPALIER_MAX_LABELS", "8"), ("ESPALIER_SERVICE_KEY", KEY)],
    );
    assert!(
        ok && printed.contains("max_inputs = 9  # flag --max-inputs"),
        "{printed}"
    );
    assert!(
        printed.contains("max_labels = 8  # environment ESPALIER_MAX_LABELS")
            && !printed.contains(KEY)
    );
    let (ok, _, error) = run(&["--model", "tiny:1", "--max-candidates", "0"], &[]);
    assert!(
        !ok && error.contains("max_candidates: 0") && error.contains("1 to 128"),
        "{error}"
    );
    let (ok, _, error) = run(&[], &[]);
    assert!(!ok && error.contains("--model"), "{error}");
    let data = tempfile::tempdir().unwrap();
    let path = data.path().to_str().unwrap();
    let (ok, _, error) = run(
        &[
            "--model",
            "tiny:1",
            "--listen",
            "0.0.0.0:0",
            "--metrics-listen",
            "off",
            "--data-dir",
            path,
        ],
        &[],
    );
    assert!(
        !ok && error.contains("no API key") && error.contains("service_key_file"),
        "{error}"
    );
}
