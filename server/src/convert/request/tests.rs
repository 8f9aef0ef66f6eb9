//! Every limit at its value and one over it, and everything that must not pass as a default.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use super::*;
use crate::config::Config;
use crate::convert::chat::messages;
use crate::names::ApiKeyId;

fn limits(pairs: &[(&str, &str)]) -> Limits {
    Config::from_pairs(pairs).unwrap().limits
}

fn tenant_key(tenant: &str) -> Principal {
    Principal::Tenant {
        tenant: TenantId::parse(tenant).unwrap(),
        key: ApiKeyId::parse("k1").unwrap(),
    }
}

fn asked(adapter: &str, tenant: &str) -> Option<v1::InferenceTarget> {
    Some(v1::InferenceTarget {
        adapters: vec![v1::AdapterWeight {
            adapter: adapter.to_owned(),
            weight: None,
        }],
        tenant: tenant.to_owned(),
    })
}

fn message(result: Result<impl std::fmt::Debug, Refusal>) -> String {
    result.unwrap_err().message().to_owned()
}

#[test]
fn the_tenant_comes_from_adapter_then_field_then_key() {
    let service = Principal::Admin { key: None };
    let tenant = |found: Target| found.tenant.map(|tenant| tenant.to_string());
    assert_eq!(
        tenant(target(asked("tenants/acme/adapters/a", ""), &service).unwrap()).as_deref(),
        Some("acme")
    );
    let base = v1::InferenceTarget {
        tenant: "tenants/globex".to_owned(),
        ..Default::default()
    };
    assert_eq!(
        tenant(target(Some(base.clone()), &service).unwrap()).as_deref(),
        Some("globex")
    );
    assert_eq!(
        tenant(target(None, &tenant_key("acme")).unwrap()).as_deref(),
        Some("acme")
    );
    assert_eq!(
        tenant(target(None, &Principal::LocalAnonymous).unwrap()),
        None
    );
    let refused = target(Some(base), &tenant_key("acme")).unwrap_err();
    assert_eq!(refused.reason(), "PERMISSION_DENIED");
    let refused = target(asked("tenants/globex/adapters/a", ""), &tenant_key("acme")).unwrap_err();
    assert_eq!(refused.reason(), "PERMISSION_DENIED");
    assert!(
        message(target(
            asked("tenants/acme/adapters/a", "tenants/globex"),
            &service
        ))
        .contains("tenants/acme")
    );
}

#[test]
fn a_mixture_keeps_its_order_and_its_weights() {
    let entry = |name: &str, weight| v1::AdapterWeight {
        adapter: format!("tenants/a/adapters/{name}"),
        weight,
    };
    let mixture = v1::InferenceTarget {
        adapters: vec![
            entry("x", Some(-0.5)),
            entry("y@canary", None),
            entry("z", Some(0.0)),
        ],
        tenant: String::new(),
    };
    let found = target(Some(mixture), &Principal::LocalAnonymous).unwrap();
    let found: Vec<_> = found
        .adapters
        .iter()
        .map(|(reference, weight)| (reference.to_string(), *weight))
        .collect();
    let expected = [("x", -0.5), ("y@canary", 1.0), ("z", 0.0)];
    assert_eq!(
        found,
        expected.map(|(name, weight)| (format!("tenants/a/adapters/{name}"), weight))
    );
}

#[test]
fn mixtures_beyond_the_limits_and_bad_names_are_refused() {
    let local = Principal::LocalAnonymous;
    let mixture = |entries: &[(&str, f32)]| {
        let adapters = entries.iter().map(|(adapter, weight)| v1::AdapterWeight {
            adapter: (*adapter).to_owned(),
            weight: Some(*weight),
        });
        Some(v1::InferenceTarget {
            adapters: adapters.collect(),
            tenant: String::new(),
        })
    };
    let name = "tenants/a/adapters/b";
    assert!(target(mixture(&[(name, 1.0); MAX_TARGETS]), &local).is_ok());
    let many = message(target(mixture(&[(name, 1.0); MAX_TARGETS + 1]), &local));
    assert!(many.contains("the limit is 8"), "{many}");
    assert!(target(mixture(&[(name, MAX_WEIGHT)]), &local).is_ok());
    for weight in [MAX_WEIGHT + 0.5, f32::NAN, f32::INFINITY, -100.0] {
        let why = message(target(mixture(&[(name, 1.0), (name, weight)]), &local));
        assert!(why.contains("target.adapters[1].weight"), "{why}");
        assert!(why.contains("outside -8 to 8"), "{why}");
    }
    let strangers = [(name, 1.0), ("tenants/b/adapters/b", 1.0)];
    let why = message(target(mixture(&strangers), &local));
    assert!(why.contains("belong to one tenant"), "{why}");
    for name in [
        "",
        "b",
        "tenants/a",
        "tenants/a/adapters/B",
        "tenants/../adapters/b",
        "tenants/a/adapters/b/versions/0",
    ] {
        assert_eq!(
            target(asked(name, ""), &local).unwrap_err().reason(),
            "INVALID_FIELD",
            "{name}"
        );
    }
}

