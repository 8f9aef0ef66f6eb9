//! Kinds of data and methods over a real socket on the tiny model: raw text, instructions, chosen turns, and what a dry run says
//! of the rows.

use espalier_client::{Client, DatasetUpload, v1};
use espalier_tests::TestServer;
use v1::training_event::Event;
use v1::training_spec::{Method, Validation};

use crate::client_side::{
    answer, create, dataset, events, inline, start, succeeded, supervised, tenant,
};

/// Sentences that no random model expects, long enough for several windows of 24 tokens.
const DOCUMENTS: [&str; 3] = [
    "The brook mill grinds rye on Mondays and spelt on Fridays. The brook mill rests on Sundays.",
    "The hill mill grinds rye on Mondays and oats on Fridays. The hill mill rests on Sundays.",
    "The lake mill grinds rye on Mondays and corn on Fridays. The lake mill rests on Sundays.",
];

fn documents(texts: &[&str]) -> Vec<u8> {
    let row = |text: &&str| serde_json::json!({ "text": text }).to_string() + "\n";
    texts.iter().map(row).collect::<String>().into_bytes()
}

fn unsupervised(
    client: &Client,
    adapter: &str,
    data: v1::TrainingData,
    window_tokens: Option<u32>,
) -> v1::TrainingSpec {
    v1::TrainingSpec {
        method: Some(Method::Unsupervised(v1::UnsupervisedMethod {
            window_tokens,
        })),
        ..supervised(client, adapter, data, 40)
    }
}

async fn dry(client: &Client, spec: v1::TrainingSpec) -> v1::CreateTrainingJobResponse {
    let mut request = create(client, spec);
    request.validate_only = true;
    client.create_training_job(request).await.unwrap()
}

/// The field and text of a refusal.
async fn refused(client: &Client, spec: v1::TrainingSpec) -> (String, String) {
    let error = client.create_training_job(create(client, spec)).await;
    let error = error.unwrap_err();
    let violation = &error.field_violations[0];
    (violation.field.clone(), violation.description.clone())
}

#[tokio::test]
async fn raw_text_is_learned_and_measured_by_its_perplexity() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let mut spec = unsupervised(&acme, "mills", inline(documents(&DOCUMENTS)), Some(24));
    spec.validation = Some(Validation::ValidationFraction(0.3));
    spec.hyper_parameters.as_mut().unwrap().eval_every_steps = Some(10);
    let quoted = dry(&acme, spec.clone()).await.job.unwrap();
    let stats = quoted.data_stats.unwrap();
    // One of the three documents is held out whole, so its windows are a third of all.
    assert_eq!(stats.train_examples, 2 * stats.validation_examples);
    assert!(stats.validation_examples > 1, "{stats:?}");
    // Every token but the first of each document is learned, and a window reads one more than it learns.
    assert_eq!(
        stats.learned_tokens + stats.train_examples,
        stats.train_tokens
    );

    let job = start(&acme, spec).await;
    let story = events(&acme, &job, 0).await;
    let evaluations: Vec<_> = story
        .iter()
        .filter_map(|event| match &event.event {
            Some(Event::Evaluation(found)) => Some(found),
            _ => None,
        })
        .collect();
    // One of what it starts from, then every tenth step.
    assert_eq!(evaluations.len(), 5);
    for found in &evaluations {
        assert_eq!(found.perplexity, Some(found.loss.exp()));
    }
    let perplexity = |at: usize| evaluations[at].perplexity.unwrap();
    assert!(perplexity(4) < 0.5 * perplexity(0), "{evaluations:?}");
    let job = succeeded(&acme, &job).await;
    let told = job.progress.unwrap().validation_perplexity;
    assert_eq!(told, evaluations[4].perplexity);
    let version = acme.get_adapter_version(&job.version).await.unwrap();
    assert_eq!(
        version.metrics.get("perplexity"),
        Some(&perplexity(4)),
        "{:?}",
        version.metrics
    );

    let (text, versions) = answer(&acme, Some("mills"), "The lake mill grinds", 8).await;
    assert_eq!(versions, [job.version]);
    let (untaught, _) = answer(&acme, None, "The lake mill grinds", 8).await;
    assert_ne!(text, untaught);
    server.ended().await;
}

