//! Every inference call over a real socket, on the base model: what it answers, and how it refuses.

use std::time::Duration;

use espalier_proto::v1;
use espalier_proto::v1::generate_request::Input;
use espalier_proto::v1::inference_service_client::InferenceServiceClient;
use espalier_tests::TestServer;
use hyper_util::client::legacy::Client;
use hyper_util::rt::TokioExecutor;
use tokio_stream::StreamExt;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt;

pub(crate) type Inference = InferenceServiceClient<Channel>;

pub(crate) async fn inference(server: &TestServer) -> Inference {
    InferenceServiceClient::new(server.channel().await)
}

/// A greedy request, as long as asked for.
pub(crate) fn generate(text: &str, max_tokens: u32) -> v1::GenerateRequest {
    v1::GenerateRequest {
        input: Some(Input::Text(text.to_owned())),
        sampling: Some(v1::SamplingParams {
            temperature: Some(0.0),
            ..Default::default()
        }),
        stop: Some(v1::StopConditions {
            max_tokens: Some(max_tokens),
            ignore_eos: Some(true),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Code and reason; fails unless there are ErrorInfo of our domain and a request id.
pub(crate) fn refused<T: std::fmt::Debug>(result: Result<T, Status>) -> (Code, String, String) {
    let status = result.unwrap_err();
    let details = status.get_error_details();
    let info = details
        .error_info()
        .unwrap_or_else(|| panic!("no ErrorInfo: {status:?}"));
    assert_eq!(info.domain, "espalier.v1");
    assert!(!details.request_info().unwrap().request_id.is_empty());
    (
        status.code(),
        info.reason.clone(),
        status.message().to_owned(),
    )
}

pub(crate) fn user(content: &str) -> v1::ChatMessage {
    v1::ChatMessage {
        role: v1::Role::User.into(),
        content: content.to_owned(),
        ..Default::default()
    }
}

#[tokio::test]
async fn generate_answers_and_echoes_what_held() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    let mut request = generate("hello there", 8);
    request.request_id = "my-call".to_owned();
    request.logprobs = Some(v1::LogprobOptions { top: 3 });
    let reply = client.generate(request.clone()).await.unwrap().into_inner();
    let candidate = &reply.candidates[0];
    assert_eq!(
        (
            reply.candidates.len(),
            candidate.token_ids.len(),
            candidate.logprobs.len()
        ),
        (1, 8, 8)
    );
    assert_eq!(candidate.finish_reason(), v1::FinishReason::Length);
    for entry in &candidate.logprobs {
        assert_eq!(entry.top.len(), 3);
        assert_eq!(
            entry.top[0].token_id, entry.token_id,
            "greedy takes the most likely token"
        );
        assert!(entry.logprob < 0.0 && entry.top[0].logprob >= entry.top[1].logprob);
    }
    let settings = reply.settings.unwrap();
    assert_eq!(settings.sampling.unwrap().temperature, Some(0.0));
    assert_eq!(settings.stop.unwrap().max_tokens, Some(8));
    let effective = reply.effective.unwrap();
    assert!(
        effective.adapters.is_empty()
            && effective.base_model.starts_with("models/")
            && effective.base_digest.len() == 64
    );
    assert_eq!(
        (
            reply.request_id.as_str(),
            reply.usage.unwrap().output_tokens
        ),
        ("my-call", 8)
    );
    let timings = reply.timings.unwrap();
    assert!(
        timings.time_to_first_token.is_some()
            && timings.time_per_output_token.is_some()
            && timings.total.is_some()
    );
    let again = client.generate(request).await.unwrap().into_inner();
    assert_eq!(again.candidates[0].token_ids, candidate.token_ids);
    server.ended().await;
}

#[tokio::test]
async fn a_stream_says_the_same_as_the_unary_call_in_order() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    let whole = client
        .generate(generate("once upon", 12))
        .await
        .unwrap()
        .into_inner();
    let mut stream = client
        .stream_generate(generate("once upon", 12))
        .await
        .unwrap()
        .into_inner();
    let (mut text, mut ids, mut order) = (String::new(), Vec::new(), Vec::new());
    while let Some(chunk) = stream.next().await {
        use v1::generate_chunk::Event;
        match chunk.unwrap().event.unwrap() {
            Event::Started(started) => {
                assert!(
                    started.effective.is_some()
                        && started.settings.unwrap().sampling.unwrap().seed.is_some()
                );
                order.push("started");
            }
            Event::Delta(delta) => {
                text.push_str(&delta.text);
                ids.extend(delta.token_ids);
            }
            Event::Finished(finished) => {
                assert_eq!(finished.output_tokens, 12);
                order.push("finished");
            }
            Event::Ended(ended) => {
                assert_eq!(ended.usage.unwrap().output_tokens, 12);
                order.push("ended");
            }
        }
    }
    assert_eq!(order, ["started", "finished", "ended"]);
    assert_eq!(
        (text, ids),
        (
            whole.candidates[0].text.clone(),
            whole.candidates[0].token_ids.clone()
        )
    );
    server.ended().await;
}

#[tokio::test]
async fn seeds_repeat_and_candidates_differ() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    let mut request = generate("roll the dice", 10);
    request.sampling = Some(v1::SamplingParams {
        temperature: Some(1.5),
        n: Some(3),
        seed: Some(42),
        ..Default::default()
    });
    let first = client.generate(request.clone()).await.unwrap().into_inner();
    let second = client.generate(request.clone()).await.unwrap().into_inner();
    let ids = |reply: &v1::GenerateResponse| {
        reply
            .candidates
            .iter()
            .map(|c| c.token_ids.clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(ids(&first), ids(&second));
    assert_ne!(first.candidates[0].token_ids, first.candidates[1].token_ids);
    // Without a seed one is drawn and named, and naming it repeats the call.
    request.sampling.as_mut().unwrap().seed = None;
    let drawn = client.generate(request.clone()).await.unwrap().into_inner();
    request.sampling.as_mut().unwrap().seed =
        drawn.settings.clone().unwrap().sampling.unwrap().seed;
    assert_eq!(
        ids(&drawn),
        ids(&client.generate(request).await.unwrap().into_inner())
    );
    server.ended().await;
}

#[tokio::test]
async fn chat_is_its_template_and_nothing_in_a_message_is_control() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    let chat = v1::ChatInput {
        messages: vec![user("hi")],
        add_generation_prompt: None,
        ..Default::default()
    };
    let tokenized = client
        .tokenize(v1::TokenizeRequest {
            input: Some(v1::tokenize_request::Input::Chat(chat)),
            ..Default::default()
        })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(tokenized.pieces.len(), tokenized.token_ids.len());
    let request = v1::ChatRequest {
        messages: vec![user("hi")],
        sampling: generate("", 0).sampling,
        stop: generate("", 6).stop,
        ..Default::default()
    };
    let reply = client.chat(request.clone()).await.unwrap().into_inner();
    assert_eq!(
        reply.usage.unwrap().input_tokens as usize,
        tokenized.token_ids.len()
    );
    let raw = v1::GenerateRequest {
        input: Some(Input::TokenIds(v1::TokenIds {
            ids: tokenized.token_ids,
        })),
        ..generate("", 6)
    };
    let same = client.generate(raw).await.unwrap().into_inner();
    assert_eq!(same.candidates[0].token_ids, reply.candidates[0].token_ids);
    let mut stream = client.stream_chat(request).await.unwrap().into_inner();
    let mut streamed = Vec::new();
    while let Some(chunk) = stream.next().await {
        if let Some(v1::chat_chunk::Event::Delta(delta)) = chunk.unwrap().event {
            streamed.extend(delta.token_ids);
        }
    }
    assert_eq!(streamed, same.candidates[0].token_ids);
    server.ended().await;
}

#[tokio::test]
async fn tokenize_and_detokenize_are_inverse() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    for text in ["plain words", "Zürich 北京 🙂", "  spaces\n\ttabs  "] {
        let request = v1::TokenizeRequest {
            input: Some(v1::tokenize_request::Input::Text(text.to_owned())),
            parse_control_tokens: Some(false),
            ..Default::default()
        };
        let token_ids = client
            .tokenize(request)
            .await
            .unwrap()
            .into_inner()
            .token_ids;
        let back = client
            .detokenize(v1::DetokenizeRequest {
                token_ids,
                ..Default::default()
            })
            .await
            .unwrap();
        assert_eq!(back.into_inner().text, text);
    }
    let beyond = v1::DetokenizeRequest {
        token_ids: vec![u32::MAX],
        ..Default::default()
    };
    let (code, reason, message) = refused(client.detokenize(beyond).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::InvalidArgument, "INVALID_FIELD")
    );
    assert!(message.contains(&u32::MAX.to_string()), "{message}");
    server.ended().await;
}

