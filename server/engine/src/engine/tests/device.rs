//! The engine on the CUDA operations, in their emulator: the same alone and in company, near the processor's answers, with steps
//! replayed while sequences and adapters come and go; what a device has no room for costs its own request.

use std::sync::Arc;

use espalier_adapters::ops::cuda::driver::Element;

use super::fixture::{eventually, fixture_on};
use super::training::{start, to_end};
use super::*;
use crate::model::tests::device::{Watched, emulated};
use crate::train::{JobEvent, TrainEvent, TrainingJob};

/// Memory of a device that nothing is to be short of.
const ROOMY: usize = 1 << 30;
/// Log-probabilities and states near one, after sums in another order.
const NEAR: f32 = 1e-3;

/// Steps are short: an emulated row costs as much as a thousand real ones.
fn little() -> EngineConfig {
    EngineConfig {
        max_num_batched_tokens: 64,
        prefill_chunk_tokens: 24,
        kv_blocks: 48,
        ..small()
    }
}

fn there(element: Element, config: EngineConfig) -> (Fixture, Arc<Watched>) {
    let (ops, device) = emulated(element, ROOMY);
    (fixture_on(config, ops), device)
}

/// Greedy; with log-probabilities the host chooses, without them the device does.
fn likeliest(prompt: Vec<u32>, max_tokens: usize, logprobs: Option<usize>) -> RequestKind {
    let mut kind = greedy(prompt, max_tokens, StopConditions::default());
    if let RequestKind::Generate(generate) = &mut kind {
        generate.logprobs = logprobs;
    }
    kind
}

/// Drawn by the device.
fn drawn(prompt: Vec<u32>, seed: u64, max_tokens: usize) -> RequestKind {
    let mut kind = likeliest(prompt, max_tokens, None);
    if let RequestKind::Generate(generate) = &mut kind {
        generate.sampling = SamplingParams {
            temperature: 0.9,
            top_p: 0.95,
            seed: Some(seed),
            ..SamplingParams::default()
        };
    }
    kind
}

#[track_caller]
fn near(found: &[f32], exact: &[f32], bound: f32) {
    assert_eq!(found.len(), exact.len());
    for (found, exact) in found.iter().zip(exact) {
        let off = (found - exact).abs();
        assert!(off < bound * (1.0 + exact.abs()), "{found} beside {exact}");
    }
}

/// Greedy tokens follow the processor's up to where it was of two minds; how many do.
#[track_caller]
fn follows(found: &Reply, exact: &Reply, bound: f32) -> usize {
    assert!(found.error.is_none(), "{:?}", found.error);
    let (found, exact) = (found.logprobs(0), exact.logprobs(0));
    assert_eq!(found.len(), exact.len());
    for (index, (found, exact)) in found.iter().zip(&exact).enumerate() {
        let sure = exact.top[0].1 - exact.top[1].1 > 4.0 * bound;
        if found.token != exact.token {
            assert!(!sure, "token {index}: {found:?}, not {exact:?}");
            return index;
        }
        near(&[found.logprob], &[exact.logprob], bound);
    }
    found.len()
}

fn numbers(reply: &Reply) -> Vec<f32> {
    assert!(reply.error.is_none(), "{:?}", reply.error);
    let outputs = reply.outputs.values().flat_map(|output| match output {
        Output::Classes { logits, .. } => logits.clone(),
        Output::Embedding(values) => values.clone(),
        Output::Score(tokens) => tokens.iter().map(|token| token.logprob).collect(),
    });
    outputs.collect()
}

/// Every kind of work once, on three adapters and the base.
fn work() -> Vec<(Option<usize>, RequestKind)> {
    let inputs = vec![prompt(50, 20), prompt(51, 5)];
    let embed = |pooling| RequestKind::Embed {
        inputs: inputs.clone(),
        pooling,
        normalize: true,
    };
    let continuations = vec![prompt(60, 1), prompt(61, 5)];
    let score = RequestKind::Score {
        prompt: prompt(62, 19),
        continuations: continuations.clone(),
    };
    let labels = RequestKind::LabelLikelihood {
        prompts: inputs.clone(),
        labels: vec!["x".to_owned(), "y".to_owned()],
        label_tokens: continuations,
    };
    let adapters = [None, Some(0), Some(1), Some(2)];
    let mut work: Vec<_> = adapters
        .into_iter()
        .enumerate()
        .map(|(i, adapter)| (adapter, likeliest(prompt(i as u64, 3 + 9 * i), 8, Some(2))))
        .collect();
    work.push((Some(0), drawn(prompt(7, 11), 7, 8)));
    work.push((
        Some(2),
        RequestKind::Classify {
            inputs: inputs.clone(),
        },
    ));
    work.push((Some(1), embed(Pooling::Last)));
    work.push((None, embed(Pooling::Mean)));
    work.push((Some(0), score));
    work.push((Some(1), labels));
    work
}

