//! Tests of defaults and ranges of a job's numbers.
#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use super::*;

pub(crate) fn limits() -> JobLimits {
    JobLimits {
        max_active: 2,
        max_per_tenant: 4,
        activation_bytes: 1 << 28,
        checkpoint_steps: 50,
        max_example_tokens: 512,
        max_inline_rows: 100,
        max_epochs: 20,
        max_steps: 1000,
        max_batch_size: 64,
        max_rank: 64,
        max_labels: 16,
        max_adapter_bytes: 1 << 30,
        adapter_cache_bytes: 1 << 30,
        training_job_bytes: 8 << 30,
        max_description_bytes: 100,
    }
}

fn at(examples: usize, validated: bool) -> Circumstances {
    Circumstances {
        examples,
        validated,
        classifies: false,
        hidden: 576,
        layers: 30,
        family: Family::Llama,
    }
}

fn field_of(error: &JobError) -> &str {
    match error {
        JobError::InvalidField { field, .. } => field,
        other => panic!("{other}"),
    }
}

#[test]
fn defaults_follow_size_and_width() {
    let request = HyperRequest::default();
    let (hyper, epochs) = hyper_parameters(
        &request,
        &at(200, true),
        false,
        &limits(),
        &mut Choices::default(),
    )
    .unwrap();
    assert_eq!(
        (hyper.batch_size, epochs, hyper.max_steps),
        (8, 4.0, Some(100))
    );
    // 5e-4 * (2000 / 576)^0.781, as the reference page computes it for this model.
    let rate = hyper.learning_rate.unwrap();
    assert!((rate - 1.32186e-3).abs() < 1e-8, "{rate}");
    assert_eq!((hyper.warmup_steps, hyper.eval_steps), (Some(5), Some(10)));
    assert_eq!(hyper.early_stopping_patience, Some(PATIENCE));
    let (short, _) = hyper_parameters(
        &request,
        &at(40, false),
        false,
        &limits(),
        &mut Choices::default(),
    )
    .unwrap();
    assert_eq!(short.max_steps, Some(50));
    assert!((short.learning_rate.unwrap() / rate - 1.5).abs() < 1e-9);
    assert_eq!(
        (short.eval_steps, short.early_stopping_patience),
        (None, None)
    );
    let (head, _) = hyper_parameters(
        &request,
        &at(40, false),
        true,
        &limits(),
        &mut Choices::default(),
    )
    .unwrap();
    assert_eq!((head.learning_rate, head.batch_size), (Some(5e-3), 32));
    assert_eq!((head.weight_decay, hyper.weight_decay), (0.1, 0.0));
    let shape = |n| {
        lora(
            &LoraRequest::default(),
            &at(n, false),
            &limits(),
            &mut Choices::default(),
        )
        .unwrap()
    };
    assert_eq!(
        [shape(499).rank, shape(500).rank, shape(20_001).rank],
        [8, 16, 32]
    );
    assert_eq!((shape(9).alpha, shape(9).target_modules.len()), (32.0, 7));
}

#[test]
fn what_was_left_open_is_told_with_its_reason() {
    let chosen = |request: &HyperRequest| {
        let mut choices = Choices::default();
        hyper_parameters(request, &at(200, true), false, &limits(), &mut choices).unwrap();
        choices.0
    };
    let named = HyperRequest {
        learning_rate: Some(1e-3),
        batch_size: Some(4),
        ..HyperRequest::default()
    };
    let (all, fewer) = (chosen(&HyperRequest::default()), chosen(&named));
    let find = |choices: &[Choice], name: &str| {
        let field = format!("hyper_parameters.{name}");
        choices.iter().find(|choice| choice.field == field).cloned()
    };
    let batch = find(&all, "batch_size").unwrap();
    assert_eq!(
        (batch.value.as_str(), batch.reason.as_str()),
        ("8", "200 examples are below 512")
    );
    for name in [
        "epochs",
        "schedule",
        "warmup_steps",
        "adam_beta1",
        "max_grad_norm",
    ] {
        assert!(find(&fewer, name).is_some(), "{name}");
    }
    assert_eq!(find(&fewer, "learning_rate"), None);
    assert_eq!(find(&fewer, "batch_size"), None);
    let mut choices = Choices::default();
    lora(
        &LoraRequest::default(),
        &at(9, false),
        &limits(),
        &mut choices,
    )
    .unwrap();
    let fields: Vec<&str> = choices
        .0
        .iter()
        .map(|choice| choice.field.as_str())
        .collect();
    assert_eq!(
        fields,
        [
            "lora.rank",
            "lora.target_modules",
            "lora.dropout",
            "lora.alpha"
        ]
    );
}

#[test]
fn a_fraction_of_an_epoch_is_counted_in_steps() {
    let request = HyperRequest {
        epochs: Some(0.5),
        batch_size: Some(4),
        ..HyperRequest::default()
    };
    let (hyper, epochs) = hyper_parameters(
        &request,
        &at(100, false),
        false,
        &limits(),
        &mut Choices::default(),
    )
    .unwrap();
    assert_eq!(
        (epochs, hyper.epochs, hyper.max_steps),
        (0.5, Some(1), Some(13))
    );
}