#[test]
fn request_wins_over_profile_and_profile_over_default() {
    let profile = ServingProfile {
        temperature: Some(0.2),
        top_k: Some(7),
        stop: Some(vec!["END".to_owned(), "X".to_owned()]),
        max_tokens: Some(33),
        ..Default::default()
    };
    let sampling = v1::SamplingParams {
        temperature: Some(0.0),
        seed: Some(5),
        ..Default::default()
    };
    let stop = v1::StopConditions {
        stop: vec!["X".to_owned()],
        ..Default::default()
    };
    let mut merged = settings(Some(sampling), Some(stop), None, &profile, &limits(&[])).unwrap();
    assert_eq!(
        (
            merged.sampling.temperature,
            merged.sampling.top_k,
            merged.sampling.top_p
        ),
        (0.0, 7, 1.0)
    );
    assert_eq!(
        (merged.sampling.seed, merged.stop.max_tokens),
        (Some(5), Some(33))
    );
    assert_eq!(merged.stop.stop, ["X", "END"]);
    merged.fit(90, 100, &limits(&[])).unwrap();
    assert_eq!(
        merged.stop.max_tokens,
        Some(10),
        "a default is cut to what fits"
    );
}

#[test]
fn a_request_that_does_not_fit_names_the_numbers() {
    let fit = |prompt, max| {
        let stop = v1::StopConditions {
            max_tokens: max,
            ..Default::default()
        };
        let mut merged = settings(
            None,
            Some(stop),
            None,
            &ServingProfile::default(),
            &limits(&[]),
        )
        .unwrap();
        merged
            .fit(prompt, 100, &limits(&[]))
            .map(|()| merged.stop.max_tokens.unwrap())
    };
    assert_eq!(fit(60, Some(40)).unwrap(), 40);
    let refusal = fit(60, Some(41)).unwrap_err();
    assert_eq!(refusal.reason(), "CONTEXT_LENGTH_EXCEEDED");
    assert!(
        refusal.message().contains("101") && refusal.message().contains("100"),
        "{}",
        refusal.message()
    );
    assert_eq!(fit(99, None).unwrap(), 1);
    assert_eq!(
        fit(100, None).unwrap_err().reason(),
        "CONTEXT_LENGTH_EXCEEDED"
    );
}

