//! Each rule broken once, alone and together, and each limit met exactly.

use super::*;

#[test]
fn each_thing_that_cannot_be_honoured_is_refused_by_its_field() {
    let (config, weights) = rich();
    let artifact = write(&config, &weights).unwrap();
    let cases = [
        ("peft_type", json!("ADALORA"), Rule::Unsupported),
        ("bias", json!("lora_only"), Rule::Unsupported),
        ("lora_bias", json!(true), Rule::Unsupported),
        ("fan_in_fan_out", json!(true), Rule::Unsupported),
        ("layer_replication", json!([[0, 2]]), Rule::Unsupported),
        ("alora_invocation_tokens", json!([1]), Rule::Unsupported),
        (
            "target_parameters",
            json!(["mlp.experts"]),
            Rule::Unsupported,
        ),
        ("trainable_token_indices", json!([5]), Rule::Unsupported),
        ("use_qalora", json!(true), Rule::Unsupported),
        ("use_bdlora", json!({"nblocks": 2}), Rule::Unsupported),
        ("kasa_config", json!({"beta": 1.0}), Rule::Unsupported),
        ("task_type", json!("TOKEN_CLS"), Rule::Unsupported),
        (
            "modules_to_save",
            json!(["score", "embed_tokens"]),
            Rule::Unsupported,
        ),
        (
            "target_modules",
            json!(["q_proj", "o_proj", "lm_head"]),
            Rule::Unsupported,
        ),
        (
            "init_lora_weights",
            json!("pissa_niter_4"),
            Rule::InitChangedBase,
        ),
        ("init_lora_weights", json!("olora"), Rule::InitChangedBase),
        ("init_lora_weights", json!("loftq"), Rule::InitChangedBase),
        ("init_lora_weights", json!("novel"), Rule::Unsupported),
        ("use_novel", json!(true), Rule::UnknownField),
        ("novel_config", json!({"a": 1}), Rule::UnknownField),
        ("r", json!(0), Rule::Rank),
        ("r", json!(1_000_000), Rule::Rank),
        ("r", json!(2.5), Rule::Rank),
        ("rank_pattern", json!({"q_proj": -1}), Rule::Rank),
        ("rank_pattern", json!({"(": 1}), Rule::Pattern),
        ("lora_alpha", json!("8"), Rule::FieldValue),
        ("lora_alpha", json!(1e300), Rule::FieldValue),
        ("lora_dropout", json!(1.5), Rule::FieldValue),
        ("use_dora", json!("yes"), Rule::FieldValue),
        ("target_modules", json!(null), Rule::FieldValue),
        ("target_modules", json!([]), Rule::FieldValue),
        ("target_modules", json!(["q_proj", 3]), Rule::FieldValue),
        ("target_modules", json!("nothing.*"), Rule::NoTargets),
        ("layers_to_transform", json!([0, 3]), Rule::Layer),
        ("layers_to_transform", json!([-1]), Rule::FieldValue),
        ("layers_pattern", json!(["layers"]), Rule::FieldValue),
    ];
    for (field, value, rule) in cases {
        let report = refused(&with_config(&artifact, &[(field, value.clone())]));
        assert!(has(&report, rule, field), "{field} = {value}: {report}");
    }
}

#[test]
fn unknown_fields_that_are_off_are_fine_and_others_are_told() {
    let (config, weights) = rich();
    let artifact = write(&config, &weights).unwrap();
    let off = [
        ("new_a", json!(null)),
        ("use_new", json!(false)),
        ("new_config", json!({})),
        ("l", json!([])),
    ];
    assert_eq!(
        read_tiny(&with_config(&artifact, &off)).unwrap().2,
        Report::default()
    );
    let told = with_config(&artifact, &[("trained_by", json!("somebody"))]);
    let (_, _, report) = read_tiny(&told).unwrap();
    assert!(
        report.is_ok() && has(&report, Rule::UnknownField, "trained_by"),
        "{report}"
    );
    // The least that PEFT takes.
    let least = json!({"peft_type": "LORA", "target_modules": ["k_proj"]})
        .to_string()
        .into_bytes();
    let config = LoraConfig {
        task_type: None,
        ..LoraConfig::new(8, 8.0, &[Site::K])
    };
    let weights = self::weights(&config, &TINY, 0, 3);
    let artifact = AdapterArtifact {
        config_json: least,
        ..write(&config, &weights).unwrap()
    };
    let (read, read_weights, _) = read_tiny(&artifact).unwrap();
    assert_eq!((read, read_weights), (config.into(), weights));
}