#[test]
fn what_is_out_of_range_is_named() {
    let check = |request: HyperRequest| {
        let error = hyper_parameters(
            &request,
            &at(100, false),
            false,
            &limits(),
            &mut Choices::default(),
        )
        .unwrap_err();
        field_of(&error).to_owned()
    };
    let plain = HyperRequest::default;
    let cases = [
        (
            HyperRequest {
                epochs: Some(20.1),
                ..plain()
            },
            "epochs",
        ),
        (
            HyperRequest {
                epochs: Some(f64::NAN),
                ..plain()
            },
            "epochs",
        ),
        (
            HyperRequest {
                batch_size: Some(0),
                ..plain()
            },
            "batch_size",
        ),
        (
            HyperRequest {
                batch_size: Some(65),
                ..plain()
            },
            "batch_size",
        ),
        (
            HyperRequest {
                learning_rate: Some(0.0),
                ..plain()
            },
            "learning_rate",
        ),
        (
            HyperRequest {
                learning_rate: Some(-1.0),
                ..plain()
            },
            "learning_rate",
        ),
        (
            HyperRequest {
                beta2: Some(1.0),
                ..plain()
            },
            "adam_beta2",
        ),
        (
            HyperRequest {
                weight_decay: Some(-0.1),
                ..plain()
            },
            "weight_decay",
        ),
        (
            HyperRequest {
                max_grad_norm: Some(-1.0),
                ..plain()
            },
            "max_grad_norm",
        ),
        (
            HyperRequest {
                lora_plus_ratio: Some(0.0),
                ..plain()
            },
            "lora_plus_ratio",
        ),
        (
            HyperRequest {
                lora_plus_ratio: Some(1000.1),
                ..plain()
            },
            "lora_plus_ratio",
        ),
        (
            HyperRequest {
                lora_plus_ratio: Some(f64::NAN),
                ..plain()
            },
            "lora_plus_ratio",
        ),
        (
            HyperRequest {
                early_stopping_patience: Some(2),
                ..plain()
            },
            "early_stopping_patience",
        ),
        (
            HyperRequest {
                warmup_steps: Some(1),
                warmup_ratio: Some(0.1),
                ..plain()
            },
            "warmup_ratio",
        ),
        (
            HyperRequest {
                epochs: Some(20.0),
                batch_size: Some(1),
                ..plain()
            },
            "epochs",
        ),
    ];
    for (request, field) in cases {
        assert_eq!(check(request), format!("hyper_parameters.{field}"));
    }
}

#[test]
fn the_ratio_of_lora_plus_reaches_the_trainer() {
    let hyper = |ratio, head_only| {
        let request = HyperRequest {
            lora_plus_ratio: ratio,
            ..HyperRequest::default()
        };
        hyper_parameters(
            &request,
            &at(100, false),
            head_only,
            &limits(),
            &mut Choices::default(),
        )
        .map(|(hyper, _)| hyper.lora_plus_ratio)
    };
    assert_eq!(hyper(None, false).unwrap(), 1.0);
    assert_eq!(hyper(Some(1000.0), false).unwrap(), 1000.0);
    assert_eq!(hyper(Some(1.0), true).unwrap(), 1.0);
    let refused = hyper(Some(16.0), true).unwrap_err();
    assert_eq!(field_of(&refused), "hyper_parameters.lora_plus_ratio");
}

#[test]
fn shapes_are_checked_at_and_over_the_limit() {
    let check = |request: LoraRequest| {
        lora(
            &request,
            &at(100, false),
            &limits(),
            &mut Choices::default(),
        )
    };
    let plain = LoraRequest::default;
    assert!(
        check(LoraRequest {
            rank: Some(64),
            layers: vec![29],
            use_dora: Some(true),
            ..plain()
        })
        .is_ok()
    );
    for (request, field) in [
        (
            LoraRequest {
                rank: Some(65),
                ..plain()
            },
            "lora.rank",
        ),
        (
            LoraRequest {
                rank: Some(0),
                ..plain()
            },
            "lora.rank",
        ),
        (
            LoraRequest {
                alpha: Some(0.0),
                ..plain()
            },
            "lora.alpha",
        ),
        (
            LoraRequest {
                dropout: Some(1.0),
                ..plain()
            },
            "lora.dropout",
        ),
        (
            LoraRequest {
                use_dora: Some(true),
                dropout: Some(0.1),
                ..plain()
            },
            "lora.dropout",
        ),
        (
            LoraRequest {
                layers: vec![30],
                ..plain()
            },
            "lora.layers_to_transform",
        ),
        (
            LoraRequest {
                target_modules: vec!["lm_head".into()],
                ..plain()
            },
            "lora.target_modules",
        ),
    ] {
        assert_eq!(field_of(&check(request).unwrap_err()), field);
    }
}