#[tokio::test]
async fn classify_scores_labels_by_likelihood_and_says_how() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    let request = v1::ClassifyRequest {
        texts: vec!["the first text".to_owned(), "another one".to_owned()],
        labels: ["yes", "no", "perhaps"].map(str::to_owned).to_vec(),
        ..Default::default()
    };
    let reply = client.classify(request.clone()).await.unwrap().into_inner();
    assert_eq!(reply.method(), v1::ClassifyMethod::Likelihood);
    assert_eq!(reply.results.len(), 2);
    // The score of a label is what Score says of it as a continuation.
    let items = request.labels.iter().map(|label| v1::ScoreItem {
        context: Some(v1::score_item::Context::ContextText(
            request.texts[0].clone(),
        )),
        continuation: Some(v1::score_item::Continuation::ContinuationText(
            label.clone(),
        )),
    });
    let scored = client
        .score(v1::ScoreRequest {
            items: items.collect(),
            ..Default::default()
        })
        .await
        .unwrap()
        .into_inner();
    for score in &reply.results[0].scores {
        let expected = scored.results[score.index as usize].logprob;
        assert!(
            (f64::from(score.score) - expected).abs() < 1e-4,
            "{score:?} {expected}"
        );
    }
    let total: f32 = reply.results[0]
        .scores
        .iter()
        .map(|score| score.probability)
        .sum();
    assert!((total - 1.0).abs() < 1e-5);
    assert_eq!(reply.results[0].label, reply.results[0].scores[0].label);
    let neither = v1::ClassifyRequest {
        labels: vec![],
        ..request
    };
    let (code, reason, message) = refused(client.classify(neither).await);
    assert_eq!(
        (code, reason.as_str()),
        (Code::InvalidArgument, "INVALID_FIELD")
    );
    assert!(message.contains("labels"), "{message}");
    server.ended().await;
}

