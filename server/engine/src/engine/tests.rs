//! The engine whole, on a tiny random model: what runs together is what runs alone, and everything goes back.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod company;
mod constraint;
mod device;
mod fixture;
mod merging;
mod mixtures;
mod on_device;
mod training;

use std::time::{Duration, Instant};

use crate::config::EngineConfig;
use crate::error::EngineError;
use crate::model_runner::POISON;
use crate::request::{
    Event, FinishReason, Generate, Output, Pooling, RequestKind, SamplingParams, StopConditions,
};
use fixture::{Fixture, Reply, collect, eventually, fixture, prompt, small};

fn sampled(prompt: Vec<u32>, seed: u64, max_tokens: usize) -> RequestKind {
    RequestKind::Generate(Generate {
        prompt,
        sampling: SamplingParams {
            temperature: 0.9,
            top_p: 0.95,
            repetition_penalty: 1.1,
            seed: Some(seed),
            ..SamplingParams::default()
        },
        stop: StopConditions {
            max_tokens: Some(max_tokens),
            ignore_eos: true,
            ..StopConditions::default()
        },
        logprobs: Some(2),
        constraint: None,
    })
}

fn greedy(prompt: Vec<u32>, max_tokens: usize, stop: StopConditions) -> RequestKind {
    RequestKind::Generate(Generate {
        prompt,
        stop: StopConditions {
            max_tokens: Some(max_tokens),
            ignore_eos: true,
            ..stop
        },
        ..Generate::default()
    })
}

/// Work of every kind on three adapters and the base: `(adapter, kind)`.
fn mixed_work() -> Vec<(Option<usize>, RequestKind)> {
    let mut work = Vec::new();
    for i in 0..8 {
        let adapter = [None, Some(0), Some(1), Some(2)][i % 4];
        work.push((adapter, sampled(prompt(i as u64, 3 + 7 * i), i as u64, 12)));
    }
    let inputs: Vec<_> = (0..3)
        .map(|i| prompt(50 + i, 20 + 9 * i as usize))
        .collect();
    work.push((
        Some(2),
        RequestKind::Classify {
            inputs: inputs.clone(),
        },
    ));
    for pooling in [Pooling::Last, Pooling::Mean] {
        work.push((
            Some(1),
            RequestKind::Embed {
                inputs: inputs.clone(),
                pooling,
                normalize: true,
            },
        ));
    }
    let continuations = vec![prompt(60, 1), prompt(61, 5)];
    work.push((
        Some(0),
        RequestKind::Score {
            prompt: prompt(62, 33),
            continuations: continuations.clone(),
        },
    ));
    work.extend(constraint::work());
    let labels = vec!["x".to_owned(), "y".to_owned()];
    work.push((
        None,
        RequestKind::LabelLikelihood {
            prompts: inputs,
            labels,
            label_tokens: continuations,
        },
    ));
    work
}

fn all_alone(fixture: &Fixture) -> Vec<Reply> {
    let run = |(adapter, kind)| fixture.ask(adapter, kind);
    mixed_work().into_iter().map(run).collect()
}

#[test]
fn a_mixed_batch_is_each_alone() {
    let alone = all_alone(&fixture(EngineConfig::default()));
    // Few rows a step: prompts are cut, decodes and prefills mix.
    let together = fixture(EngineConfig {
        max_num_seqs: 16,
        max_num_batched_tokens: 24,
        prefill_chunk_tokens: 7,
        ..small()
    });
    let receivers: Vec<_> = mixed_work()
        .into_iter()
        .map(|(adapter, kind)| together.submit(adapter, kind))
        .collect();
    for (index, (receiver, alone)) in receivers.into_iter().zip(alone).enumerate() {
        let reply = collect(receiver);
        assert!(reply.error.is_none(), "{index}: {:?}", reply.error);
        assert_eq!(reply.results(), alone.results(), "request {index}");
    }
    assert!(together.engine.stats().steps > 20);
}

