//! Several adapters in one request, through the whole engine: the same alone and in company, leased whole, refused with reasons.

use super::*;

fn kind(seed: u64) -> RequestKind {
    sampled(prompt(seed, 20), seed, 12)
}

#[test]
fn a_mixture_answers_the_same_in_company() {
    let mixtures: [&[(usize, f32)]; 5] = [
        &[(0, 0.7), (1, 0.3)],
        &[(1, 0.3), (0, 0.7)],
        &[(0, 0.7), (1, -0.3), (3, 1.5)],
        &[(0, 0.5)],
        &[(2, 1.0), (4, 0.25)],
    ];
    let solo = fixture(EngineConfig::default());
    let alone: Vec<Reply> = mixtures
        .iter()
        .map(|parts| collect(solo.engine.submit(solo.mixture(parts, kind(9))).unwrap()))
        .collect();
    let whole = solo.ask(Some(0), kind(9));
    assert!(
        alone
            .iter()
            .all(|reply| reply.logprobs(0) != whole.logprobs(0)),
        "weights and company change what is said"
    );
    assert_ne!(alone[0].logprobs(0), alone[2].logprobs(0));
    solo.settled();

    let together = fixture(small());
    let mut receivers = Vec::new();
    for (index, parts) in mixtures.iter().enumerate() {
        receivers.push(
            together
                .engine
                .submit(together.mixture(parts, kind(9)))
                .unwrap(),
        );
        // Neighbours: the same adapters alone, and the base.
        drop(together.submit(Some(index % 2), kind(50 + index as u64)));
        receivers.push(together.submit(None, kind(60 + index as u64)));
    }
    for (reply, alone) in receivers.into_iter().step_by(2).map(collect).zip(&alone) {
        assert!(reply.error.is_none(), "{:?}", reply.error);
        assert_eq!(reply.results(), alone.results());
    }
    together.settled();
}

#[test]
fn weight_one_alone_is_the_adapter_and_weight_nought_the_base() {
    let fixture = fixture(EngineConfig::default());
    let ask = |parts: &[(usize, f32)]| {
        let reply = collect(
            fixture
                .engine
                .submit(fixture.mixture(parts, kind(3)))
                .unwrap(),
        );
        assert!(reply.error.is_none(), "{:?}", reply.error);
        reply
    };
    assert_eq!(
        ask(&[(1, 1.0)]).results(),
        fixture.ask(Some(1), kind(3)).results()
    );
    assert_eq!(
        ask(&[(1, 0.0), (0, 0.0)]).results(),
        fixture.ask(None, kind(3)).results()
    );
    assert_ne!(
        ask(&[(1, 0.9)]).logprobs(0),
        fixture.ask(Some(1), kind(3)).logprobs(0)
    );
}

#[test]
fn what_cannot_be_mixed_is_refused_by_name() {
    let fixture = fixture(EngineConfig::default());
    let refused = |parts: &[(usize, f32)]| {
        let refused = fixture.engine.submit(fixture.mixture(parts, kind(1)));
        refused.err().unwrap().to_string()
    };
    assert!(refused(&[(0, f32::NAN)]).contains("target.weight"));
    assert!(refused(&[(0, 1.0), (1, 8.5)]).contains("outside -8 to 8"));
    assert!(refused(&[(0, 1.0), (1, 1.0), (0, 0.5)]).contains("twice"));
    let inputs = vec![prompt(4, 9)];
    let classify = |parts: &[(usize, f32)]| {
        let kind = RequestKind::Classify {
            inputs: inputs.clone(),
        };
        collect(fixture.engine.submit(fixture.mixture(parts, kind)).unwrap())
    };
    // Adapters 2 and 5 have heads.
    let error = classify(&[(2, 0.5), (5, 0.5)]).error.unwrap();
    assert!(error.to_string().contains("several adapters"), "{error}");
    let error = classify(&[(0, 0.5), (1, 0.5)]).error.unwrap();
    assert!(
        error.to_string().contains("no adapter of the target"),
        "{error}"
    );
    let (one, mixed) = (classify(&[(2, 1.0)]), classify(&[(0, 0.5), (2, 1.0)]));
    assert!(mixed.error.is_none() && mixed.outputs.len() == 1);
    assert_ne!(
        mixed.outputs, one.outputs,
        "the head reads the mixture's states"
    );
    fixture.settled();
}

#[test]
fn a_mixture_larger_than_the_memory_is_refused_and_a_fitting_one_waits_its_turn() {
    let bytes = |adapter| fixture(EngineConfig::default()).engine_bytes_of(adapter);
    let (a, b) = (bytes(0), bytes(1));
    let tight = |adapter_bytes| {
        fixture(EngineConfig {
            adapter_bytes,
            ..EngineConfig::default()
        })
    };
    let small = tight(a.max(b) + 64);
    let error = collect(
        small
            .engine
            .submit(small.mixture(&[(0, 0.5), (1, 0.5)], kind(1)))
            .unwrap(),
    );
    let error = error.error.unwrap().to_string();
    assert!(error.contains("2 versions found no room"), "{error}");
    small.settled();
    let enough = tight(a + b + 64);
    let others: Vec<_> = (3..5)
        .map(|adapter| enough.submit(Some(adapter), kind(2)))
        .collect();
    let mixture = enough
        .engine
        .submit(enough.mixture(&[(0, 0.5), (1, 0.5)], kind(1)))
        .unwrap();
    for reply in others.into_iter().chain([mixture]).map(collect) {
        assert!(reply.error.is_none(), "{:?}", reply.error);
    }
    enough.settled();
}
