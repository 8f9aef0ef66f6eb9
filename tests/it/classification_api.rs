//! Heads over a real socket: one label, several or a number; weights, calibration and the result that a job tells; and the
//! settings' way out and in again.

use espalier_adapters::version::AdapterArtifact;
use espalier_client::{AdapterUpload, Client, Error, v1};
use espalier_tests::TestServer;
use v1::training_event::Event;
use v1::training_spec::{Method, Validation};

use crate::client_side::{classification, create, events, inline, start, succeeded, tenant};

const WORDS: [&str; 6] = ["card", "transfer", "account", "app", "branch", "loan"];

/// Texts of two words; the first decides.
fn texts() -> Vec<(String, usize)> {
    let pair = |at: usize| {
        let (first, second) = (at % 3, 3 + at % 2);
        let text = format!("{} {} {at}", WORDS[second], WORDS[first]);
        (text, first)
    };
    (0..48).map(pair).collect()
}

fn lines(row: impl Fn(&str, usize) -> serde_json::Value) -> v1::TrainingData {
    let line = |(text, first): &(String, usize)| row(text, *first).to_string() + "\n";
    inline(texts().iter().map(line).collect::<String>().into_bytes())
}

fn one(text: &str, first: usize) -> serde_json::Value {
    serde_json::json!({"text": text, "label": WORDS[first]})
}

fn several(text: &str, first: usize) -> serde_json::Value {
    let labels: Vec<&str> = (0..3)
        .filter(|at| *at != first)
        .map(|at| WORDS[at])
        .collect();
    serde_json::json!({"text": text, "labels": labels})
}

fn number(text: &str, first: usize) -> serde_json::Value {
    serde_json::json!({"text": text, "score": 1.5 * first as f64 - 1.0})
}

fn spec(
    client: &Client,
    adapter: &str,
    data: v1::TrainingData,
    change: impl FnOnce(&mut v1::ClassificationMethod),
) -> v1::TrainingSpec {
    let mut spec = classification(client, adapter, data, true);
    spec.validation = Some(Validation::ValidationFraction(0.25));
    if let Some(Method::Classification(method)) = &mut spec.method {
        change(method);
    }
    let hyper = spec.hyper_parameters.as_mut().unwrap();
    (hyper.learning_rate, hyper.max_steps) = (Some(0.05), Some(120));
    spec
}

fn ask(client: &Client, adapter: &str) -> v1::ClassifyRequest {
    v1::ClassifyRequest {
        target: Some(client.target(Some(adapter)).unwrap()),
        texts: texts()
            .iter()
            .take(30)
            .map(|(text, _)| text.clone())
            .collect(),
        ..Default::default()
    }
}

/// The field and the reason that a refusal names.
fn refusal(result: Result<v1::CreateTrainingJobResponse, Error>) -> (String, String) {
    let error = result.map(|_| "it was not refused").unwrap_err();
    let first = error.field_violations.first();
    let field = first.map(|violation| violation.field.clone());
    (field.unwrap_or_default(), error.to_string())
}

#[tokio::test]
async fn one_label_is_weighed_calibrated_and_told() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let spec = spec(&acme, "one", lines(one), |method| {
        method.balance_classes = true;
        method.out_of_scope_share = Some(0.2);
    });
    let job = start(&acme, spec).await;
    let seen = events(&acme, &job, 0).await;
    let told = seen.iter().any(|event| match &event.event {
        Some(Event::Evaluation(found)) => found.macro_f1.is_some() && found.accuracy.is_some(),
        _ => false,
    });
    assert!(told, "an evaluation tells its macro F1");
    let job = succeeded(&acme, &job).await;
    let Some(Method::Classification(method)) = job.spec.unwrap().method else {
        panic!("another method")
    };
    assert_eq!(method.problem_type(), v1::ProblemType::SingleLabel);
    assert!(method.balance_classes);
    let result = job.classification_result.unwrap();
    assert_eq!(result.labels, ["account", "card", "transfer"]);
    assert_eq!(result.confusion.len(), 9);
    assert_eq!(result.confusion.iter().sum::<u64>(), result.examples);
    let diagonal: u64 = (0..3).map(|at| result.confusion[4 * at]).sum();
    let accuracy = diagonal as f64 / result.examples as f64;
    assert!((accuracy - result.accuracy.unwrap()).abs() < 1e-12);
    assert!(result.macro_f1.unwrap() > 0.5 && result.log_loss.is_some());
    let temperature = f64::from(result.temperature.unwrap());
    let below = result.out_of_scope_below.unwrap();
    let version = acme.get_adapter_version(&job.version).await.unwrap();
    assert_eq!(version.metrics["macro_f1"], result.macro_f1.unwrap());
    let reply = acme.classify(ask(&acme, "one")).await.unwrap();
    for result in &reply.results {
        // The scores are those of the logits over the fitted temperature.
        let weights = result
            .scores
            .iter()
            .map(|one| (f64::from(one.score) / temperature).exp());
        let total: f64 = weights.clone().sum();
        for (score, weight) in result.scores.iter().zip(weights) {
            assert!((f64::from(score.probability) - weight / total).abs() < 1e-5);
        }
        let best = result.scores[0].probability;
        assert_eq!(result.out_of_scope, best < below);
        assert_eq!(result.problem_type(), v1::ProblemType::SingleLabel);
    }
    server.ended().await;
}