fn alone(fixture: &Fixture) -> Vec<Reply> {
    let ask = |(adapter, kind)| fixture.ask(adapter, kind);
    work().into_iter().map(ask).collect()
}

#[test]
fn every_kind_of_work_is_the_same_alone_and_together_and_near_the_processors() {
    let exact = alone(&fixture(EngineConfig::default()));
    for (element, bound) in [(Element::F32, NEAR), (Element::Bf16, 0.1)] {
        let (fixture, _) = there(
            element,
            EngineConfig {
                prefix_cache: false,
                ..little()
            },
        );
        let alone = alone(&fixture);
        let submit = |(adapter, kind)| fixture.submit(adapter, kind);
        let receivers: Vec<_> = work().into_iter().map(submit).collect();
        let mut followed = 0;
        for (index, receiver) in receivers.into_iter().enumerate() {
            let (together, alone, exact) = (collect(receiver), &alone[index], &exact[index]);
            assert!(together.error.is_none(), "{index}: {:?}", together.error);
            assert_eq!(together.results(), alone.results(), "request {index}");
            if exact.logprobs(0).is_empty() {
                near(&numbers(alone), &numbers(exact), bound);
            } else {
                followed += follows(alone, exact, bound);
            }
        }
        assert!(followed > 16, "{followed} tokens of 32 in {element:?}");
        assert_eq!(fixture.engine.stats().panics, 0);
        fixture.settled();
    }
}

/// What the device draws greedily is what the host would; what it draws by chance depends on seed and place alone.
#[test]
fn tokens_that_the_device_draws_do_not_know_their_neighbours() {
    let (fixture, _) = there(Element::F32, little());
    let kinds = [
        likeliest(prompt(1, 9), 10, None),
        drawn(prompt(2, 5), 4, 10),
        drawn(prompt(2, 5), 5, 10),
        sampled(prompt(3, 7), 3, 10),
    ];
    let alone: Vec<Reply> = kinds
        .iter()
        .map(|kind| fixture.ask(Some(0), kind.clone()))
        .collect();
    let chosen = fixture.ask(Some(0), likeliest(prompt(1, 9), 10, Some(1)));
    assert_eq!(alone[0].tokens(0), chosen.tokens(0));
    assert_ne!(alone[1].tokens(0), alone[2].tokens(0), "seeds matter");
    let submit = |kind: &RequestKind| fixture.submit(Some(0), kind.clone());
    let receivers: Vec<_> = kinds.iter().map(submit).collect();
    for (receiver, alone) in receivers.into_iter().zip(&alone) {
        let reply = collect(receiver);
        assert!(reply.error.is_none(), "{:?}", reply.error);
        assert_eq!(reply.results(), alone.results());
    }
}