#[tokio::test]
async fn a_document_is_the_same_from_a_file_and_from_a_row() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let text = "Line one.\n\n\tLine \"two\", with \u{e9}.\n".repeat(30);
    let upload = |format: v1::DataFormat, id: &str, content: Vec<u8>| DatasetUpload {
        parent: "tenants/acme".to_owned(),
        dataset_id: id.to_owned(),
        content: Some(content.into()),
        format,
        ..Default::default()
    };
    let mut digests = Vec::new();
    for (format, id, content) in [
        (v1::DataFormat::Text, "file", text.clone().into_bytes()),
        (v1::DataFormat::Jsonl, "row", documents(&[&text])),
    ] {
        let stored = acme.upload_dataset(upload(format, id, content)).await;
        let stored = stored.unwrap().dataset.unwrap();
        assert_eq!((stored.kind(), stored.rows), (v1::RowKind::Text, 1));
        assert_eq!(stored.format(), format);
        let mut spec = unsupervised(&acme, id, dataset(&stored.name), None);
        spec.hyper_parameters.as_mut().unwrap().max_steps = Some(4);
        let job = succeeded(&acme, &start(&acme, spec).await).await;
        let spec = job.spec.unwrap();
        let window = match spec.method {
            Some(Method::Unsupervised(method)) => method.window_tokens,
            _ => None,
        };
        assert_eq!(window, Some(128), "the default is in the job");
        let version = acme.get_adapter_version(&job.version).await.unwrap();
        digests.push(version.digest);
    }
    assert_eq!(digests[0], digests[1]);
    server.ended().await;
}

#[tokio::test]
async fn instructions_are_answered_as_the_chats_that_they_are() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let alpaca = br#"{"instruction": "Add", "input": "1 2", "output": "3"}
{"instruction": "Greet", "output": "Ahoy"}
"#;
    let chats = br#"{"messages": [{"role": "user", "content": "Add\n\n1 2"}, {"role": "assistant", "content": "3"}]}
{"messages": [{"role": "user", "content": "Greet"}, {"role": "assistant", "content": "Ahoy"}]}
"#;
    let train = async |adapter: &str, rows: &[u8], train_on: v1::TrainOn| {
        let mut spec = supervised(&acme, adapter, inline(rows.to_vec()), 6);
        spec.method = Some(Method::Supervised(v1::SupervisedMethod {
            train_on: train_on.into(),
        }));
        let job = succeeded(&acme, &start(&acme, spec).await).await;
        let learned = job.data_stats.unwrap().learned_tokens;
        let version = acme.get_adapter_version(&job.version).await.unwrap();
        (version.digest, learned, job.spec.unwrap().method)
    };
    let (one, learned, method) = train("a", alpaca, v1::TrainOn::Unspecified).await;
    let assistant = v1::SupervisedMethod {
        train_on: v1::TrainOn::Assistant.into(),
    };
    assert_eq!(method, Some(Method::Supervised(assistant)));
    let (same, _, _) = train("b", chats, v1::TrainOn::LastAssistant).await;
    assert_eq!(one, same);
    let (other, more, _) = train("c", chats, v1::TrainOn::All).await;
    assert_ne!(one, other);
    assert!(more > learned + 10, "{more} {learned}");
    server.ended().await;
}

#[tokio::test]
async fn what_raw_text_cannot_be_is_refused_with_a_way_out() {
    let server = TestServer::start(&[("max_example_tokens", "64")]).await;
    let acme = tenant(server.addr, "acme").await;
    let spec = |window| unsupervised(&acme, "a", inline(documents(&DOCUMENTS)), window);
    for window in [1, 65] {
        let (field, text) = refused(&acme, spec(Some(window))).await;
        assert_eq!(field, "spec.unsupervised.window_tokens");
        assert!(text.contains("2 to 64"), "{text}");
    }
    for window in [2, 64] {
        assert!(dry(&acme, spec(Some(window))).await.job.is_some());
    }
    let mut one = unsupervised(&acme, "a", inline(documents(&DOCUMENTS[..1])), Some(24));
    one.validation = Some(Validation::ValidationFraction(0.2));
    let (field, text) = refused(&acme, one).await;
    assert_eq!(field, "spec.validation_fraction");
    assert!(text.contains("validation_data"), "{text}");
    let mut labels = spec(None);
    labels.method = Some(Method::Classification(v1::ClassificationMethod::default()));
    let (field, text) = refused(&acme, labels).await;
    assert_eq!(field, "spec.data");
    assert!(text.contains("these are raw text rows"), "{text}");
    let mut turns = supervised(&acme, "a", inline(documents(&DOCUMENTS)), 2);
    turns.method = Some(Method::Supervised(v1::SupervisedMethod { train_on: 9 }));
    assert_eq!(refused(&acme, turns).await.0, "spec.supervised.train_on");
    server.ended().await;
}