#[test]
fn every_bad_tensor_is_in_one_report() {
    let (config, weights) = rich();
    let artifact = write(&config, &weights).unwrap();
    let prefix = "base_model.model.model.layers";
    let mut changed = with_tensors(&artifact, |(name, dtype, shape, mut data)| {
        let name_of = |tail: &str| name == format!("{prefix}.{tail}");
        if name_of("0.self_attn.q_proj.lora_A.weight") {
            data[4..8].copy_from_slice(&f32::NAN.to_le_bytes());
        } else if name_of("1.self_attn.q_proj.lora_A.weight") {
            return None;
        } else if name_of("2.self_attn.q_proj.lora_A.weight") {
            return Some((name, dtype, vec![3, 6], f32s(&[0.5; 18])));
        } else if name_of("2.self_attn.q_proj.lora_B.weight") {
            return Some((name, dtype, vec![2, 8], data));
        } else if name_of("0.self_attn.o_proj.lora_A.weight") {
            return Some((name, "F64".into(), vec![shape[0], shape[1] / 2], data));
        } else if name_of("0.self_attn.o_proj.lora_magnitude_vector") {
            return Some((
                format!("{prefix}.0.mlp.up_proj.lora_A.weight"),
                dtype,
                shape,
                data,
            ));
        } else if name_of("2.self_attn.o_proj.lora_B.weight") {
            return Some((
                format!("{prefix}.7.self_attn.o_proj.lora_B.weight"),
                dtype,
                shape,
                data,
            ));
        } else if name == keys::SCORE {
            return Some(("base_model.model.lm_head.weight".into(), dtype, shape, data));
        }
        Some((name, dtype, shape, data))
    });
    changed.labels_json = Some(br#"["a", "a", ""]"#.to_vec());
    let report = refused(&changed);
    for (rule, subject) in [
        (Rule::NotFinite, "layers.0.self_attn.q_proj.lora_A"),
        (Rule::MissingTensor, "layers.1.self_attn.q_proj.lora_A"),
        (Rule::Rank, "layers.2.self_attn.q_proj.lora_A"),
        (Rule::Shape, "layers.2.self_attn.q_proj.lora_B"),
        (Rule::Dtype, "layers.0.self_attn.o_proj.lora_A"),
        (
            Rule::MissingTensor,
            "layers.0.self_attn.o_proj.lora_magnitude_vector",
        ),
        (Rule::OutsideTargets, "layers.0.mlp.up_proj.lora_A"),
        (Rule::Layer, "layers.7.self_attn.o_proj.lora_B"),
        (Rule::MissingTensor, "layers.2.self_attn.o_proj.lora_B"),
        (Rule::Unsupported, "lm_head.weight"),
        (Rule::MissingTensor, "score.weight"),
        (Rule::Labels, "labels.json[1]"),
        (Rule::Labels, "labels.json[2]"),
    ] {
        assert!(
            has(&report, rule, subject),
            "{rule:?} {subject} is not in {report}"
        );
    }
    assert!(
        !has(
            &report,
            Rule::MissingTensor,
            "layers.0.self_attn.o_proj.lora_A"
        ),
        "bad is not missing: {report}"
    );
}

#[test]
fn containers_that_lie_are_refused() {
    let (config, weights) = rich();
    let good = write(&config, &weights).unwrap();
    let swap = |safetensors: Vec<u8>| {
        refused(&AdapterArtifact {
            safetensors,
            ..good.clone()
        })
    };
    let header = |text: &str, data: usize| {
        [
            &(text.len() as u64).to_le_bytes()[..],
            text.as_bytes(),
            &vec![0; data],
        ]
        .concat()
    };
    for (what, bytes, rule) in [
        ("a pickle", b"\x80\x02}q\x00.".to_vec(), Rule::FileFormat),
        ("a zip", b"PK\x03\x04aaaaaaa".to_vec(), Rule::FileFormat),
        (
            "a pointer",
            b"version https://git-lfs.github.com/spec/v1\n".to_vec(),
            Rule::FileFormat,
        ),
        (
            "a huge header",
            [u64::MAX.to_le_bytes().to_vec(), vec![b'{'; 64]].concat(),
            Rule::Limit,
        ),
        (
            "a wrapping shape",
            header(
                r#"{"x":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,0]}}"#,
                0,
            ),
            Rule::Header,
        ),
        (
            "an overlap",
            header(
                r#"{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
                8,
            ),
            Rule::Header,
        ),
        (
            "a gap",
            header(
                r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
                8,
            ),
            Rule::Header,
        ),
        (
            "a name twice",
            header(
                r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
                4,
            ),
            Rule::Header,
        ),
        (
            "backwards",
            header(
                r#"{"x":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#,
                4,
            ),
            Rule::Header,
        ),
        ("nothing", header("{}", 0), Rule::Header),
    ] {
        let report = swap(bytes);
        assert!(
            report.findings.iter().any(|f| f.rule == rule),
            "{what}: {report}"
        );
    }
    // A header whose length looks like a pickle's first bytes is still a header.
    let mut padded = good.safetensors.clone();
    let length = u64::from_le_bytes(padded[..8].try_into().unwrap()) as usize;
    let wanted = length.next_multiple_of(0x10000) + 0x0280;
    padded.splice(8 + length..8 + length, vec![b' '; wanted - length]);
    padded[..8].copy_from_slice(&(wanted as u64).to_le_bytes());
    assert_eq!(padded[..2], [0x80, 0x02]);
    assert!(
        read_tiny(&AdapterArtifact {
            safetensors: padded,
            ..good.clone()
        })
        .is_ok()
    );
}

#[test]
fn limits_are_exact_and_named() {
    let (config, weights) = rich();
    let good = write(&config, &weights).unwrap();
    let header = u64::from_le_bytes(good.safetensors[..8].try_into().unwrap()) as usize;
    let at = Limits {
        max_config_bytes: good.config_json.len(),
        max_labels_bytes: good.labels_json.as_ref().unwrap().len(),
        max_weights_bytes: good.safetensors.len(),
        max_header_bytes: header,
        max_rank: 3,
        max_labels: 3,
        max_list: 2,
        max_findings: 1000,
    };
    assert!(read(&good, &TINY, &at).is_ok());
    let below = [
        Limits {
            max_config_bytes: at.max_config_bytes - 1,
            ..at
        },
        Limits {
            max_labels_bytes: at.max_labels_bytes - 1,
            ..at
        },
        Limits {
            max_weights_bytes: at.max_weights_bytes - 1,
            ..at
        },
        Limits {
            max_header_bytes: at.max_header_bytes - 1,
            ..at
        },
        Limits { max_rank: 2, ..at },
        Limits {
            max_labels: 2,
            ..at
        },
        Limits { max_list: 1, ..at },
    ];
    for limits in below {
        let report = read(&good, &TINY, &limits).unwrap_err();
        assert!(
            report
                .findings
                .iter()
                .any(|f| matches!(f.rule, Rule::Limit | Rule::Rank)),
            "{report}"
        );
    }
    let few = Limits {
        max_findings: 2,
        ..at
    };
    let bad = with_tensors(&good, |(name, ..)| {
        Some((format!("x{name}"), "I8".into(), vec![0], vec![]))
    });
    let report = read(&bad, &TINY, &few).unwrap_err();
    assert_eq!(report.findings.len(), 2);
    assert!(report.omitted_errors > 10 && report.errors() == 2 + report.omitted_errors);
}
