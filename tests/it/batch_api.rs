//! Batch streams over a real socket: every item once and as its single call would answer, whatever its neighbours do;
//! window, priority, cancel, drain and a tenant's places.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use espalier_proto::v1::batch_classify_response as classified;
use espalier_proto::v1::batch_generate_response::Result as Answer;
use espalier_proto::{rpc, v1};
use espalier_tests::TestServer;
use prost::Message;
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;

use crate::adapter_api::two_tenants;
use crate::client_side::SERVICE_KEY;
use crate::inference_api::{Inference, generate, idle, inference, refused};

type Replies = Streaming<v1::BatchGenerateResponse>;

fn item(key: &str, request: v1::GenerateRequest) -> v1::BatchGenerateRequest {
    v1::BatchGenerateRequest {
        key: key.to_owned(),
        request: Some(request),
    }
}

/// Opens a stream that stays open until the sender is dropped.
async fn open(client: &mut Inference) -> (mpsc::Sender<v1::BatchGenerateRequest>, Replies) {
    let (sender, receiver) = mpsc::channel(1000);
    let replies = client.batch_generate(ReceiverStream::new(receiver)).await;
    (sender, replies.unwrap().into_inner())
}

/// An item's error as the status of a single call.
fn status(error: rpc::Status) -> Status {
    Status::with_details(
        Code::from_i32(error.code),
        error.message.clone(),
        error.encode_to_vec().into(),
    )
}

/// What both sides say of a failure, without the request's id.
fn said(status: &Status) -> (Code, String, String, BTreeMap<String, String>) {
    let info = status.get_error_details().error_info().unwrap().clone();
    let metadata = info.metadata.into_iter().collect();
    (
        status.code(),
        status.message().to_owned(),
        info.reason,
        metadata,
    )
}

#[tokio::test]
async fn every_item_is_answered_as_its_single_call_would_be() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    let mut requests = BTreeMap::new();
    for index in 0..24_u32 {
        let request = generate(&format!("item {index} of many"), 1 + index % 7);
        requests.insert(format!("good-{index}"), request);
    }
    let mut hot = generate("x", 2);
    hot.sampling.as_mut().unwrap().temperature = Some(-1.0);
    requests.insert("bad-field".to_owned(), hot);
    requests.insert("too-long".to_owned(), generate(&"long ".repeat(4000), 1));
    let mut stranger = generate("x", 2);
    stranger.target = Some(v1::InferenceTarget {
        adapters: vec![v1::AdapterWeight {
            adapter: "tenants/nobody/adapters/none".to_owned(),
            weight: None,
        }],
        ..Default::default()
    });
    requests.insert("unknown-adapter".to_owned(), stranger);

    let (sender, mut replies) = open(&mut client).await;
    for (key, request) in &requests {
        sender.send(item(key, request.clone())).await.unwrap();
    }
    drop(sender);
    let mut answers = BTreeMap::new();
    while let Some(reply) = replies.next().await {
        let reply = reply.unwrap();
        let before = answers.insert(reply.key.clone(), reply.result.unwrap());
        assert!(before.is_none(), "{} was answered twice", reply.key);
    }
    assert_eq!(answers.len(), requests.len());
    for (key, request) in requests {
        match (
            answers.remove(&key).unwrap(),
            client.generate(request).await,
        ) {
            (Answer::Response(batch), Ok(alone)) => {
                let alone = alone.into_inner();
                assert_eq!(batch.candidates, alone.candidates, "{key}");
                assert_eq!(batch.effective, alone.effective);
                assert!(key.starts_with("good"));
            }
            (Answer::Error(error), Err(alone)) => {
                let found = status(error);
                assert_eq!(said(&found), said(&alone), "{key}");
                let details = found.get_error_details();
                assert!(details.request_info().unwrap().request_id.contains('.'));
            }
            (batch, alone) => panic!("{key}: {batch:?} in the batch, {alone:?} alone"),
        }
    }
    server.ended().await;
}

#[tokio::test]
async fn keys_are_unique_and_items_whole() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    let (sender, mut replies) = open(&mut client).await;
    let long = "ü".repeat(100);
    for key in ["a", "a", "", long.as_str()] {
        sender.send(item(key, generate("x", 1))).await.unwrap();
    }
    let empty = v1::BatchGenerateRequest {
        key: "empty".to_owned(),
        request: None,
    };
    sender.send(empty).await.unwrap();
    drop(sender);
    let mut seen = Vec::new();
    while let Some(reply) = replies.next().await {
        let reply = reply.unwrap();
        seen.push(match reply.result.unwrap() {
            Answer::Response(_) => (reply.key, None),
            Answer::Error(error) => (reply.key, Some(error.message)),
        });
    }
    seen.sort();
    let cut = "ü".repeat(64);
    let expected = [
        (
            "",
            Some("key: is missing; it names the item in the replies"),
        ),
        ("a", None),
        ("a", Some("key: \"a\" was used before in this stream")),
        (
            "empty",
            Some("request: is missing; every item has a key and a request"),
        ),
        (cut.as_str(), Some("key: 200 bytes, the limit is 128 bytes")),
    ];
    let expected: Vec<_> = expected
        .into_iter()
        .map(|(key, why)| (key.to_owned(), why.map(str::to_owned)))
        .collect();
    assert_eq!(seen, expected);
    server.ended().await;
}

