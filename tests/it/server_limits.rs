//! Limits of the configuration at the door: at the limit a call passes, one over it is refused with the numbers.

use espalier_proto::v1;
use espalier_tests::TestServer;
use tonic::Code;

use crate::inference_api::{generate, inference, refused};

#[tokio::test]
async fn prompts_and_outputs_at_and_over_the_context() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    let mut model = v1::model_service_client::ModelServiceClient::new(server.channel().await);
    let base = model
        .list_models(v1::ListModelsRequest::default())
        .await
        .unwrap()
        .into_inner()
        .models
        .remove(0);
    let context = base.limits.unwrap().context_length;
    let ids = |count: u32, max| v1::GenerateRequest {
        input: Some(v1::generate_request::Input::TokenIds(v1::TokenIds {
            ids: vec![5; count as usize],
        })),
        ..generate("", max)
    };
    let reply = client
        .generate(ids(context - 2, 2))
        .await
        .unwrap()
        .into_inner();
    assert_eq!(reply.usage.unwrap().output_tokens, 2);
    for request in [ids(context - 2, 3), ids(context, 1), ids(context + 1, 1)] {
        let (code, reason, message) = refused(client.generate(request).await);
        assert_eq!(
            (code, reason.as_str()),
            (Code::InvalidArgument, "CONTEXT_LENGTH_EXCEEDED")
        );
        assert!(message.contains(&context.to_string()), "{message}");
    }
    server.ended().await;
}

#[tokio::test]
async fn configured_request_limits_hold_over_the_wire() {
    let server = TestServer::start(&[
        ("max_prompt_tokens", "6"),
        ("max_output_tokens", "3"),
        ("max_inputs", "2"),
        ("max_stop_strings", "1"),
        ("max_message_bytes", "64KiB"),
    ])
    .await;
    let mut client = inference(&server).await;
    let ids = |count, max| v1::GenerateRequest {
        input: Some(v1::generate_request::Input::TokenIds(v1::TokenIds {
            ids: vec![5; count],
        })),
        ..generate("", max)
    };
    assert!(client.generate(ids(6, 3)).await.is_ok());
    let (_, reason, message) = refused(client.generate(ids(7, 3)).await);
    assert_eq!(reason, "INVALID_FIELD");
    assert!(
        message.contains("7 tokens") && message.contains("6 tokens"),
        "{message}"
    );
    assert!(
        refused(client.generate(ids(6, 4)).await)
            .2
            .contains("stop.max_tokens: 4 is outside 1 to 3")
    );
    let embed = |count| v1::EmbedRequest {
        texts: vec!["a".to_owned(); count],
        ..Default::default()
    };
    assert!(client.embed(embed(2)).await.is_ok());
    assert!(
        refused(client.embed(embed(3)).await)
            .2
            .contains("3 texts, the limit is 2")
    );
    let large = generate(&"x".repeat(65 * 1024), 1);
    let (code, reason, _) = refused(client.generate(large).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::OutOfRange, "MESSAGE_TOO_LARGE")
    );
    server.ended().await;
}

#[tokio::test]
async fn calls_beyond_max_in_flight_are_turned_away_with_a_time_to_come_back() {
    let server = TestServer::start(&[("max_in_flight", "1"), ("retry_after", "250ms")]).await;
    let mut client = inference(&server).await;
    let mut held = client
        .stream_generate(generate("hold the place", 400))
        .await
        .unwrap()
        .into_inner();
    held.message().await.unwrap();
    let status = client.generate(generate("x", 1)).await.unwrap_err();
    assert_eq!(
        status.metadata().get("grpc-retry-pushback-ms").unwrap(),
        "250"
    );
    let (code, reason, message) = refused::<()>(Err(status));
    assert_eq!(
        (code, reason.as_str()),
        (Code::Unavailable, "SERVER_OVERLOADED")
    );
    assert!(message.contains("max_in_flight"), "{message}");
    drop(held);
    for _ in 0..100 {
        if client.generate(generate("x", 1)).await.is_ok() {
            server.ended().await;
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("the place was never given back");
}

#[tokio::test]
async fn a_request_that_waits_too_long_is_turned_away_and_one_that_runs_is_not() {
    let server = TestServer::start(&[("max_sequences", "1"), ("max_queue_wait", "20ms")]).await;
    let client = inference(&server).await;
    let calls = (0..12).map(|_| {
        let mut client = client.clone();
        async move { client.generate(generate("one at a time", 400)).await }
    });
    let results = futures::future::join_all(calls).await;
    let (answered, turned_away): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
    assert!(
        !answered.is_empty(),
        "the first to run takes longer than 20 ms and is not cut"
    );
    assert!(
        !turned_away.is_empty(),
        "twelve long requests, one at a time, and none waited"
    );
    for result in turned_away {
        let (code, reason, message) = refused(result);
        assert_eq!(
            (code, reason.as_str()),
            (Code::Unavailable, "SERVER_OVERLOADED")
        );
        assert!(message.contains("max_queue_wait"), "{message}");
    }
    server.ended().await;
}