#[test]
fn limits_hold_at_their_value_and_not_one_over() {
    let profile = ServingProfile::default();
    let limits = limits(&[
        ("max_candidates", "2"),
        ("max_stop_strings", "2"),
        ("max_stop_string_bytes", "3"),
        ("max_stop_token_ids", "2"),
        ("max_logprobs", "2"),
        ("max_logit_bias", "2"),
        ("max_output_tokens", "9"),
    ]);
    let sample = |n, bias: u32| v1::SamplingParams {
        n: Some(n),
        logit_bias: (0..bias).map(|id| (id, 1.0)).collect(),
        ..Default::default()
    };
    let stops = |count: usize, length: usize, ids, max| v1::StopConditions {
        stop: (0..count)
            .map(|index| index.to_string().repeat(length))
            .collect(),
        stop_token_ids: (0..ids).collect(),
        max_tokens: Some(max),
        ..Default::default()
    };
    let ask = |sampling, stop, top| {
        settings(
            Some(sampling),
            Some(stop),
            Some(v1::LogprobOptions { top }),
            &profile,
            &limits,
        )
    };
    assert!(ask(sample(2, 2), stops(2, 3, 2, 9), 2).is_ok());
    for (field, result) in [
        ("sampling.n", ask(sample(3, 2), stops(2, 3, 2, 9), 2)),
        ("sampling.n", ask(sample(0, 2), stops(2, 3, 2, 9), 2)),
        (
            "sampling.logit_bias",
            ask(sample(2, 3), stops(2, 3, 2, 9), 2),
        ),
        ("stop.stop", ask(sample(2, 2), stops(3, 3, 2, 9), 2)),
        ("stop.stop[0]", ask(sample(2, 2), stops(2, 4, 2, 9), 2)),
        ("stop.stop[0]", ask(sample(2, 2), stops(2, 0, 2, 9), 2)),
        (
            "stop.stop_token_ids",
            ask(sample(2, 2), stops(2, 3, 3, 9), 2),
        ),
        ("stop.max_tokens", ask(sample(2, 2), stops(2, 3, 2, 10), 2)),
        ("stop.max_tokens", ask(sample(2, 2), stops(2, 3, 2, 0), 2)),
        ("logprobs.top", ask(sample(2, 2), stops(2, 3, 2, 9), 3)),
    ] {
        let text = message(result);
        assert!(text.starts_with(field), "{field}: {text}");
    }
}

#[test]
fn texts_labels_and_messages_have_limits() {
    let limits = limits(&[
        ("max_inputs", "2"),
        ("max_labels", "3"),
        ("max_label_bytes", "4"),
        ("max_messages", "2"),
        ("max_prompt_bytes", "1KiB"),
    ]);
    let many = |count: usize, text: &str| vec![text.to_owned(); count];
    assert!(texts(&many(2, &"x".repeat(1024)), &limits).is_ok());
    assert!(message(texts(&many(3, "x"), &limits)).contains("3 texts, the limit is 2"));
    assert!(
        message(texts(&many(1, &"x".repeat(1025)), &limits))
            .contains("texts[0]: 1025 bytes, the limit is 1024")
    );
    assert!(texts(&[], &limits).is_err() && texts(&many(1, ""), &limits).is_err());
    let named = |names: &[&str]| {
        labels(
            &names
                .iter()
                .map(|name| (*name).to_owned())
                .collect::<Vec<_>>(),
            &limits,
        )
    };
    assert!(named(&["aaaa", "b", "c"]).is_ok() && named(&[]).is_ok());
    for wrong in [
        &["a"][..],
        &["a", "b", "c", "d"],
        &["a", "aaaaa"],
        &["a", ""],
        &["a", "a"],
    ] {
        assert!(named(wrong).is_err(), "{wrong:?}");
    }
    let chat = |roles: &[i32], content: &str| {
        messages(
            roles
                .iter()
                .map(|role| v1::ChatMessage {
                    role: *role,
                    content: content.to_owned(),
                    ..Default::default()
                })
                .collect(),
            &limits,
        )
    };
    assert_eq!(chat(&[1, 2], "hi").unwrap()[0].role, "system");
    assert!(message(chat(&[0], "hi")).contains("messages[0].role: is not set"));
    assert!(message(chat(&[2, 99], "hi")).contains("messages[1].role: 99 is not one of"));
    assert!(message(chat(&[2, 2, 2], "hi")).contains("3 messages"));
    assert!(message(chat(&[2, 2], &"x".repeat(513))).contains("1026 bytes"));
    assert!(chat(&[], "").is_err());
    assert!(pooling(0).is_ok() && message(pooling(7)).contains('7'));
}

#[test]
fn missing_alternatives_are_named() {
    let limits = limits(&[]);
    assert!(message(prompt(None, &limits)).contains("set text or token_ids"));
    let empty = v1::generate_request::Input::TokenIds(v1::TokenIds { ids: vec![] });
    assert!(message(prompt(Some(empty), &limits)).contains("token_ids.ids"));
    assert!(
        message(score_items(vec![v1::ScoreItem::default()], &limits))
            .contains("items[0].continuation")
    );
    assert!(score_items(vec![], &limits).is_err());
    assert!(request_id("ok-1", &limits).is_ok());
    assert!(request_id("line\nbreak", &limits).is_err());
    assert!(request_id(&"x".repeat(129), &limits).is_err());
}