/// Keys in order of their replies, of a long item that was sent before a short one.
async fn order(window: &str) -> Vec<String> {
    let server = TestServer::start(&[("max_batch_window", window)]).await;
    let mut client = inference(&server).await;
    let (sender, mut replies) = open(&mut client).await;
    sender.send(item("long", generate("a", 200))).await.unwrap();
    sender.send(item("short", generate("a", 1))).await.unwrap();
    drop(sender);
    let mut keys = Vec::new();
    while let Some(reply) = replies.next().await {
        keys.push(reply.unwrap().key);
    }
    server.ended().await;
    keys
}

#[tokio::test]
async fn the_window_bounds_how_many_items_are_open() {
    assert_eq!(order("1").await, ["long", "short"]);
    assert_eq!(
        order("2").await,
        ["short", "long"],
        "replies come in order of completion"
    );
}

#[tokio::test]
async fn a_single_call_does_not_wait_for_bulk_items() {
    let server = TestServer::start(&[("max_sequences", "2"), ("max_batched_tokens", "64")]).await;
    let mut client = inference(&server).await;
    let mut model = v1::model_service_client::ModelServiceClient::new(server.channel().await);
    // The first call reads the program's file, which takes longer than the bulk work.
    let request = v1::GetServerInfoRequest::default();
    model.get_server_info(request).await.unwrap();
    let (sender, mut replies) = open(&mut client).await;
    for index in 0..6 {
        let request = generate(&format!("long item {index}"), 1200);
        sender
            .send(item(&index.to_string(), request))
            .await
            .unwrap();
    }
    // Both places are taken by bulk work when the first token is there; a call takes one of them at once.
    loop {
        let request = v1::GetServerInfoRequest::default();
        let info = model.get_server_info(request).await.unwrap().into_inner();
        if info.requests_running == 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let began = std::time::Instant::now();
    for _ in 0..3 {
        client.generate(generate("now", 3)).await.unwrap();
    }
    let (single, began) = (began.elapsed(), std::time::Instant::now());
    let first = replies.next().await.unwrap().unwrap();
    assert!(
        began.elapsed() > single,
        "three single calls took {single:?}; the first of two bulk items came only {:?} later",
        began.elapsed()
    );
    let mut keys = BTreeSet::from([first.key]);
    drop(sender);
    while let Some(reply) = replies.next().await {
        let reply = reply.unwrap();
        let Some(Answer::Response(response)) = reply.result else {
            panic!("{reply:?}");
        };
        assert_eq!(response.usage.unwrap().output_tokens, 1200);
        keys.insert(reply.key);
    }
    assert_eq!(keys.len(), 6, "what gave way was computed again");
    server.ended().await;
}

#[tokio::test]
async fn a_client_that_goes_away_takes_its_items_along() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    let (sender, mut replies) = open(&mut client).await;
    for index in 0..40 {
        let tokens = if index == 0 { 1 } else { 400 };
        let request = generate("endless", tokens);
        sender
            .send(item(&index.to_string(), request))
            .await
            .unwrap();
    }
    assert_eq!(replies.next().await.unwrap().unwrap().key, "0");
    drop((sender, replies));
    idle(&server).await;
    server.ended().await;
}

#[tokio::test]
async fn a_drain_answers_what_is_open_and_says_so() {
    let mut server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    let (sender, mut replies) = open(&mut client).await;
    sender.send(item("first", generate("a", 1))).await.unwrap();
    sender.send(item("open", generate("a", 100))).await.unwrap();
    assert_eq!(replies.next().await.unwrap().unwrap().key, "first");
    server.begin_stop();
    assert_eq!(replies.next().await.unwrap().unwrap().key, "open");
    let (code, reason, _) = refused(replies.next().await.unwrap());
    assert_eq!(
        (code, reason.as_str()),
        (Code::Unavailable, "SERVER_DRAINING")
    );
    server.ended().await;
}

#[tokio::test]
async fn silence_has_an_end() {
    let server = TestServer::start(&[("batch_idle_timeout", "50ms")]).await;
    let mut client = inference(&server).await;
    let (sender, mut replies) = open(&mut client).await;
    // An item that is open is no silence, however long it takes.
    sender.send(item("a", generate("a", 300))).await.unwrap();
    assert_eq!(replies.next().await.unwrap().unwrap().key, "a");
    let (code, reason, message) = refused(replies.next().await.unwrap());
    assert_eq!(
        (code, reason.as_str()),
        (Code::DeadlineExceeded, "STREAM_IDLE")
    );
    assert!(message.contains("batch_idle_timeout"), "{message}");
    server.ended().await;
}

#[tokio::test]
async fn items_wait_for_their_tenants_places() {
    let settings = [
        ("max_in_flight_per_tenant", "1"),
        ("service_key", SERVICE_KEY),
    ];
    let server = TestServer::start(&settings).await;
    let (acme, _) = two_tenants(&server).await;
    let items = (0..12).map(|index| v1::BatchClassifyRequest {
        key: index.to_string(),
        request: Some(v1::ClassifyRequest {
            texts: vec![format!("text {index}")],
            labels: vec!["yes".to_owned(), "no".to_owned()],
            ..Default::default()
        }),
    });
    let mut replies = acme
        .batch_classify(futures::stream::iter(items.collect::<Vec<_>>()))
        .await
        .unwrap();
    let mut keys = BTreeSet::new();
    while let Some(reply) = replies.next().await {
        let reply = reply.unwrap();
        let Some(classified::Result::Response(found)) = reply.result else {
            panic!("an item was turned away instead of waiting: {reply:?}");
        };
        assert_eq!(found.results[0].scores.len(), 2);
        keys.insert(reply.key);
    }
    assert_eq!(keys.len(), 12);
    server.ended().await;
}