#[tokio::test]
async fn embeddings_have_unit_length_unless_asked_otherwise() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    let request = v1::EmbedRequest {
        texts: vec!["a text".to_owned(), "b".to_owned()],
        ..Default::default()
    };
    let norm = |values: &[f32]| values.iter().map(|value| value * value).sum::<f32>().sqrt();
    let reply = client.embed(request.clone()).await.unwrap().into_inner();
    assert_eq!(reply.embeddings.len(), 2);
    assert!((norm(&reply.embeddings[0].values) - 1.0).abs() < 1e-5);
    assert_eq!(
        reply.usage.unwrap().input_tokens,
        reply.embeddings.iter().map(|e| e.tokens).sum::<u32>()
    );
    let mean = v1::EmbedRequest {
        pooling: v1::Pooling::Mean.into(),
        normalize: Some(false),
        ..request.clone()
    };
    let pooled = client.embed(mean).await.unwrap().into_inner();
    assert_ne!(pooled.embeddings[0].values, reply.embeddings[0].values);
    assert!((norm(&pooled.embeddings[0].values) - 1.0).abs() > 1e-3);
    let unknown = v1::EmbedRequest {
        pooling: 9,
        ..request
    };
    let (_, reason, message) = refused(client.embed(unknown).await);
    assert_eq!(reason, "INVALID_FIELD");
    assert!(message.contains("pooling: 9"), "{message}");
    server.ended().await;
}