#[test]
fn preempted_sequences_give_the_same_tokens() {
    let work = || {
        // Each of the long ones begins with 2 blocks and ends with 4.
        let long = |i| (Some(i as usize % 3), sampled(prompt(70 + i, 20), i, 40));
        let long: Vec<_> = (0..6).map(long).collect();
        [long, mixed_work()].concat()
    };
    let roomy = fixture(EngineConfig::default());
    let alone: Vec<Reply> = work()
        .into_iter()
        .map(|(adapter, kind)| roomy.ask(adapter, kind))
        .collect();
    let tight = fixture(EngineConfig {
        kv_blocks: 7,
        ..small()
    });
    let receivers: Vec<_> = work()
        .into_iter()
        .map(|(adapter, kind)| tight.submit(adapter, kind))
        .collect();
    for (receiver, alone) in receivers.into_iter().zip(alone) {
        assert_eq!(collect(receiver).results(), alone.results());
    }
    assert!(
        tight.engine.stats().preemptions > 0,
        "the test needs too few blocks"
    );
    tight.settled();
}

#[test]
fn a_warm_prefix_changes_no_bit() {
    let cold = fixture(EngineConfig {
        prefix_cache: false,
        ..EngineConfig::default()
    });
    let warm = fixture(EngineConfig::default());
    // The second time every whole block of every prompt is known; what needs all states computes them all.
    let (first, second) = (all_alone(&warm), all_alone(&warm));
    let mut found = 0;
    for ((cold, first), second) in all_alone(&cold).iter().zip(&first).zip(&second) {
        assert_eq!(first.results(), cold.results());
        assert_eq!(second.results(), cold.results());
        assert_eq!(cold.usage.unwrap().cached_input_tokens, 0);
        let usage = second.usage.unwrap();
        assert!(usage.cached_input_tokens < usage.input_tokens);
        found += usage.cached_input_tokens;
    }
    let again = warm.engine.stats();
    assert!(
        found > 100 && again.cached_input_tokens >= found as u64,
        "{found} found"
    );
    assert!(again.kv_blocks_kept > 10);
    assert_eq!(cold.engine.stats().kv_blocks_kept, 0);
    warm.settled();
}

#[test]
fn a_long_prompt_is_cached_for_its_tenant_and_version_alone() {
    let fixture = fixture(EngineConfig::default());
    let text = prompt(9, 70);
    let ask = |tenant: &str, adapter, tail: u64| {
        let mut whole = text.clone();
        whole.extend(prompt(tail, 9));
        let mut request = fixture.request(adapter, sampled(whole, 1, 4));
        request.tenant = tenant.into();
        let usage = collect(fixture.engine.submit(request).unwrap()).usage;
        usage.unwrap().cached_input_tokens
    };
    assert_eq!(ask("a", Some(0), 1), 0);
    assert_eq!(ask("a", Some(0), 2), 64, "the shared part, in whole blocks");
    assert_eq!(ask("a", Some(0), 1), 64, "the block after it is not whole");
    assert_eq!(ask("b", Some(0), 1), 0, "another tenant");
    assert_eq!(ask("a", Some(1), 1), 0, "another version");
    assert_eq!(ask("a", None, 1), 0, "the base");
    assert_eq!(ask("a", None, 3), 64);
}

#[test]
fn a_step_that_panicked_leaves_nothing_to_find() {
    let fixture = fixture(EngineConfig::default());
    let text = prompt(3, 40);
    let ask = |mut text: Vec<u32>, poison: bool| {
        if poison {
            text[32..36].copy_from_slice(&POISON);
        }
        fixture.ask(Some(0), sampled(text, 1, 6))
    };
    let cold = ask(text.clone(), false);
    // 32 tokens are known; the step that begins with the poison fails.
    assert!(ask(text.clone(), true).error.is_some());
    let again = ask(text.clone(), true);
    assert!(again.error.is_some(), "the block that failed is not known");
    let warm = ask(text, false);
    assert_eq!(warm.usage.unwrap().cached_input_tokens, 32);
    assert_eq!(warm.results(), cold.results());
    fixture.settled();
}