/// Long decodes over the borders of blocks and splits, while short requests come and go and adapters take turns in memory.
#[test]
fn replayed_steps_are_right_while_sequences_and_adapters_come_and_go() {
    let long = || {
        [
            (Some(0), likeliest(prompt(20, 118), 24, Some(2))),
            (Some(1), likeliest(prompt(21, 10), 30, Some(2))),
            (None, likeliest(prompt(22, 27), 28, Some(2))),
        ]
    };
    let exact: Vec<Reply> = {
        let fixture = fixture(EngineConfig::default());
        long()
            .into_iter()
            .map(|(adapter, kind)| fixture.ask(adapter, kind))
            .collect()
    };
    let (quiet, device) = there(Element::F32, little());
    let alone: Vec<Reply> = long()
        .into_iter()
        .map(|(adapter, kind)| quiet.ask(adapter, kind))
        .collect();
    for (alone, exact) in alone.iter().zip(&exact) {
        follows(alone, exact, NEAR);
    }
    let steps = quiet.engine.stats().steps as usize;
    let (recorded, replayed) = (device.recorded(), device.replayed());
    assert!(
        replayed > steps / 2 && recorded < steps / 8,
        "{recorded} recorded, {replayed} replayed in {steps} steps"
    );
    let bytes: Vec<usize> = (0..3)
        .map(|adapter| quiet.engine_bytes_of(adapter))
        .collect();
    drop(quiet);

    let (busy, device) = there(
        Element::F32,
        EngineConfig {
            // The two long ones and one more.
            adapter_bytes: bytes.iter().sum::<usize>() + 64,
            ..little()
        },
    );
    let receivers: Vec<_> = long()
        .into_iter()
        .map(|(adapter, kind)| busy.submit(adapter, kind))
        .collect();
    for round in 0..2 {
        for adapter in [2, 3, 5, 4] {
            let kind = likeliest(prompt(30 + adapter as u64, 6), 2 + round, None);
            let reply = busy.ask(Some(adapter), kind);
            assert!(reply.error.is_none(), "{:?}", reply.error);
        }
    }
    for (receiver, alone) in receivers.into_iter().zip(&alone) {
        assert_eq!(collect(receiver).results(), alone.results());
    }
    // After all that, in the memory of those that are gone.
    for ((adapter, kind), alone) in long().into_iter().zip(&alone) {
        assert_eq!(busy.ask(adapter, kind).results(), alone.results());
    }
    assert!(device.replayed() > 20, "{} replayed", device.replayed());
    busy.settled();
}

/// A warm prefix, candidates that share one, several adapters at once and too few blocks: nothing changes a bit.
#[test]
fn prefixes_candidates_mixtures_and_preemptions_change_no_bit_there_either() {
    let (cold, _) = there(
        Element::Bf16,
        EngineConfig {
            prefix_cache: false,
            ..little()
        },
    );
    let text = |seed| sampled(prompt(seed, 20), seed, 26);
    let several = || {
        let mut kind = sampled(prompt(9, 37), 2, 8);
        if let RequestKind::Generate(generate) = &mut kind {
            generate.sampling.n = 3;
        }
        kind
    };
    let parts = [(0, 0.7), (1, -0.3)];
    let mixed = |fixture: &Fixture| {
        let request = fixture.mixture(&parts, text(1));
        collect(fixture.engine.submit(request).unwrap())
    };
    let (one, two) = (cold.ask(Some(0), text(1)), cold.ask(Some(1), text(2)));
    let (three, both) = (cold.ask(Some(0), several()), mixed(&cold));
    assert!(both.error.is_none(), "{:?}", both.error);
    assert_ne!(both.logprobs(0), one.logprobs(0));

    let (tight, _) = there(
        Element::Bf16,
        EngineConfig {
            // Two of them end with three blocks each.
            kv_blocks: 5,
            ..little()
        },
    );
    let submit = |(adapter, kind)| tight.submit(Some(adapter), kind);
    let work = [(0, text(1)), (1, text(2)), (0, several()), (0, text(1))];
    let receivers = work.map(submit);
    for (receiver, expected) in receivers.into_iter().zip([&one, &two, &three, &one]) {
        let reply = collect(receiver);
        assert_eq!(reply.results(), expected.results());
        assert_eq!(reply.tokens(2), expected.tokens(2));
    }
    assert_eq!(mixed(&tight).results(), both.results());
    assert_eq!(tight.ask(Some(0), text(1)).results(), one.results());
    let stats = tight.engine.stats();
    assert!(
        stats.cached_input_tokens > 0 && stats.preemptions > 0,
        "{} cached, {} preempted",
        stats.cached_input_tokens,
        stats.preemptions
    );
    tight.settled();
}

/// The losses of the next steps, at most so many, and the last event before.
fn losses(job: &mut TrainingJob, most: usize) -> (Vec<f32>, Option<JobEvent>) {
    let (mut losses, mut last) = (Vec::new(), None);
    while losses.len() < most {
        let Some(event) = job.events.blocking_recv() else {
            break;
        };
        if let JobEvent::Progress(TrainEvent::Step(step)) = &event {
            losses.push(step.loss as f32);
        }
        last = Some(event);
    }
    (losses, last)
}