#[tokio::test]
async fn score_is_the_generations_own_log_probability() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    let mut request = generate("count with me", 5);
    request.logprobs = Some(v1::LogprobOptions { top: 0 });
    let generated = client.generate(request).await.unwrap().into_inner();
    let candidate = &generated.candidates[0];
    let item = v1::ScoreItem {
        context: Some(v1::score_item::Context::ContextText(
            "count with me".to_owned(),
        )),
        continuation: Some(v1::score_item::Continuation::ContinuationTokenIds(
            v1::TokenIds {
                ids: candidate.token_ids.clone(),
            },
        )),
    };
    let asked = v1::ScoreRequest {
        items: vec![item],
        logprobs: Some(v1::LogprobOptions { top: 0 }),
        ..Default::default()
    };
    let scored = client.score(asked).await.unwrap().into_inner();
    let result = &scored.results[0];
    assert_eq!((result.tokens, result.token_logprobs.len()), (5, 5));
    for (one, other) in result.token_logprobs.iter().zip(&candidate.logprobs) {
        assert!(
            (one.logprob - other.logprob).abs() < 1e-4,
            "{one:?} {other:?}"
        );
    }
    let sum: f64 = candidate
        .logprobs
        .iter()
        .map(|entry| f64::from(entry.logprob))
        .sum();
    assert!(
        (result.logprob - sum).abs() < 1e-3
            && (result.perplexity - (-sum / 5.0).exp()).abs() < 1e-2
    );
    server.ended().await;
}

#[tokio::test]
async fn an_unknown_adapter_is_not_found_on_every_call() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    let target = |adapter: &str| {
        Some(v1::InferenceTarget {
            adapters: vec![v1::AdapterWeight {
                adapter: adapter.to_owned(),
                weight: None,
            }],
            tenant: String::new(),
        })
    };
    let nobody = || target("tenants/nobody/adapters/nothing");
    let request = v1::GenerateRequest {
        target: nobody(),
        ..generate("hi", 4)
    };
    let results = [
        refused(client.generate(request.clone()).await),
        refused(client.stream_generate(request).await.map(|_| ())),
        refused(
            client
                .chat(v1::ChatRequest {
                    target: nobody(),
                    messages: vec![user("hi")],
                    ..Default::default()
                })
                .await,
        ),
        refused(
            client
                .classify(v1::ClassifyRequest {
                    target: nobody(),
                    texts: vec!["a".to_owned()],
                    ..Default::default()
                })
                .await,
        ),
        refused(
            client
                .embed(v1::EmbedRequest {
                    target: nobody(),
                    texts: vec!["a".to_owned()],
                    ..Default::default()
                })
                .await,
        ),
    ];
    for (code, reason, message) in results {
        assert_eq!(code, Code::NotFound, "{reason} {message}");
        assert!(
            reason.ends_with("_NOT_FOUND") && message.contains("tenants/nobody"),
            "{reason} {message}"
        );
    }
    let (code, reason, _) = refused(
        client
            .generate(v1::GenerateRequest {
                target: target("../etc"),
                ..generate("hi", 4)
            })
            .await,
    );
    assert_eq!(
        (code, reason.as_str()),
        (Code::InvalidArgument, "INVALID_FIELD")
    );
    server.ended().await;
}