#[test]
fn adapters_do_not_touch_the_base() {
    let pure = fixture(EngineConfig::default());
    let mixed = fixture(EngineConfig::default());
    let kind = || sampled(prompt(1, 30), 5, 20);
    let alone = pure.ask(None, kind());
    let others: Vec<_> = (0..3).map(|i| mixed.submit(Some(i), kind())).collect();
    let beside = mixed.ask(None, kind());
    // Log-probabilities are equal bit for bit, not only the tokens.
    assert_eq!(beside.results(), alone.results());
    for other in others {
        assert_ne!(
            collect(other).results(),
            alone.results(),
            "an adapter changes the output"
        );
    }
}

#[test]
fn a_storm_of_cancels_leaves_nothing_behind() {
    let fixture = fixture(EngineConfig {
        kv_blocks: 40,
        ..small()
    });
    for round in 0..6_u64 {
        let mut receivers: Vec<_> = (0..20_u64)
            .map(|i| {
                let adapter = [None, Some(0), Some(1), Some(2)][(i % 4) as usize];
                let mut kind = sampled(prompt(i, 10 + i as usize), i, 60);
                if let RequestKind::Generate(generate) = &mut kind {
                    generate.sampling.n = 1 + (i % 3) as usize;
                }
                fixture.submit(adapter, kind)
            })
            .collect();
        std::thread::sleep(Duration::from_millis(3 * round));
        let mut index = 0;
        receivers.retain(|_| {
            index += 1;
            index % 5 == 0
        });
        for receiver in receivers {
            assert!(collect(receiver).error.is_none());
        }
    }
    fixture.settled();
    assert!(
        fixture
            .ask(Some(1), sampled(prompt(1, 9), 1, 5))
            .error
            .is_none()
    );
}

#[test]
fn deadlines_hold_in_the_queue_and_in_decode() {
    let fixture = fixture(EngineConfig {
        max_num_seqs: 1,
        max_num_batched_tokens: 64,
        ..small()
    });
    let mut kind = sampled(prompt(1, 10), 1, 900);
    if let RequestKind::Generate(generate) = &mut kind {
        generate.sampling.n = 16;
    }
    let mut long = fixture.request(None, kind);
    long.deadline = Some(Instant::now() + Duration::from_millis(150));
    let long = fixture.engine.submit(long).unwrap();
    let mut queued = fixture.request(None, sampled(prompt(2, 10), 1, 5));
    queued.deadline = Some(Instant::now() + Duration::from_millis(20));
    let queued = collect(fixture.engine.submit(queued).unwrap());
    assert!(
        matches!(queued.error, Some(EngineError::DeadlineInQueue { .. })),
        "{:?}",
        queued.error
    );
    let long = collect(long);
    match long.error {
        Some(EngineError::DeadlineInDecode { output_tokens }) => {
            let delivered: usize = (0..16).map(|i| long.tokens(i).len()).sum();
            assert_eq!(output_tokens, delivered);
            assert!(output_tokens > 0);
        }
        other => panic!("{other:?}"),
    }
    fixture.settled();
}

#[test]
fn more_adapters_than_memory_take_turns() {
    let roomy = fixture(EngineConfig::default());
    let largest = roomy.engine_bytes_of(2);
    let tight = fixture(EngineConfig {
        adapter_bytes: largest * 3 / 2,
        ..small()
    });
    let adapters = tight.adapters();
    let work: Vec<_> = (0..30_u64)
        .map(|i| ((i as usize * 7) % adapters, sampled(prompt(i, 8), i, 6)))
        .collect();
    let receivers: Vec<_> = work
        .iter()
        .map(|(adapter, kind)| tight.submit(Some(*adapter), kind.clone()))
        .collect();
    for (receiver, (adapter, kind)) in receivers.into_iter().zip(work) {
        let reply = collect(receiver);
        assert!(reply.error.is_none(), "{:?}", reply.error);
        assert_eq!(reply.results(), roomy.ask(Some(adapter), kind).results());
        let stats = tight.engine.stats();
        assert!(stats.adapter_bytes_used <= stats.adapter_bytes);
    }
    tight.settled();
}

