//! Good files: every family is the same model in either format, whatever its spelling and types.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has failed"
)]

use std::path::Path;
use std::time::{Duration, Instant};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use espalier_adapters::text::{Message, encode_chat};
use safetensors::Dtype;
use serde_json::json;

use super::*;

#[test]
fn every_family_is_the_same_model_in_either_format() {
    for family in [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3] {
        for tied in [true, false] {
            let config = config(family, tied);
            let weights = random_weights(&config);
            let tensors = raw_tensors(&config, &weights);
            let gguf = read_gguf(&gguf_bytes(&config, &weights)).unwrap();
            let single = load_dir(hf_single(&hf_json(&config), &tensors).path()).unwrap();
            let sharded = load_dir(hf_sharded(&hf_json(&config), &tensors).path()).unwrap();
            for loaded in [&gguf, &single, &sharded] {
                assert_eq!(loaded.weights, weights, "{family:?}");
                assert_eq!(loaded.digest, weights.digest(&config), "{family:?}");
                assert_eq!(loaded.stop_ids, [0, 2]);
                let mut found = loaded.config.clone();
                found.family = family;
                assert_eq!(found, config);
            }
            let turns = [Message::new("user", "the <|im_end|> and 12")];
            let ids = |model: &LoadedModel| {
                encode_chat(
                    &model.tokenizer,
                    model.template.as_ref().unwrap(),
                    &turns,
                    &[],
                    true,
                )
                .unwrap()
            };
            assert_eq!(ids(&gguf), ids(&single));
        }
    }
}

#[test]
fn a_digest_sees_every_value_and_its_place() {
    let config = config(Family::Llama, true);
    let weights = random_weights(&config);
    let digest = weights.digest(&config);
    let mut changed = weights.clone();
    changed.layers[1].down[7] = f32::from_bits(changed.layers[1].down[7].to_bits() ^ 1);
    assert_ne!(changed.digest(&config), digest);
    let mut swapped = weights;
    swapped.layers.swap(0, 1);
    assert_ne!(swapped.digest(&config), digest);
}

#[test]
fn a_stored_head_equal_to_the_embedding_is_tied() {
    let tied = config(Family::Llama, true);
    let mut weights = random_weights(&tied);
    let digest = weights.digest(&tied);
    weights.lm_head = Some(weights.embed.clone());
    let untied = config(Family::Llama, false);
    let loaded = read_gguf(&gguf_bytes(&untied, &weights)).unwrap();
    assert!(loaded.config.tie_embeddings && loaded.weights.lm_head.is_none());
    assert_eq!(loaded.digest, digest);
    weights.lm_head.as_mut().unwrap()[3] += 1.0;
    let error = load_dir(hf_single(&hf_json(&tied), &raw_tensors(&untied, &weights)).path())
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("lm_head.weight: differs from the embedding table"),
        "{error}"
    );
}

#[test]
fn half_types_widen_exactly() {
    let config = config(Family::Llama, true);
    let weights = random_weights(&config);
    let mut tensors = raw_tensors(&config, &weights);
    let f16: Vec<half::f16> = weights.layers[0]
        .q
        .iter()
        .map(|v| half::f16::from_f32(*v))
        .collect();
    let bf16: Vec<half::bf16> = weights.layers[0]
        .k
        .iter()
        .map(|v| half::bf16::from_f32(*v))
        .collect();
    let q = tensors
        .get_mut("model.layers.0.self_attn.q_proj.weight")
        .unwrap();
    (q.0, q.2) = (
        Dtype::F16,
        f16.iter().flat_map(|v| v.to_le_bytes()).collect(),
    );
    let k = tensors
        .get_mut("model.layers.0.self_attn.k_proj.weight")
        .unwrap();
    (k.0, k.2) = (
        Dtype::BF16,
        bf16.iter().flat_map(|v| v.to_le_bytes()).collect(),
    );
    let loaded = load_dir(hf_single(&hf_json(&config), &tensors).path()).unwrap();
    assert_eq!(
        loaded.weights.layers[0].q,
        f16.iter().map(|v| v.to_f32()).collect::<Vec<_>>()
    );
    assert_eq!(
        loaded.weights.layers[0].k,
        bf16.iter().map(|v| v.to_f32()).collect::<Vec<_>>()
    );
    assert_eq!(loaded.weights.layers[0].v, weights.layers[0].v);
}

#[test]
fn tiny_is_quick_repeatable_and_whole() {
    let start = Instant::now();
    let model = load("tiny:7").unwrap();
    assert!(
        start.elapsed() < Duration::from_secs(1),
        "took {:?}",
        start.elapsed()
    );
    assert_eq!(model.digest, load("tiny:7").unwrap().digest);
    assert_ne!(model.digest, load("tiny:8").unwrap().digest);
    assert_eq!(
        (model.name.as_str(), model.stop_ids.as_slice()),
        ("tiny-7", &[2][..])
    );
    let text = "the cat and the hat: été 😀";
    let ids = model.tokenizer.encode(text).unwrap();
    assert!(ids.len() < text.len() - 5, "merges apply");
    assert_eq!(model.tokenizer.decode(&ids, true).unwrap(), text);
    for spec in ["tiny:", "tiny:x", "tiny:-1", "tiny:99999999999999999999"] {
        assert!(
            load(spec).unwrap_err().to_string().contains("seed"),
            "{spec}"
        );
    }
}