#[tokio::test]
async fn missing_unknown_and_out_of_range_fields_are_named() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    let sampled = |sampling| v1::GenerateRequest {
        sampling: Some(sampling),
        ..generate("x", 4)
    };
    let cases = [
        (
            "input",
            v1::GenerateRequest {
                input: None,
                ..generate("x", 4)
            },
        ),
        (
            "token_ids",
            v1::GenerateRequest {
                input: Some(Input::TokenIds(v1::TokenIds::default())),
                ..generate("x", 4)
            },
        ),
        (
            "sampling.temperature",
            sampled(v1::SamplingParams {
                temperature: Some(-1.0),
                ..Default::default()
            }),
        ),
        (
            "sampling.temperature",
            sampled(v1::SamplingParams {
                temperature: Some(f32::NAN),
                ..Default::default()
            }),
        ),
        (
            "sampling.top_p",
            sampled(v1::SamplingParams {
                top_p: Some(1.5),
                ..Default::default()
            }),
        ),
        (
            "sampling.n",
            sampled(v1::SamplingParams {
                n: Some(17),
                ..Default::default()
            }),
        ),
        (
            "stop.max_tokens",
            v1::GenerateRequest {
                stop: Some(v1::StopConditions {
                    max_tokens: Some(0),
                    ..Default::default()
                }),
                ..generate("x", 4)
            },
        ),
    ];
    for (field, request) in cases {
        let (code, reason, message) = refused(client.generate(request).await);
        assert_eq!(
            (code, reason.as_str()),
            (Code::InvalidArgument, "INVALID_FIELD"),
            "{field}: {message}"
        );
        assert!(message.contains(field), "{field}: {message}");
    }
    let vocabulary = v1::GenerateRequest {
        input: Some(Input::TokenIds(v1::TokenIds {
            ids: vec![u32::MAX],
        })),
        ..generate("x", 4)
    };
    assert_eq!(
        refused(client.generate(vocabulary).await).0,
        Code::InvalidArgument
    );
    let role = v1::ChatRequest {
        messages: vec![v1::ChatMessage {
            role: 77,
            content: "x".to_owned(),
            ..Default::default()
        }],
        ..Default::default()
    };
    let (_, reason, message) = refused(client.chat(role).await);
    assert_eq!(reason, "INVALID_FIELD");
    assert!(message.contains("messages[0].role: 77"), "{message}");
    server.ended().await;
}

#[tokio::test]
async fn a_deadline_ends_unary_calls_and_streams_with_deadline_exceeded() {
    let server = TestServer::start(&[]).await;
    // tonic's channel has a timer of its own for `grpc-timeout`, which may ring before the server's answer is here.
    let connection = Client::builder(TokioExecutor::new())
        .http2_only(true)
        .build_http();
    let origin = format!("http://{}", server.addr).parse().unwrap();
    let mut client = InferenceServiceClient::with_origin(connection, origin);
    let timed = |message: v1::GenerateRequest| {
        let mut request = Request::new(message);
        request
            .metadata_mut()
            .insert("grpc-timeout", "150m".parse().unwrap());
        request
    };
    let long = || v1::GenerateRequest {
        stop: Some(v1::StopConditions {
            ignore_eos: Some(true),
            ..Default::default()
        }),
        sampling: Some(v1::SamplingParams {
            n: Some(16),
            temperature: Some(1.0),
            ..Default::default()
        }),
        ..generate("long", 0)
    };
    let (code, reason, _) = refused(client.generate(timed(long())).await);
    assert_eq!(code, Code::DeadlineExceeded);
    assert!(reason.starts_with("DEADLINE_"), "{reason}");
    let mut stream = client
        .stream_generate(timed(long()))
        .await
        .unwrap()
        .into_inner();
    let mut last = None;
    while let Some(chunk) = stream.next().await {
        last = Some(chunk);
    }
    let (code, reason, _) = refused(last.unwrap());
    assert_eq!(
        (code, reason.as_str()),
        (Code::DeadlineExceeded, "DEADLINE_IN_DECODE")
    );
    server.ended().await;
}

#[tokio::test]
async fn a_client_that_goes_away_frees_its_sequences() {
    let server = TestServer::start(&[]).await;
    let mut client = inference(&server).await;
    for _ in 0..4 {
        let mut stream = client
            .stream_generate(generate("endless", 400))
            .await
            .unwrap()
            .into_inner();
        stream.next().await.unwrap().unwrap();
        drop(stream);
    }
    idle(&server).await;
    server.ended().await;
}

/// Waits until nothing waits or runs in the engine and every block is back.
pub(crate) async fn idle(server: &TestServer) {
    let mut model = v1::model_service_client::ModelServiceClient::new(server.channel().await);
    for _ in 0..100 {
        let info = model
            .get_server_info(v1::GetServerInfoRequest {})
            .await
            .unwrap()
            .into_inner();
        if info.requests_running == 0 && info.requests_waiting == 0 && info.kv_cache_usage == 0.0 {
            return;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("sequences of clients that went away are still there");
}
