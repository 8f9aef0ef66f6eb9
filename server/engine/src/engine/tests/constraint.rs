//! Constrained generations in the engine: no token outside of the grammar, whatever else a request asks for, with every
//! adapter and any neighbours.

use std::sync::Arc;

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::fixture::{Reply, collect, fixture, prompt, small};
use crate::config::EngineConfig;
use crate::constraint::ConstraintSource;
use crate::constraint::tests::{compile, regex, satisfies, schema};
use crate::error::EngineError;
use crate::request::{
    FinishReason, Generate, RequestKind, SamplingParams, StopConditions, TargetVersion,
};

const EOS: u32 = 2;

/// Whether a text is one that the constraint allows.
type Check = Box<dyn Fn(&str) -> bool>;

fn generate(source: ConstraintSource, seed: u64, max_tokens: usize) -> Generate {
    Generate {
        prompt: prompt(seed, 5 + seed as usize % 20),
        sampling: SamplingParams {
            temperature: 1.0,
            seed: Some(seed),
            ..SamplingParams::default()
        },
        stop: StopConditions {
            max_tokens: Some(max_tokens),
            ..StopConditions::default()
        },
        constraint: Some(compile(source).unwrap()),
        ..Generate::default()
    }
}

fn re(text: &str) -> ConstraintSource {
    ConstraintSource::Regex(text.to_owned())
}

/// For the batches of the other tests: constrained sequences among all kinds of work.
pub(super) fn work() -> Vec<(Option<usize>, RequestKind)> {
    let schema = "{\"type\":\"object\",\"properties\":{\"a\":{\"type\":\"string\",\"maxLength\":20},\"b\":{\"type\":\"integer\"}}}";
    let sources = [
        re("[a-z ]{10,40}"),
        ConstraintSource::JsonSchema(schema.to_owned()),
    ];
    let with = |(index, source): (usize, ConstraintSource)| {
        let generate = generate(source, 80 + index as u64, 25);
        ([None, Some(1)][index], RequestKind::Generate(generate))
    };
    sources.into_iter().enumerate().map(with).collect()
}

fn ended(reply: &Reply) -> bool {
    let ends = [FinishReason::Eos, FinishReason::Complete];
    reply.error.is_none()
        && reply
            .finished
            .iter()
            .all(|end| ends.contains(&end.finish_reason))
}

#[test]
fn random_constraints_hold_in_a_mixed_batch() {
    let fixture = fixture(EngineConfig::default());
    let mut running = Vec::new();
    for seed in 0..24 {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let (source, check): (_, Check) = if seed % 2 == 0 {
            let pattern = format!("x{}", regex(&mut rng));
            let oracle = ::regex::Regex::new(&format!("^(?:{pattern})$")).unwrap();
            (re(&pattern), Box::new(move |text| oracle.is_match(text)))
        } else {
            let schema = schema(&mut rng, 2);
            let text = schema.to_string();
            let check = move |text: &str| {
                serde_json::from_str(text).is_ok_and(|value| satisfies(&value, &schema))
            };
            (ConstraintSource::JsonSchema(text), Box::new(check))
        };
        let mut generate = generate(source.clone(), seed, 1500);
        // Everything else that changes logits, some of it against the grammar.
        generate.sampling = SamplingParams {
            n: 1 + seed as usize % 3,
            top_k: [0, 40][seed as usize % 2],
            top_p: [1.0, 0.9][seed as usize / 2 % 2],
            repetition_penalty: 1.2,
            frequency_penalty: 0.2,
            logit_bias: [(b'!' as u32 + 3, 50.0), (EOS, 20.0), (0, 100.0)].into(),
            ..generate.sampling
        };
        generate.logprobs = (seed % 5 == 0).then_some(1);
        let adapter = [None, Some(0), Some(1), Some(2)][seed as usize % 4];
        let receiver = fixture.submit(adapter, RequestKind::Generate(generate));
        running.push((source, check, receiver));
    }
    for (source, check, receiver) in running {
        let reply = collect(receiver);
        assert!(
            ended(&reply),
            "{source:?}: {:?} {:?}",
            reply.error,
            reply.finished
        );
        for end in &reply.finished {
            let text = reply.text(end.candidate);
            assert!(check(&text), "{text:?} is not of {source:?}");
        }
    }
    fixture.settled();
}