/// Loads a good directory after `break_it` has had its way with configuration and tensors.

#[test]
fn rope_is_read_in_every_spelling() {
    let read = |value: serde_json::Value| {
        let config = config(Family::Llama, true);
        let mut json = hf_json(&config);
        json.as_object_mut()
            .unwrap()
            .extend(value.as_object().unwrap().clone());
        load_dir(hf_single(&json, &raw_tensors(&config, &random_weights(&config))).path())
            .unwrap()
            .config
            .rope
    };
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192});
    let expected = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context_length: 8192,
    };
    assert_eq!(
        read(json!({"rope_scaling": llama3})),
        RopeConfig {
            theta: 50_000.0,
            scaling: expected.clone()
        }
    );
    let mut newer = llama3;
    newer["rope_theta"] = json!(500_000.0);
    assert_eq!(
        read(json!({"rope_parameters": newer})),
        RopeConfig {
            theta: 500_000.0,
            scaling: expected
        }
    );
    let linear = RopeConfig {
        theta: 50_000.0,
        scaling: RopeScaling::Linear { factor: 2.0 },
    };
    assert_eq!(
        read(json!({"rope_scaling": {"type": "linear", "factor": 2}})),
        linear
    );
    assert_eq!(
        read(json!({"rope_scaling": null})).scaling,
        RopeScaling::None
    );
    assert_eq!(
        read(json!({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}})).theta,
        1e4
    );
}

#[test]
fn a_ggufs_rope_factors_are_llama3s_rule() {
    let mut config = config(Family::Llama, true);
    config.rope.scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context_length: 128,
    };
    let plain = RopeConfig {
        theta: config.rope.theta,
        scaling: RopeScaling::None,
    }
    .inverse_frequencies(8);
    let stretched = config.rope.inverse_frequencies(8);
    let factors: Vec<f32> = plain
        .iter()
        .zip(&stretched)
        .map(|(plain, stretched)| plain / stretched)
        .collect();
    assert!(
        factors[0] == 1.0 && factors[3] == 8.0 && factors.iter().any(|f| *f > 1.0 && *f < 8.0),
        "{factors:?}"
    );
    let weights = random_weights(&config);
    let slots = Slot::all(&config);
    let mut tensors: Vec<(String, QTensor)> = slots
        .iter()
        .map(|slot| {
            let tensor = Tensor::from_vec(
                weights.get(*slot).unwrap().clone(),
                slot.shape(&config),
                &Device::Cpu,
            )
            .unwrap();
            (
                slot.gguf(),
                QTensor::quantize(&tensor, GgmlDType::F32).unwrap(),
            )
        })
        .collect();
    let stored = Tensor::from_vec(factors, 4, &Device::Cpu).unwrap();
    tensors.push((
        "rope_freqs.weight".to_owned(),
        QTensor::quantize(&stored, GgmlDType::F32).unwrap(),
    ));
    let loaded = read_gguf(&write_gguf(
        &gguf_keys(&config, &tiny::tokenizer_metadata("test")),
        &tensors,
    ))
    .unwrap();
    for (found, expected) in loaded
        .config
        .rope
        .inverse_frequencies(8)
        .iter()
        .zip(&stretched)
    {
        assert!(
            (found - expected).abs() <= 1e-6 * expected,
            "{found} {expected}"
        );
    }
}

#[test]
fn the_projects_own_golden_directory_loads() {
    let model =
        load_dir(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/model")).unwrap();
    assert_eq!(
        (
            model.config.hidden,
            model.config.vocab,
            model.stop_ids.as_slice()
        ),
        (32, 320, &[2][..])
    );
    assert_eq!(
        model.tokenizer.encode("x=10**3;\n\tif a>=b:").unwrap(),
        [90, 31, 317, 316, 21, 29, 201, 200, 75, 72, 280, 318, 68, 28]
    );
}

#[test]
fn the_real_model_is_the_same_as_a_directory() {
    let Some(path) = std::env::var_os("ESPALIER_MODEL") else {
        eprintln!("not checked: ESPALIER_MODEL names no GGUF");
        return;
    };
    let gguf = load(path.to_str().unwrap()).unwrap();
    let tensors = raw_tensors(&gguf.config, &gguf.weights);
    let dir = hf_sharded(&hf_json(&gguf.config), &tensors);
    drop(tensors);
    std::fs::write(
        dir.path().join("tokenizer.json"),
        gguf.tokenizer.to_json().unwrap(),
    )
    .unwrap();
    let directory = load_dir(dir.path()).unwrap();
    assert_eq!(directory.digest, gguf.digest);
    assert_eq!(directory.config, gguf.config);
    assert!(directory.weights == gguf.weights, "weights differ");
    let text = "In 1234 items <|im_start|>";
    assert_eq!(
        directory.tokenizer.encode(text).unwrap(),
        gguf.tokenizer.encode(text).unwrap()
    );
}