#[test]
fn adapters_that_cannot_be_served_are_refused_with_the_reason() {
    let fixture = fixture(EngineConfig::default());
    let ask = |digest| {
        let mut request = fixture.request(None, sampled(prompt(1, 4), 1, 2));
        request.target = vec![crate::request::TargetVersion {
            digest,
            weight: 1.0,
        }];
        collect(fixture.engine.submit(request).unwrap()).error
    };
    assert!(matches!(
        ask(fixture.unknown()),
        Some(EngineError::AdapterNotFound { .. })
    ));
    assert!(matches!(
        ask(fixture.lying()),
        Some(EngineError::ArtifactCorrupt { .. })
    ));
    match ask(fixture.broken()) {
        Some(EngineError::AdapterIncompatible { report, .. }) => assert!(report.errors() > 0),
        other => panic!("{other:?}"),
    }
    let mut request = fixture.request(Some(0), sampled(prompt(1, 4), 1, 2));
    request.require_resident = true;
    let error = collect(fixture.engine.submit(request).unwrap()).error;
    assert!(matches!(
        error,
        Some(EngineError::AdapterNotResident { .. })
    ));
    let error = fixture
        .ask(
            Some(0),
            RequestKind::Classify {
                inputs: vec![prompt(1, 4)],
            },
        )
        .error;
    assert!(
        matches!(error, Some(EngineError::Unsupported { .. })),
        "no head"
    );
    fixture.settled();
}

#[test]
fn states_that_are_not_finite_end_every_kind_of_request() {
    let ask = |checked: bool, kind: RequestKind| {
        let fixture = fixture(EngineConfig {
            adapter_self_check: checked,
            ..small()
        });
        let mut request = fixture.request(None, kind);
        request.target = vec![crate::request::TargetVersion {
            digest: fixture.overflowing(),
            weight: 1.0,
        }];
        let error = collect(fixture.engine.submit(request).unwrap()).error;
        fixture.settled();
        error.unwrap()
    };
    let embed = |pooling| RequestKind::Embed {
        inputs: vec![prompt(3, 30)],
        pooling,
        normalize: false,
    };
    let score = RequestKind::Score {
        prompt: prompt(4, 20),
        continuations: vec![prompt(5, 3)],
    };
    let labels = RequestKind::LabelLikelihood {
        prompts: vec![prompt(4, 9)],
        labels: vec!["x".to_owned()],
        label_tokens: vec![prompt(5, 2)],
    };
    let classify = RequestKind::Classify {
        inputs: vec![prompt(2, 7)],
    };
    // The last target is no token of its sequence; a mean fails with its first chunk.
    for (kind, expected) in [
        (sampled(prompt(1, 10), 1, 4), 10),
        (greedy(prompt(1, 40), 4, StopConditions::default()), 40),
        (score, 22),
        (labels, 10),
        (classify, 7),
        (embed(Pooling::Last), 30),
        (embed(Pooling::Mean), 30),
    ] {
        match ask(false, kind) {
            EngineError::NonFiniteLogits { position } => assert_eq!(position, expected),
            other => panic!("{other}"),
        }
    }
    let error = ask(true, sampled(prompt(1, 10), 1, 4));
    assert!(
        matches!(error, EngineError::AdapterSelfCheck { .. }),
        "{error}"
    );
}

#[test]
fn candidates_are_sequences_of_their_own() {
    let fixture = fixture(EngineConfig::default());
    let kind = |n| {
        let mut kind = sampled(prompt(3, 40), 9, 10);
        if let RequestKind::Generate(generate) = &mut kind {
            generate.sampling.n = n;
        }
        kind
    };
    let (one, four) = (fixture.ask(Some(1), kind(1)), fixture.ask(Some(1), kind(4)));
    assert_eq!(
        one.tokens(0),
        four.tokens(0),
        "the first does not depend on n"
    );
    let distinct: std::collections::BTreeSet<_> = (0..4).map(|i| four.tokens(i)).collect();
    assert_eq!(distinct.len(), 4);
    assert_eq!(four.usage.unwrap().input_tokens, 40);
    assert_eq!(four.usage.unwrap().output_tokens, 40);
    assert!(
        four.finished
            .iter()
            .all(|candidate| candidate.finish_reason == FinishReason::Length)
    );
}