#[test]
fn training_and_serving_do_not_meet_there_either() {
    let kind = || likeliest(prompt(5, 10), 12, Some(2));
    let (quiet, _) = there(Element::F32, little());
    let (_, _, last) = to_end(&mut start(&quiet, "a", 4, None));
    let Some(JobEvent::Finished {
        finished: expected, ..
    }) = last
    else {
        panic!("{last:?}")
    };
    let reply = quiet.ask(Some(0), kind());
    drop(quiet);
    let here = fixture(EngineConfig::default());
    let exact = losses(&mut start(&here, "a", 4, None), 9).0;

    let (busy, _) = there(
        Element::F32,
        EngineConfig {
            training_max_tpot_impact: 4.0,
            ..little()
        },
    );
    let mut job = start(&busy, "a", 4, None);
    let (mut found, _) = losses(&mut job, 1);
    for _ in 0..3 {
        assert_eq!(busy.ask(Some(0), kind()).results(), reply.results());
    }
    let (rest, last) = losses(&mut job, 9);
    found.extend(rest);
    let Some(JobEvent::Finished { finished, .. }) = last else {
        panic!("{last:?}")
    };
    assert!(finished.artifact == expected.artifact, "not the same bits");
    near(&found, &exact, NEAR);
    assert_eq!(busy.engine.stats().panics, 0);
}

#[test]
fn cancelled_requests_leave_nothing_behind_there_either() {
    let (fixture, _) = there(Element::Bf16, little());
    let last = || likeliest(prompt(40, 9), 12, Some(1));
    let alone = fixture.ask(Some(1), last());
    for round in 0..3 {
        let mut receivers: Vec<_> = (0..6_u64)
            .map(|i| {
                let adapter = [None, Some(0), Some(1)][(i % 3) as usize];
                fixture.submit(adapter, drawn(prompt(i, 8 + i as usize), i, 50))
            })
            .collect();
        let kept = fixture.submit(Some(1), last());
        std::thread::sleep(Duration::from_millis(60 * round));
        receivers.truncate(1);
        assert_eq!(collect(kept).results(), alone.results());
        drop(receivers);
    }
    fixture.settled();
}

#[test]
fn what_finds_no_room_on_the_device_costs_its_own_request_or_job() {
    let kind = || likeliest(prompt(3, 9), 6, Some(1));
    let fitting = [None, Some(0), Some(1)];
    // How much an engine takes with two adapters and buffers for their steps.
    let (ops, device) = emulated(Element::F32, ROOMY);
    let roomy = fixture_on(little(), ops);
    let expected = fitting.map(|adapter| roomy.ask(adapter, kind()));
    let (used, large) = (device.used_bytes(), roomy.engine_bytes_of(2));
    drop(roomy);
    let (ops, _) = emulated(Element::F32, used + large / 2);
    let tight = fixture_on(little(), ops);
    let as_expected = || {
        for (adapter, expected) in fitting.into_iter().zip(&expected) {
            assert_eq!(tight.ask(adapter, kind()).results(), expected.results());
        }
    };
    as_expected();

    let beside = tight.submit(Some(0), likeliest(prompt(4, 9), 20, Some(1)));
    let error = tight.ask(Some(2), kind()).error;
    let Some(EngineError::DeviceMemory {
        requested, free, ..
    }) = error
    else {
        panic!("{error:?}")
    };
    assert!(requested > free, "{requested} asked for, {free} free");
    assert!(collect(beside).error.is_none());
    as_expected();
    let stats = tight.engine.stats();
    assert_eq!((stats.panics, stats.adapters_resident), (0, 2));

    // A step whose buffers find no room.
    let error = tight.ask(Some(0), likeliest(prompt(5, 60), 2, None)).error;
    assert!(
        matches!(error, Some(EngineError::Internal { .. })),
        "{error:?}"
    );
    // The numbers are published after the events.
    eventually("the panic is counted", || tight.engine.stats().panics > 0);
    as_expected();

    let (_, _, last) = to_end(&mut start(&tight, "a", 2, None));
    let Some(JobEvent::Failed(EngineError::TrainingFailed { detail })) = last else {
        panic!("{last:?}")
    };
    assert!(detail.contains("no room"), "{detail}");
    as_expected();
    tight.settled();
}