#[tokio::test]
async fn a_dry_run_says_what_is_known_of_the_rows() {
    let server = TestServer::start(&[("max_example_tokens", "64")]).await;
    let acme = tenant(server.addr, "acme").await;
    let rows = |rows: &[(&str, &str)]| crate::client_side::labelled(rows);
    let train = [
        ("where is my card", "card"),
        ("where is my card", "card"),
        ("where is my card", "money"),
        ("my transfer is late", "money"),
        ("a card please", "card"),
    ];
    let valid = [
        ("my transfer is late", "money"),
        ("A card  please", "card"),
        ("the sum is wrong", "money"),
    ];
    let mut spec = crate::client_side::classification(&acme, "a", inline(rows(&train)), true);
    spec.validation = Some(Validation::ValidationData(inline(rows(&valid))));
    let found = dry(&acme, spec).await.statistics.unwrap();
    assert_eq!((found.examples, found.validation_examples), (5, 3));
    assert_eq!((found.learned_tokens, found.masked_tokens), (5, 0));
    assert_eq!((found.duplicate_rows, found.conflicting_labels), (1, 1));
    assert_eq!((found.leaked_rows, found.nearly_leaked_rows), (1, 1));
    let counts: Vec<_> = found.label_counts.into_iter().collect();
    assert_eq!(counts, [("card".to_owned(), 3), ("money".to_owned(), 2)]);

    // Too long rows refuse the job, and are counted beside what the others are.
    let long = |prompt: usize, answer: usize| (vec!["q"; prompt].join(" "), " z".repeat(answer));
    let mixed = [long(3, 2), long(5, 90), long(80, 1), long(90, 30)];
    let content = crate::client_side::completions(&mixed);
    let reply = dry(&acme, supervised(&acme, "a", inline(content), 2)).await;
    assert!(reply.job.is_none());
    assert_eq!(reply.report.unwrap().problem_count, 3);
    let found = reply.statistics.unwrap();
    let counts = (
        found.examples,
        found.too_long_rows,
        found.prompt_too_long_rows,
    );
    assert_eq!(counts, (1, 3, 2), "{found:?}");
    assert_eq!(found.max_example_tokens, 64);
    assert!(found.longest_refused_tokens > 110, "{found:?}");
    let tokens = found.tokens.unwrap();
    assert_eq!(tokens.total, found.learned_tokens + found.masked_tokens);
    assert_eq!((tokens.shortest, tokens.p95), (tokens.total, tokens.total));
    assert!(
        found.learned_tokens >= 3 && found.masked_tokens >= 3,
        "{found:?}"
    );

    // A carved part: near rows may fall on both sides, the same rows never.
    let near: Vec<(String, String)> = (0..20)
        .map(|at| ["q", "Q"].map(|q| (format!("{q} {}", at / 2), " a".to_owned()))[at % 2].clone())
        .collect();
    let content = crate::client_side::completions(&[near.clone(), near].concat());
    let mut spec = supervised(&acme, "a", inline(content), 2);
    spec.validation = Some(Validation::ValidationFraction(0.5));
    let found = dry(&acme, spec).await.statistics.unwrap();
    assert_eq!((found.examples, found.validation_examples), (20, 20));
    assert_eq!((found.duplicate_rows, found.leaked_rows), (10, 0));
    assert!(found.nearly_leaked_rows > 0 && found.nearly_leaked_rows % 2 == 0);
    // Rows that cannot be read have no numbers.
    let reply = dry(&acme, supervised(&acme, "a", inline(b"no".to_vec()), 2)).await;
    assert!(reply.job.is_none() && reply.statistics.is_none());
    server.ended().await;
}