#[test]
fn a_stop_string_ends_the_text_before_it() {
    let fixture = fixture(EngineConfig::default());
    let whole = fixture.ask(None, greedy(prompt(4, 12), 60, StopConditions::default()));
    let text = whole.text(0);
    let characters: Vec<char> = text.chars().collect();
    let stop: String = characters[characters.len() / 2..characters.len() / 2 + 3]
        .iter()
        .collect();
    let stopped = |include| StopConditions {
        stop: vec!["never this".to_owned(), stop.clone()],
        include_stop_str: include,
        ..StopConditions::default()
    };
    let at = text.find(&stop).unwrap();
    for include in [false, true] {
        let reply = fixture.ask(None, greedy(prompt(4, 12), 60, stopped(include)));
        assert_eq!(
            reply.text(0),
            text[..if include { at + stop.len() } else { at }]
        );
        assert_eq!(reply.finished[0].finish_reason, FinishReason::StopString);
        assert_eq!(
            reply.finished[0].stop_string.as_deref(),
            Some(stop.as_str())
        );
    }
    let token = whole.tokens(0)[5];
    let first = whole
        .tokens(0)
        .iter()
        .position(|&other| other == token)
        .unwrap();
    let by_id = StopConditions {
        stop_token_ids: vec![token],
        ..StopConditions::default()
    };
    let reply = fixture.ask(None, greedy(prompt(4, 12), 60, by_id.clone()));
    assert_eq!(reply.tokens(0).len(), first + 1);
    assert_eq!(reply.finished[0].finish_reason, FinishReason::StopToken);
    let late = StopConditions {
        min_tokens: 30,
        ..by_id
    };
    let reply = fixture.ask(None, greedy(prompt(4, 12), 60, late));
    assert!(reply.tokens(0).len() > 30 && !reply.tokens(0)[..30].contains(&token));
}

#[test]
fn likelihood_is_the_sum_of_scores() {
    let fixture = fixture(EngineConfig::default());
    let (start, labels) = (
        prompt(7, 20),
        vec![prompt(8, 2), prompt(9, 1), prompt(10, 4)],
    );
    let scores = fixture.ask(
        Some(0),
        RequestKind::Score {
            prompt: start.clone(),
            continuations: labels.clone(),
        },
    );
    let names: Vec<String> = ["a", "b", "c"].map(str::to_owned).into();
    let kind = RequestKind::LabelLikelihood {
        prompts: vec![start.clone()],
        labels: names,
        label_tokens: labels.clone(),
    };
    let reply = fixture.ask(Some(0), kind);
    let Output::Classes {
        probabilities,
        logits,
        labels: names,
        ..
    } = &reply.outputs[&0]
    else {
        panic!()
    };
    assert_eq!(names[2], "c");
    assert!((probabilities.iter().sum::<f32>() - 1.0).abs() < 1e-6);
    for (index, logit) in logits.iter().enumerate() {
        let Output::Score(tokens) = &scores.outputs[&index] else {
            panic!()
        };
        let scored: Vec<u32> = tokens.iter().map(|token| token.token).collect();
        assert_eq!(scored, labels[index]);
        let sum: f32 = tokens.iter().map(|token| token.logprob).sum();
        assert!((sum - logit).abs() < 1e-4);
    }
    // A generation's own log-probabilities are the scores of its tokens.
    let generated = fixture.ask(Some(0), sampled(start.clone(), 3, 6));
    let kind = RequestKind::Score {
        prompt: start,
        continuations: vec![generated.tokens(0)],
    };
    let Output::Score(tokens) = &fixture.ask(Some(0), kind).outputs[&0] else {
        panic!()
    };
    let own: Vec<f32> = generated
        .logprobs(0)
        .iter()
        .map(|token| token.logprob)
        .collect();
    assert_eq!(
        tokens.iter().map(|token| token.logprob).collect::<Vec<_>>(),
        own
    );
}