#[test]
fn candidates_go_their_own_ways() {
    let fixture = fixture(small());
    let mut generate = generate(re("(yes|no|maybe) [0-9]{2}"), 3, 40);
    generate.sampling.n = 6;
    let reply = fixture.ask(Some(0), RequestKind::Generate(generate));
    let texts: std::collections::BTreeSet<String> = (0..6).map(|index| reply.text(index)).collect();
    assert!(ended(&reply) && texts.len() > 3, "{texts:?}");
    let complete = reply
        .finished
        .iter()
        .filter(|end| end.finish_reason == FinishReason::Complete);
    assert_eq!(complete.count(), 6, "nothing may follow the second digit");
}

#[test]
fn ends_are_the_grammars() {
    let fixture = fixture(small());
    let ask = |generate| fixture.ask(None, RequestKind::Generate(generate));
    // An end that the model may take or leave.
    let mut open = generate(re("[ab]+"), 1, 30);
    open.sampling.logit_bias = [(EOS, 30.0)].into();
    let reply = ask(open.clone());
    assert_eq!(reply.finished[0].finish_reason, FinishReason::Eos);
    assert_eq!(
        reply.tokens(0).len(),
        2,
        "one letter, then the end: {}",
        reply.text(0)
    );
    // min_tokens and ignore_eos hold where the grammar leaves a choice ...
    open.stop.min_tokens = 7;
    assert_eq!(ask(open.clone()).tokens(0).len(), 8);
    open.stop.ignore_eos = true;
    let reply = ask(open);
    assert_eq!(reply.finished[0].finish_reason, FinishReason::Length);
    assert_eq!(reply.tokens(0).len(), 30);
    // ... and not where it leaves none.
    let mut closed = generate(re("ab"), 1, 30);
    closed.stop.min_tokens = 7;
    closed.stop.ignore_eos = true;
    let reply = ask(closed);
    assert_eq!(
        (reply.text(0).as_str(), reply.finished[0].finish_reason),
        ("ab", FinishReason::Complete)
    );
    // Tokens that run out and stop strings cut what the grammar would go on with.
    let reply = ask(generate(re("a{50}"), 1, 5));
    assert_eq!(
        (reply.text(0).as_str(), reply.finished[0].finish_reason),
        ("aaaaa", FinishReason::Length)
    );
    let mut stopped = generate(re("a{5}-b"), 1, 30);
    stopped.stop.stop = vec!["-".to_owned()];
    let reply = ask(stopped);
    assert_eq!(
        (reply.text(0).as_str(), reply.finished[0].finish_reason),
        ("aaaaa", FinishReason::StopString)
    );
}

#[test]
fn a_mask_that_takes_too_much_fails_its_own_request_only() {
    let fixture = fixture(small());
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .build()
        .unwrap();
    let limits = crate::constraint::ConstraintLimits {
        max_lexer_states: 60,
        ..Default::default()
    };
    let info = fixture.engine.model();
    let compiler = crate::constraint::Compiler::start(
        Arc::clone(&info.tokenizer),
        info.config.vocab,
        info.stop_ids.clone(),
        limits,
    );
    let source = re("(a|b|c|d){3}(abc|cbd|(a|d)*c(a|b)){5}[a-z]{30}");
    let compiled = runtime
        .block_on(compiler.unwrap().compile("t", source))
        .unwrap();
    let mut hard = generate(re("unused"), 1, 60);
    hard.constraint = Some(compiled);
    let easy = generate(re("[a-c]{40}"), 2, 60);
    let (hard, easy) = (
        fixture.submit(None, RequestKind::Generate(hard)),
        fixture.submit(None, RequestKind::Generate(easy)),
    );
    let error = collect(hard).error;
    assert!(
        matches!(error, Some(EngineError::ConstraintTooComplex { .. })),
        "{error:?}"
    );
    assert!(ended(&collect(easy)));
    fixture.settled();
}

#[test]
fn the_unconstrained_are_untouched() {
    let fixture = fixture(EngineConfig::default());
    let free = |seed| {
        let mut free = generate(re("x"), seed, 20);
        free.constraint = None;
        RequestKind::Generate(free)
    };
    let alone = fixture.ask(Some(1), free(9));
    let beside: Vec<_> = (0..4)
        .map(|seed| {
            fixture.submit(
                Some(2),
                RequestKind::Generate(generate(re("[a-z]{20}"), seed, 30)),
            )
        })
        .collect();
    assert_eq!(fixture.ask(Some(1), free(9)).results(), alone.results());
    for receiver in beside {
        assert!(ended(&collect(receiver)));
    }
    let unknown = TargetVersion {
        digest: fixture.unknown(),
        weight: 1.0,
    };
    let mut request = fixture.request(None, RequestKind::Generate(generate(re("a"), 1, 3)));
    request.target = vec![unknown];
    assert!(
        collect(fixture.engine.submit(request).unwrap())
            .error
            .is_some()
    );
}