#[tokio::test]
async fn several_labels_and_numbers_are_learned_and_answered() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let job = start(&acme, spec(&acme, "several", lines(several), |_| ())).await;
    let job = succeeded(&acme, &job).await;
    let result = job.classification_result.unwrap();
    assert_eq!(result.problem_type(), v1::ProblemType::MultiLabel);
    assert!(
        result.micro_f1.unwrap() > 0.7 && result.temperature.is_none(),
        "{result:?}"
    );
    let reply = acme.classify(ask(&acme, "several")).await.unwrap();
    for result in &reply.results {
        let said: Vec<&String> = result
            .scores
            .iter()
            .filter(|score| score.probability > 0.5)
            .map(|score| &score.label)
            .collect();
        assert_eq!(result.labels.iter().collect::<Vec<_>>(), said);
        assert_eq!(result.scores.len(), 3);
    }
    assert!(reply.results.iter().any(|result| result.labels.len() == 2));

    let job = start(&acme, spec(&acme, "number", lines(number), |_| ())).await;
    let job = succeeded(&acme, &job).await;
    assert_eq!(job.progress.unwrap().validation_accuracy, None);
    let result = job.classification_result.unwrap();
    assert_eq!(result.labels, ["score"]);
    assert!(result.accuracy.is_none() && result.mean_squared_error.is_some());
    assert!(result.r_squared.unwrap() > 0.2, "{result:?}");
    let reply = acme.classify(ask(&acme, "number")).await.unwrap();
    let mean = |first: usize| {
        let of = reply.results.iter().zip(texts());
        let values = of.filter(|(_, (_, at))| *at == first);
        let values: Vec<f32> = values.map(|(result, _)| result.value.unwrap()).collect();
        values.iter().sum::<f32>() / values.len() as f32
    };
    assert!(mean(0) < mean(1) && mean(1) < mean(2));
    assert!(reply.results.iter().all(|result| result.scores.is_empty()));
    server.ended().await;
}

#[tokio::test]
async fn the_settings_go_out_and_come_in_again() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    // What PEFT's files can hold.
    let last = |method: &mut v1::ClassificationMethod| method.set_pooling(v1::Pooling::Last);
    let job = start(&acme, spec(&acme, "one", lines(one), last)).await;
    let job = succeeded(&acme, &job).await;
    let dir = tempfile::tempdir().unwrap();
    let first = acme
        .download_adapter(&job.version, dir.path())
        .await
        .unwrap();
    let head = dir.path().join(AdapterArtifact::HEAD_FILE);
    assert!(
        std::fs::read_to_string(&head)
            .unwrap()
            .contains("temperature")
    );
    assert_eq!(first.parts.len(), 4);
    let upload = |adapter: &str| AdapterUpload {
        adapter: acme.names().adapter(adapter).unwrap(),
        dir: dir.path().to_owned(),
        create_if_missing: true,
        ..Default::default()
    };
    let again = acme.upload_adapter(upload("again")).await.unwrap();
    assert_eq!(again.version.unwrap().digest, first.digest);
    let one = acme.classify(ask(&acme, "one")).await.unwrap();
    let other = acme.classify(ask(&acme, "again")).await.unwrap();
    assert_eq!(one.results, other.results);
    // Without the settings it is another version, which answers with plain softmax.
    std::fs::remove_file(&head).unwrap();
    let plain = acme.upload_adapter(upload("plain")).await.unwrap();
    assert_ne!(plain.version.unwrap().digest, first.digest);
    let plain = acme.classify(ask(&acme, "plain")).await.unwrap();
    assert!(plain.results.iter().all(|result| !result.out_of_scope));
    assert_ne!(
        plain.results[0].scores[0].probability,
        one.results[0].scores[0].probability
    );
    std::fs::write(&head, r#"{"version": 1, "temperature": -1}"#).unwrap();
    let refused = acme.upload_adapter(upload("bad")).await.unwrap_err();
    assert!(refused.to_string().contains("head.json"), "{refused}");
    server.ended().await;
}