#[test]
fn a_slow_reader_holds_up_nobody_and_is_cut_off() {
    let fixture = fixture(EngineConfig {
        event_buffer: 8,
        slow_reader_limit: Duration::from_millis(200),
        ..small()
    });
    let mut slow = fixture.submit(None, sampled(prompt(1, 5), 1, 300));
    let quick = fixture.ask(None, sampled(prompt(2, 5), 1, 100));
    assert_eq!(quick.tokens(0).len(), 100);
    std::thread::sleep(Duration::from_millis(400));
    let mut last = None;
    while let Some(event) = slow.blocking_recv() {
        last = Some(event);
    }
    assert!(
        matches!(last, Some(Event::Failed(EngineError::SlowReader { .. }))),
        "{last:?}"
    );
    fixture.settled();
}

#[test]
fn a_full_queue_and_fields_out_of_range_are_refused() {
    let fixture = fixture(EngineConfig {
        max_num_seqs: 1,
        max_queue: 2,
        ..small()
    });
    let long = || sampled(prompt(1, 5), 1, 400);
    let mut held = Vec::new();
    let refused =
        (0..20).find_map(
            |_| match fixture.engine.submit(fixture.request(None, long())) {
                Ok(receiver) => {
                    held.push(receiver);
                    None
                }
                Err(error) => Some(error),
            },
        );
    assert!(matches!(
        refused,
        Some(EngineError::Overloaded { limit: 2, .. })
    ));
    drop(held);
    fixture.settled();
    let refused = |kind| {
        fixture
            .engine
            .submit(fixture.request(None, kind))
            .unwrap_err()
    };
    assert!(matches!(
        refused(sampled(Vec::new(), 1, 4)),
        EngineError::InvalidField {
            field: "prompt",
            ..
        }
    ));
    assert!(matches!(
        refused(sampled(vec![1_000_000], 1, 4)),
        EngineError::InvalidField {
            field: "prompt",
            ..
        }
    ));
    assert!(matches!(
        refused(sampled(prompt(1, 500), 1, 4000)),
        EngineError::ContextLengthExceeded { .. }
    ));
}

#[test]
fn a_panic_in_a_step_costs_one_request() {
    let fixture = fixture(EngineConfig::default());
    // Several, so that the repeated step keeps the states of those before.
    let good = |i: u64| (Some(i as usize % 3), sampled(prompt(i, 5), i, 30));
    let ask = |(adapter, kind)| fixture.ask(adapter, kind);
    let alone: Vec<Reply> = (0..4).map(|i| ask(good(i))).collect();
    let submit = |(adapter, kind)| fixture.submit(adapter, kind);
    let receivers: Vec<_> = (0..4).map(|i| submit(good(i))).collect();
    let mut poisoned = POISON.to_vec();
    poisoned.extend(prompt(2, 6));
    let bad = fixture.ask(Some(0), sampled(poisoned, 1, 5));
    assert!(
        matches!(bad.error, Some(EngineError::Internal { .. })),
        "{:?}",
        bad.error
    );
    for (receiver, alone) in receivers.into_iter().zip(alone) {
        assert_eq!(collect(receiver).results(), alone.results());
    }
    assert!(fixture.engine.stats().panics > 0);
    fixture.settled();
}

#[test]
fn activation_and_residency_are_the_engines_own_book() {
    let fixture = fixture(EngineConfig::default());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        let digest = fixture.digest(0);
        let residency = fixture.engine.activate(digest).await.unwrap();
        assert!(residency.bytes > 0 && residency.leases == 0);
        assert_eq!(fixture.engine.residency().await.unwrap().len(), 1);
        fixture.engine.deactivate(digest).await.unwrap();
        assert!(fixture.engine.residency().await.unwrap().is_empty());
        assert!(fixture.engine.activate(fixture.unknown()).await.is_err());
    });
    eventually("bytes back", || {
        fixture.engine.stats().adapter_bytes_used == 0
    });
}

#[test]
fn a_drain_finishes_what_runs_and_refuses_the_rest() {
    let fixture = fixture(EngineConfig::default());
    let running = fixture.submit(Some(0), sampled(prompt(1, 5), 1, 50));
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime
        .block_on(fixture.engine.drain(Duration::from_secs(20)))
        .unwrap();
    assert_eq!(collect(running).tokens(0).len(), 50);
    let refused = fixture
        .engine
        .submit(fixture.request(None, sampled(prompt(1, 5), 1, 5)));
    assert!(matches!(refused, Err(EngineError::Draining)));
}
