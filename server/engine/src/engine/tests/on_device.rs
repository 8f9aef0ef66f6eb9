//! The engine whole on a device's operations, in the emulator: the same answers as on the processor, in any company, with steps
//! recorded and replayed.

use std::path::Path;
use std::sync::Arc;

use espalier_adapters::ops::cuda::driver::Element;
use espalier_adapters::ops::cuda::{Cuda, Emulated, build};
use espalier_adapters::ops::{Backend, Ops};

use super::fixture::{Fixture, Reply, collect, fixture, fixture_on, prompt, small};
use super::{greedy, sampled, training};
use crate::config::EngineConfig;
use crate::error::EngineError;
use crate::request::{Output, Pooling, RequestKind, StopConditions};

/// Emulated memory: what two engines of `tiny:1` take, and little more.
const MEMORY: usize = 256 << 20;

fn device(element: Element, memory: usize) -> Backend {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    let kernels = here.join("../../adapters/kernels");
    let library = build(&kernels, &here.join("../../target/kernels")).unwrap();
    let driver = Emulated::open(&library, memory).unwrap();
    Backend::Cuda(Cuda::new(Arc::new(driver), element, true).unwrap())
}

fn on_device(element: Element) -> Fixture {
    fixture_on(small(), device(element, MEMORY))
}

/// Greedy and random texts, of the base and of three adapters, one of them long enough for three blocks of the cache.
fn work() -> Vec<(Option<usize>, RequestKind)> {
    let mut work = Vec::new();
    for (i, adapter) in [None, Some(0), Some(1), Some(2)].into_iter().enumerate() {
        let ids = prompt(i as u64, 3 + 9 * i);
        work.push((adapter, greedy(ids.clone(), 9, StopConditions::default())));
        work.push((adapter, sampled(ids, 7, 5)));
    }
    work
}

fn together(fixture: &Fixture) -> Vec<Reply> {
    let asked: Vec<_> = work()
        .into_iter()
        .map(|(adapter, kind)| fixture.submit(adapter, kind))
        .collect();
    asked.into_iter().map(collect).collect()
}

fn tokens(replies: &[Reply]) -> Vec<Vec<u32>> {
    replies.iter().map(|reply| reply.tokens(0)).collect()
}

#[test]
fn texts_are_the_processors_alone_and_in_company() {
    let expected = tokens(&together(&fixture(small())));
    let fixture = on_device(Element::F32);
    // The second and third time the same shapes of steps come again: recorded, then replayed.
    for _ in 0..2 {
        let alone: Vec<Reply> = work()
            .into_iter()
            .map(|(adapter, kind)| fixture.ask(adapter, kind))
            .collect();
        assert_eq!(tokens(&alone), expected, "alone");
        assert_eq!(tokens(&together(&fixture)), expected, "together");
    }
    fixture.settled();
}

#[test]
fn sixteen_bits_are_the_same_in_any_company() {
    let fixture = on_device(Element::Bf16);
    let alone: Vec<Reply> = work()
        .into_iter()
        .map(|(adapter, kind)| fixture.ask(adapter, kind))
        .collect();
    for _ in 0..2 {
        let together = together(&fixture);
        assert_eq!(tokens(&together), tokens(&alone));
        for (together, alone) in together.iter().zip(&alone) {
            assert_eq!(together.logprobs(0), alone.logprobs(0));
        }
    }
}

#[test]
fn states_and_scores_are_near_the_processors() {
    let inputs = vec![prompt(50, 20), prompt(51, 5)];
    let work = [
        (
            Some(2),
            RequestKind::Classify {
                inputs: inputs.clone(),
            },
        ),
        (
            Some(1),
            RequestKind::Embed {
                inputs,
                pooling: Pooling::Mean,
                normalize: true,
            },
        ),
        (
            Some(0),
            RequestKind::Score {
                prompt: prompt(62, 33),
                continuations: vec![prompt(60, 1), prompt(61, 5)],
            },
        ),
    ];
    let (host, device) = (fixture(small()), on_device(Element::F32));
    for (adapter, kind) in work {
        let expected = host.ask(adapter, kind.clone()).outputs;
        let found = device.ask(adapter, kind).outputs;
        assert_eq!(found.len(), expected.len());
        for (index, expected) in &expected {
            for (found, expected) in numbers(&found[index]).iter().zip(numbers(expected)) {
                assert!((found - expected).abs() < 1e-3, "{found}, not {expected}");
            }
        }
    }
}

fn numbers(output: &Output) -> Vec<f32> {
    match output {
        Output::Classes { probabilities, .. } => probabilities.clone(),
        Output::Embedding(vector) => vector.clone(),
        Output::Score(tokens) => tokens.iter().map(|token| token.logprob).collect(),
    }
}

#[test]
fn an_adapter_that_finds_no_room_costs_its_own_request() {
    // The engine itself takes some 60 MiB: tables, angles, cache.
    let ops = device(Element::F32, 72 << 20);
    let Backend::Cuda(cuda) = ops.clone() else {
        panic!("a device was made")
    };
    let config = EngineConfig {
        kv_blocks: 64,
        ..small()
    };
    let fixture = fixture_on(config, ops);
    let before = fixture.ask(None, greedy(prompt(1, 8), 4, StopConditions::default()));
    // All that is left is taken, as a neighbour on the same device might.
    let free = cuda.free_bytes().unwrap();
    let mut taken = cuda.exact();
    cuda.resize(&mut taken, free.saturating_sub(8 << 10) / size_of::<f32>());
    let refused = fixture.ask(Some(0), greedy(prompt(1, 8), 4, StopConditions::default()));
    assert!(
        matches!(refused.error, Some(EngineError::DeviceMemory { .. })),
        "{:?}",
        refused.error
    );
    let after = fixture.ask(None, greedy(prompt(1, 8), 4, StopConditions::default()));
    assert_eq!(before.tokens(0), after.tokens(0));
}

#[test]
fn a_job_learns_beside_requests_as_on_the_processor() {
    let expected = training::losses(&fixture(small()), 3);
    let device = on_device(Element::F32);
    let busy = device.submit(Some(1), sampled(prompt(3, 12), 4, 40));
    let found = training::losses(&device, 3);
    let beside = collect(busy).tokens(0);
    assert_eq!(
        beside,
        device.ask(Some(1), sampled(prompt(3, 12), 4, 40)).tokens(0)
    );
    assert_eq!(found.len(), expected.len());
    for (found, expected) in found.iter().zip(&expected) {
        assert!(
            (found - expected).abs() < 1e-3 * expected,
            "{found}, not {expected}"
        );
    }
}