#[tokio::test]
async fn a_ladder_is_live_before_lora_and_ends_with_the_better_one() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    // LoRA cannot learn anything at this rate, or learns as it should.
    for (adapter, rate) in [("stays", 1e-9), ("climbs", 5e-3)] {
        let mut spec = spec(&acme, adapter, lines(one), |method| {
            (method.head_only, method.ladder) = (None, true);
        });
        let hyper = spec.hyper_parameters.as_mut().unwrap();
        (hyper.learning_rate, hyper.head_learning_rate) = (Some(rate), Some(rate));
        hyper.max_steps = Some(40);
        let job = start(&acme, spec).await;
        let seen = events(&acme, &job, 0).await;
        let made: Vec<(usize, String)> = seen
            .iter()
            .enumerate()
            .filter_map(|(at, event)| match &event.event {
                Some(Event::Published(made)) => Some((at, made.version.clone())),
                _ => None,
            })
            .collect();
        let job = succeeded(&acme, &job).await;
        // Steps follow the head's version: it was live while LoRA was trained.
        let after = &seen[made[0].0..];
        let steps = after
            .iter()
            .filter(|e| matches!(e.event, Some(Event::Step(_))));
        assert!(steps.count() > 0);
        assert_eq!(made.last().unwrap().1, job.version);
        let reply = acme.classify(ask(&acme, adapter)).await.unwrap();
        assert_eq!(reply.effective.unwrap().adapters[0].version, job.version);
        let Some(Event::StateChanged(end)) = &seen.last().unwrap().event else {
            panic!("the last event brings the state")
        };
        let stays = made.len() == 1;
        assert_eq!(end.reason.contains("stays live"), stays, "{}", end.reason);
        assert!(stays || adapter == "climbs");
        let version = acme.get_adapter_version(&job.version).await.unwrap();
        assert_eq!(version.config.unwrap().target_modules.is_empty(), stays);
        // The result is that of the version that is live.
        let result = job.classification_result.unwrap();
        assert_eq!(version.metrics["accuracy"], result.accuracy.unwrap());
    }
    server.ended().await;
}

#[tokio::test]
async fn what_cannot_be_learned_is_refused_before_the_job_begins() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let refused = async |data, change: &dyn Fn(&mut v1::ClassificationMethod), valid: bool| {
        let mut spec = spec(&acme, "a", data, |method| change(method));
        if !valid {
            spec.validation = None;
        }
        refusal(acme.create_training_job(create(&acme, spec)).await)
    };
    let at = |field: &str| format!("spec.classification.{field}");
    let (field, _) = refused(lines(one), &|m| m.out_of_scope_share = Some(0.1), false).await;
    assert_eq!(field, at("out_of_scope_share"));
    let (field, why) = refused(lines(number), &|m| m.balance_classes = true, true).await;
    assert!(
        field == at("balance_classes") && why.contains("a number"),
        "{why}"
    );
    let weigh = |m: &mut v1::ClassificationMethod| {
        m.class_weights.insert("x".into(), 2.0);
    };
    let (field, why) = refused(lines(one), &weigh, true).await;
    assert!(
        field == at("class_weights") && why.contains("\"x\""),
        "{why}"
    );
    let width = |m: &mut v1::ClassificationMethod| m.hidden_layers = vec![64, 12];
    let (field, why) = refused(lines(one), &width, true).await;
    assert!(field == at("hidden_layers") && why.contains("12"), "{why}");
    let idle = |m: &mut v1::ClassificationMethod| m.set_activation(v1::Activation::Tanh);
    let (field, why) = refused(lines(one), &idle, true).await;
    assert!(
        field == at("activation") && why.contains("hidden_layers"),
        "{why}"
    );
    let all = |m: &mut v1::ClassificationMethod| m.dropout = 1.0;
    let (field, why) = refused(lines(one), &all, true).await;
    assert!(field == at("dropout") && why.contains("0 to 1"), "{why}");
    let none = |m: &mut v1::ClassificationMethod| m.pooling = 9;
    let (field, why) = refused(lines(one), &none, true).await;
    assert!(field == at("pooling") && why.contains("MEAN"), "{why}");
    let absent = |m: &mut v1::ClassificationMethod| {
        m.labels = ["account", "card", "transfer", "never"]
            .map(str::to_owned)
            .to_vec();
        m.balance_classes = true;
    };
    let (field, why) = refused(lines(one), &absent, true).await;
    assert!(
        field == at("balance_classes") && why.contains("never"),
        "{why}"
    );
    let bad = inline(
        b"{\"text\": \"a\", \"score\": 2}\n{\"text\": \"b\", \"score\": \"high\"}\n".to_vec(),
    );
    let (_, why) = refused(bad, &|_| (), false).await;
    assert!(why.contains("line 2") || why.contains("score"), "{why}");
    server.ended().await;
}

