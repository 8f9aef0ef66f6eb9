//! Ways to train over a real socket: what a job asks for is what it reports, what its version says, and what goes on from it.

use espalier_client::{Error, v1};
use espalier_tests::TestServer;
use tonic::Code;

use crate::client_side::{
    answer, completions, create, inline, start, succeeded, supervised, tenant,
};

fn lessons() -> v1::TrainingData {
    let row = |at: usize| (format!("case {at}"), " one one one".to_owned());
    inline(completions(&(0..6).map(row).collect::<Vec<_>>()))
}

fn refused<T>(result: Result<T, Error>) -> (Code, String) {
    match result {
        Ok(_) => panic!("it was not refused"),
        Err(error) => (error.code, error.message.clone()),
    }
}

#[tokio::test]
async fn dora_with_lora_plus_is_trained_served_and_gone_on_from() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let spec = |dora: Option<bool>, dropout: Option<f32>| {
        let mut spec = supervised(&acme, "a", lessons(), 20);
        let hyper = spec.hyper_parameters.as_mut().unwrap();
        hyper.lora_plus_ratio = Some(2.5);
        let lora = spec.lora.as_mut().unwrap();
        (lora.use_dora, lora.dropout) = (dora, dropout);
        spec
    };
    let job = succeeded(&acme, &start(&acme, spec(Some(true), None)).await).await;
    let decided = job.spec.unwrap();
    assert_eq!(decided.hyper_parameters.unwrap().lora_plus_ratio, Some(2.5));
    assert_eq!(decided.lora.unwrap().use_dora, Some(true));
    let version = acme.get_adapter_version(&job.version).await.unwrap();
    assert_eq!(version.config.unwrap().use_dora, Some(true));
    let (taught, by) = answer(&acme, Some("a"), "case 3", 12).await;
    let (plain, _) = answer(&acme, None, "case 3", 12).await;
    assert_eq!(by, std::slice::from_ref(&job.version));
    assert_ne!(taught, plain, "nothing was learnt");

    let next = |dora| v1::TrainingSpec {
        from_version: job.version.clone(),
        ..spec(dora, None)
    };
    let further = succeeded(&acme, &start(&acme, next(Some(true))).await).await;
    assert_ne!(further.version, job.version);
    let (code, reason) = refused(acme.create_training_job(create(&acme, next(None))).await);
    assert_eq!(code, Code::FailedPrecondition, "{reason}");
    assert!(reason.contains("DoRA (use_dora)"), "{reason}");
    let both = create(&acme, spec(Some(true), Some(0.1)));
    let (code, reason) = refused(acme.create_training_job(both).await);
    assert_eq!(code, Code::InvalidArgument, "{reason}");
    assert!(reason.contains("0.1 cannot be combined"), "{reason}");
    server.ended().await;
}

#[tokio::test]
async fn ia3_is_trained_served_and_gone_on_from() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let spec = |lora: Option<v1::LoraConfig>| {
        let mut spec = supervised(&acme, "a", lessons(), 30);
        spec.lora = lora;
        spec.ia3 = Some(v1::Ia3Config::default());
        spec.hyper_parameters.as_mut().unwrap().learning_rate = Some(0.1);
        spec
    };
    let job = succeeded(&acme, &start(&acme, spec(None)).await).await;
    let decided = job.spec.unwrap();
    assert_eq!(decided.lora, None);
    let ia3 = decided.ia3.unwrap();
    assert_eq!(ia3.target_modules, ["k_proj", "v_proj", "down_proj"]);
    assert_eq!(ia3.feedforward_modules, ["down_proj"]);
    let version = acme.get_adapter_version(&job.version).await.unwrap();
    assert_eq!((version.config, version.ia3), (None, Some(ia3)));
    let (taught, by) = answer(&acme, Some("a"), "case 3", 12).await;
    let (plain, _) = answer(&acme, None, "case 3", 12).await;
    assert_eq!(by, std::slice::from_ref(&job.version));
    assert_ne!(taught, plain, "nothing was learnt");

    let next = |lora: Option<v1::LoraConfig>, ia3| v1::TrainingSpec {
        from_version: job.version.clone(),
        lora,
        ia3,
        ..spec(None)
    };
    let further = next(None, Some(v1::Ia3Config::default()));
    let further = succeeded(&acme, &start(&acme, further).await).await;
    assert_ne!(further.version, job.version);
    let refusals = [
        (next(None, None), "found (IA)3 on down_proj, k_proj, v_proj"),
        (
            spec(Some(v1::LoraConfig::default())),
            "spec.ia3: lora is set too",
        ),
    ];
    for (spec, expected) in refusals {
        let (_, reason) = refused(acme.create_training_job(create(&acme, spec)).await);
        assert!(reason.contains(expected), "{reason}");
    }
    server.ended().await;
}

