//! Merged serving on the whole engine: who is merged answers as before within float tolerance, everybody else bit for bit,
//! and what is given up leaves no trace.

use std::time::Duration;

use espalier_adapters::profile::MergePolicy;

use super::fixture::{Fixture, Reply, collect, eventually, fixture, small};
use super::{mixed_work, sampled};
use crate::adapter_pool::Merging;
use crate::config::EngineConfig;
use crate::request::Output;

/// Sums in another order: a state of the tiny model differs in its last digits.
const TOLERANCE: f32 = 2e-3;

fn merging() -> EngineConfig {
    EngineConfig {
        merged_bytes: 1 << 20,
        merge_window: Duration::from_secs(1),
        ..small()
    }
}

fn state(fixture: &Fixture, adapter: usize) -> Merging {
    let found = fixture.engine.residency_of(&fixture.digest(adapter));
    found.map_or(Merging::No, |found| found.merging)
}

fn is_merged(fixture: &Fixture, adapter: usize) -> bool {
    matches!(state(fixture, adapter), Merging::Merged { bytes } if bytes > 0)
}

fn all(fixture: &Fixture) -> Vec<Reply> {
    let receivers: Vec<_> = mixed_work()
        .into_iter()
        .map(|(adapter, kind)| fixture.submit(adapter, kind))
        .collect();
    receivers.into_iter().map(collect).collect()
}

#[track_caller]
fn close(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert!(
            (a - b).abs() < TOLERANCE * (1.0 + b.abs()),
            "{a} beside {b}"
        );
    }
}

/// The same answer, numbers within the tolerance.
#[track_caller]
fn alike(merged: &Reply, plain: &Reply) {
    assert_eq!(merged.tokens(0), plain.tokens(0));
    let numbers = |reply: &Reply| -> Vec<f32> {
        let logprobs = reply.logprobs(0).into_iter().map(|token| token.logprob);
        let outputs = reply.outputs.values().flat_map(|output| match output {
            Output::Classes { logits, .. } => logits.clone(),
            Output::Embedding(values) => values.clone(),
            Output::Score(tokens) => tokens.iter().map(|token| token.logprob).collect(),
        });
        logprobs.chain(outputs).collect()
    };
    close(&numbers(merged), &numbers(plain));
}

#[test]
fn a_merged_version_answers_alike_and_nobody_else_notices() {
    let fixture = fixture(merging());
    let plain = all(&fixture);
    fixture
        .engine
        .set_merge_policy(fixture.digest(0), MergePolicy::Merged);
    fixture.ask(Some(0), sampled(vec![5, 6, 7], 1, 3));
    eventually("merged", || {
        // Traffic wakes the judgement.
        fixture.ask(None, sampled(vec![5], 1, 1));
        is_merged(&fixture, 0)
    });
    let merged = all(&fixture);
    let mut differs = false;
    for ((adapter, _), (merged, plain)) in mixed_work().iter().zip(merged.iter().zip(&plain)) {
        if *adapter == Some(0) {
            alike(merged, plain);
            differs |= merged.results() != plain.results();
        } else {
            assert_eq!(merged.results(), plain.results(), "{adapter:?}");
        }
    }
    assert!(
        differs,
        "sums in another order that end in the same bits: was it merged?"
    );
    // Alone as in the batch, bit for bit.
    for ((adapter, kind), together) in mixed_work().into_iter().zip(&merged) {
        assert_eq!(fixture.ask(adapter, kind).results(), together.results());
    }
    let stats = fixture.engine.stats();
    assert!(
        stats.merged == 1 && stats.merged_bytes <= 1 << 20,
        "{stats:?}"
    );

    fixture
        .engine
        .set_merge_policy(fixture.digest(0), MergePolicy::Unmerged);
    for (again, plain) in all(&fixture).iter().zip(&plain) {
        assert_eq!(again.results(), plain.results());
    }
    eventually("given up", || {
        fixture.ask(None, sampled(vec![5], 1, 1));
        fixture.engine.stats().merged_bytes == 0
    });
    fixture.settled();
}

#[test]
fn who_dominates_is_promoted_and_gives_way_when_traffic_moves() {
    let fixture = fixture(EngineConfig {
        // Room for one copy.
        merged_bytes: 400 << 10,
        ..merging()
    });
    let work = |seed| sampled(vec![5, 6, 7, 8], seed, 12);
    let (first, second) = (fixture.ask(Some(1), work(3)), fixture.ask(Some(0), work(3)));
    eventually("1 is promoted", || {
        fixture.ask(Some(1), work(1));
        is_merged(&fixture, 1)
    });
    alike(&fixture.ask(Some(1), work(3)), &first);
    // A request that runs on the copy while it is given up ends on it. Its events fit in their channel unread.
    let running = fixture.submit(Some(1), sampled(vec![5, 6], 9, 20));
    let alone = fixture.ask(Some(1), sampled(vec![5, 6], 9, 20));
    eventually("0 takes its place", || {
        fixture.ask(Some(0), work(2));
        is_merged(&fixture, 0) && state(&fixture, 1) == Merging::No
    });
    assert_eq!(collect(running).results(), alone.results());
    alike(&fixture.ask(Some(0), work(3)), &second);
    assert_eq!(fixture.ask(Some(1), work(3)).results(), first.results());
    assert!(fixture.engine.stats().merged_bytes <= 400 << 10);
    fixture.settled();
}

#[test]
fn without_a_budget_nothing_is_merged() {
    let fixture = fixture(small());
    fixture
        .engine
        .set_merge_policy(fixture.digest(0), MergePolicy::Merged);
    for seed in 0..60 {
        fixture.ask(Some(0), sampled(vec![5, 6, 7], seed, 4));
    }
    assert_eq!(state(&fixture, 0), Merging::No);
    assert_eq!(fixture.engine.stats().merged_bytes, 0);
}