#[tokio::test]
async fn a_head_on_the_mean_answers_as_it_was_measured_and_is_no_peft_file() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let on_mean = |change: &dyn Fn(&mut v1::ClassificationMethod)| {
        let mut spec = spec(&acme, "mean", lines(one), |method| {
            method.set_pooling(v1::Pooling::Mean);
            method.dropout = 0.1;
            change(method);
        });
        spec.hyper_parameters.as_mut().unwrap().learning_rate = Some(0.01);
        spec
    };
    let job = start(&acme, on_mean(&|_| ())).await;
    let job = succeeded(&acme, &job).await;
    let Some(Method::Classification(method)) = job.spec.unwrap().method else {
        panic!("a classification")
    };
    assert_eq!((method.pooling(), method.dropout), (v1::Pooling::Mean, 0.1));
    let asked = ask(&acme, "mean");
    let reply = acme.classify(asked.clone()).await.unwrap();
    // A second time the prompt is in the prefix cache, whose states a mean must not miss.
    assert_eq!(acme.classify(asked).await.unwrap().results, reply.results);
    let dir = tempfile::tempdir().unwrap();
    let refused = acme.download_adapter(&job.version, dir.path()).await;
    let why = refused.unwrap_err().to_string();
    assert!(why.contains("the mean of all tokens"), "{why}");
    acme.download_stored(&job.version, dir.path())
        .await
        .unwrap();
    let upload = AdapterUpload {
        adapter: acme.names().adapter("copy").unwrap(),
        dir: dir.path().to_owned(),
        create_if_missing: true,
        ..Default::default()
    };
    acme.upload_adapter(upload).await.unwrap();
    let copy = acme.classify(ask(&acme, "copy")).await.unwrap();
    assert_eq!(copy.results, reply.results);
    // What goes on reads the same states, and asking for others is refused.
    let mut more = on_mean(&|method| method.pooling = 0);
    more.from_version.clone_from(&job.version);
    let more = start(&acme, more).await;
    let more = succeeded(&acme, &more).await;
    let Some(Method::Classification(method)) = more.spec.unwrap().method else {
        panic!("a classification")
    };
    assert_eq!(method.pooling(), v1::Pooling::Mean);
    let mut other = on_mean(&|method| method.set_pooling(v1::Pooling::Last));
    other.from_version.clone_from(&job.version);
    let error = acme
        .create_training_job(create(&acme, other))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("the last token's state"),
        "{error}"
    );
    server.ended().await;
}

#[tokio::test]
async fn a_head_with_hidden_layers_is_trained_answers_goes_on_and_is_no_peft_file() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let deep = |change: &dyn Fn(&mut v1::ClassificationMethod)| {
        let mut spec = spec(&acme, "deep", lines(one), |method| {
            method.hidden_layers = vec![32, 16];
            change(method);
        });
        spec.hyper_parameters.as_mut().unwrap().learning_rate = Some(0.01);
        spec
    };
    let job = start(&acme, deep(&|_| ())).await;
    let job = succeeded(&acme, &job).await;
    let Some(Method::Classification(method)) = job.spec.unwrap().method else {
        panic!("a classification")
    };
    assert_eq!(method.hidden_layers, [32, 16]);
    assert_eq!(method.activation(), v1::Activation::Gelu);
    let result = job.classification_result.unwrap();
    // Chance is a third; the base's weights are drawn, so its states say little.
    assert!(result.accuracy.unwrap() > 0.5, "{result:?}");
    let reply = acme.classify(ask(&acme, "deep")).await.unwrap();
    assert_eq!(reply.effective.unwrap().adapters[0].version, job.version);
    let dir = tempfile::tempdir().unwrap();
    let refused = acme.download_adapter(&job.version, dir.path()).await;
    let why = refused.unwrap_err().to_string();
    assert!(
        why.contains("hidden layers 32, 16 with gelu") && why.contains("one matrix"),
        "{why}"
    );
    acme.download_stored(&job.version, dir.path())
        .await
        .unwrap();
    // What was brought back answers the same, bit for bit.
    let upload = AdapterUpload {
        adapter: acme.names().adapter("copy").unwrap(),
        dir: dir.path().to_owned(),
        create_if_missing: true,
        ..Default::default()
    };
    acme.upload_adapter(upload).await.unwrap();
    let copy = acme.classify(ask(&acme, "copy")).await.unwrap();
    assert_eq!(copy.results, reply.results);
    // What goes on has the version's layers, and no others.
    let mut more = deep(&|method| method.hidden_layers.clear());
    more.from_version.clone_from(&job.version);
    let more = start(&acme, more).await;
    succeeded(&acme, &more).await;
    let mut other = deep(&|method| method.hidden_layers = vec![8]);
    other.from_version.clone_from(&job.version);
    let error = acme
        .create_training_job(create(&acme, other))
        .await
        .unwrap_err();
    assert!(
        error.to_string().contains("hidden layers 8 with gelu"),
        "{error}"
    );
    server.ended().await;
}