#[tokio::test]
async fn layers_are_unfrozen_served_and_gone_on_from() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let last = |layers| v1::UnfreezeConfig {
        last_layers: Some(layers),
        ..Default::default()
    };
    let spec = |unfreeze: v1::UnfreezeConfig| {
        let mut spec = supervised(&acme, "a", lessons(), 30);
        spec.lora = None;
        spec.unfreeze = Some(unfreeze);
        spec.hyper_parameters.as_mut().unwrap().learning_rate = Some(0.01);
        spec
    };
    let job = succeeded(&acme, &start(&acme, spec(last(1))).await).await;
    let decided = job.spec.unwrap().unfreeze.unwrap();
    assert_eq!((decided.last_layers, &decided.layers[..]), (None, &[1][..]));
    let version = acme.get_adapter_version(&job.version).await.unwrap();
    assert_eq!((version.config, version.unfreeze), (None, Some(decided)));
    let (taught, by) = answer(&acme, Some("a"), "case 3", 12).await;
    let (plain, _) = answer(&acme, None, "case 3", 12).await;
    assert_eq!(by, std::slice::from_ref(&job.version));
    assert_ne!(taught, plain, "nothing was learnt");

    let next = |unfreeze| v1::TrainingSpec {
        from_version: job.version.clone(),
        ..spec(unfreeze)
    };
    let further = succeeded(&acme, &start(&acme, next(last(1))).await).await;
    assert_ne!(further.version, job.version);
    let both = v1::TrainingSpec {
        ia3: Some(v1::Ia3Config::default()),
        ..spec(last(1))
    };
    for (spec, expected) in [
        (next(last(2)), "found all modules of layers [1], unfrozen"),
        (both, "spec.unfreeze: ia3 is set too"),
        (spec(last(9)), "unfreeze.last_layers: 9 is outside"),
    ] {
        let (_, reason) = refused(acme.create_training_job(create(&acme, spec)).await);
        assert!(reason.contains(expected), "{reason}");
    }
    server.ended().await;
}

#[tokio::test]
async fn the_whole_model_is_unfrozen_and_served_in_company() {
    let server = TestServer::start(&[]).await;
    let acme = tenant(server.addr, "acme").await;
    let whole = |adapter: &str, unfreeze: v1::UnfreezeConfig| {
        let mut spec = supervised(&acme, adapter, lessons(), 30);
        spec.lora = None;
        spec.unfreeze = Some(unfreeze);
        spec.hyper_parameters.as_mut().unwrap().learning_rate = Some(0.01);
        spec
    };
    let all = v1::UnfreezeConfig {
        whole_model: true,
        ..Default::default()
    };
    let outside = |modules: &[&str]| v1::UnfreezeConfig {
        modules: modules.iter().map(|m| (*m).to_owned()).collect(),
        ..Default::default()
    };
    let job = succeeded(&acme, &start(&acme, whole("a", all.clone())).await).await;
    let decided = job.spec.unwrap().unfreeze.unwrap();
    assert!(!decided.whole_model && decided.layers == [0, 1]);
    assert_eq!(decided.modules, ["embed_tokens", "norm"]);
    let version = acme.get_adapter_version(&job.version).await.unwrap();
    assert_eq!(version.unfreeze, Some(decided));
    let norm = start(&acme, whole("norm", outside(&["norm"]))).await;
    succeeded(&acme, &norm).await;
    let lora = start(&acme, supervised(&acme, "lora", lessons(), 30)).await;
    succeeded(&acme, &lora).await;

    // Each alone, then all at once.
    let adapters = [Some("a"), None, Some("norm"), Some("lora")];
    let mut alone = Vec::new();
    for adapter in adapters {
        alone.push(answer(&acme, adapter, "case 3", 24).await);
    }
    assert_ne!(alone[0].0, alone[1].0, "nothing was learnt");
    let ask = |at: usize| answer(&acme, adapters[at % 4], "case 3", 24);
    let together = futures::future::join_all((0..16).map(ask)).await;
    for (at, found) in together.into_iter().enumerate() {
        assert_eq!(found, alone[at % 4], "request {at}");
    }

    let also = v1::UnfreezeConfig {
        last_layers: Some(1),
        ..all
    };
    for (unfreeze, expected) in [
        (also, "unfreeze.whole_model: last_layers is set too"),
        (outside(&["lm_head"]), "embed_tokens is its output head too"),
        (outside(&["w1"]), "\"w1\" is none of"),
    ] {
        let asked = create(&acme, whole("b", unfreeze));
        let (_, reason) = refused(acme.create_training_job(asked).await);
        assert!(reason.contains(expected), "{reason}");
    }
    server.ended().await;
}
