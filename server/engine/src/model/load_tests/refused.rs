//! Broken and hostile files: each is an error that names file, tensor or field, and rule; none panics.
#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has failed"
)]

use std::collections::BTreeMap;

use candle_core::quantized::gguf_file::Value as CandleValue;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use proptest::prelude::*;
use safetensors::Dtype;
use serde_json::json;

use super::super::safetensors_file::SafetensorsFile;
use super::*;

fn broken(
    break_it: impl FnOnce(&mut serde_json::Value, &mut BTreeMap<String, RawTensor>),
) -> String {
    let config = config(Family::Llama, true);
    let (mut json, mut tensors) = (
        hf_json(&config),
        raw_tensors(&config, &random_weights(&config)),
    );
    break_it(&mut json, &mut tensors);
    load_dir(hf_single(&json, &tensors).path())
        .unwrap_err()
        .to_string()
}

#[test]
fn a_directory_that_cannot_be_honoured_is_refused_by_name() {
    let set =
        |field: &'static str, value: serde_json::Value| broken(move |json, _| json[field] = value);
    let q = "model.layers.1.self_attn.q_proj.weight";
    let cases = [
        (set("model_type", json!("gemma")), "model_type"),
        (
            set("architectures", json!(["LlamaForSequenceClassification"])),
            "architectures",
        ),
        (
            set("quantization_config", json!({"bits": 4})),
            "quantization_config",
        ),
        (set("hidden_act", json!("gelu")), "hidden_act"),
        (set("attention_bias", json!(true)), "attention_bias"),
        (set("mlp_bias", json!(true)), "mlp_bias"),
        (
            set("rope_scaling", json!({"type": "yarn", "factor": 2})),
            "rope_scaling.type",
        ),
        (
            set("rope_scaling", json!({"rope_type": "linear"})),
            "rope_scaling.factor",
        ),
        (
            set("rope_parameters", json!({"rope_type": "dynamic"})),
            "rope_parameters.rope_type",
        ),
        (
            set("partial_rotary_factor", json!(0.5)),
            "partial_rotary_factor",
        ),
        (
            set(
                "layer_types",
                json!(["full_attention", "sliding_attention"]),
            ),
            "layer_types",
        ),
        (set("hidden_size", json!(-1)), "hidden_size"),
        (set("hidden_size", json!(1u64 << 60)), "must lie in"),
        (set("num_hidden_layers", json!(1u64 << 40)), "layers"),
        (set("num_key_value_heads", json!(3)), "kv_heads"),
        (set("head_dim", json!(7)), "head_dim"),
        (set("vocab_size", json!(null)), "vocab_size"),
        (set("rms_norm_eps", json!("small")), "rms_norm_eps"),
        (set("eos_token_id", json!(300)), "300"),
        (set("eos_token_id", json!([2, "x"])), "eos_token_id"),
        (broken(|_, t| drop(t.remove(q))), q),
        (
            broken(|_, t| {
                drop(t.insert("model.extra".to_owned(), (Dtype::F32, vec![1], vec![0; 4])))
            }),
            "model.extra",
        ),
        (broken(|_, t| t.get_mut(q).unwrap().1 = vec![24, 32]), q),
        (
            broken(|_, t| {
                t.get_mut(q).unwrap().2[400..404].copy_from_slice(&f32::NAN.to_le_bytes())
            }),
            "value 100 is NaN",
        ),
        (
            broken(|_, t| t.get_mut(q).unwrap().0 = Dtype::I32),
            "dtype I32",
        ),
    ];
    for (error, named) in cases {
        assert!(error.contains(named), "{named}: {error}");
    }
    let both = broken(|_, t| {
        (t.remove(q), t.remove("model.norm.weight"))
            .1
            .map(drop)
            .unwrap()
    });
    assert!(
        both.contains("2 finding(s)") && both.contains(q) && both.contains("model.norm.weight"),
        "{both}"
    );
}

#[test]
fn an_index_cannot_lead_out_of_its_directory() {
    let config = config(Family::Llama, true);
    let dir = hf_directory(&hf_json(&config));
    let secret = tempfile::tempdir().unwrap();
    let outside = secret.path().join("model.safetensors");
    std::fs::write(
        &outside,
        safetensors_bytes(&raw_tensors(&config, &random_weights(&config))),
    )
    .unwrap();
    for file in [
        "../x.safetensors",
        outside.to_str().unwrap(),
        "a/b.safetensors",
        "..",
        ".",
        "",
        "x.bin",
        "a\\b.safetensors",
        "n\0.safetensors",
    ] {
        let index = json!({"weight_map": {"model.norm.weight": file}}).to_string();
        std::fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
        let error = load_dir(dir.path()).unwrap_err().to_string();
        assert!(
            error.contains("index.json") && error.contains("plain name"),
            "{file:?}: {error}"
        );
    }
    std::fs::remove_file(dir.path().join("model.safetensors.index.json")).unwrap();
    let error = load_dir(dir.path()).unwrap_err().to_string();
    assert!(
        error.contains("model.safetensors") && error.contains("pickle"),
        "{error}"
    );
    assert!(
        load_dir(secret.path())
            .unwrap_err()
            .to_string()
            .contains("config.json")
    );
    assert!(
        load("/nowhere/model.gguf")
            .unwrap_err()
            .to_string()
            .contains("/nowhere/model.gguf")
    );
}

#[test]
fn every_prefix_of_a_safetensors_is_refused() {
    let config = ModelConfig {
        hidden: 2,
        heads: 1,
        kv_heads: 1,
        head_dim: 2,
        intermediate: 2,
        layers: 1,
        vocab: 4,
        ..config(Family::Llama, true)
    };
    let dir = tempfile::tempdir().unwrap();
    let bytes = safetensors_bytes(&raw_tensors(&config, &random_weights(&config)));
    let path = dir.path().join("model.safetensors");
    let open = |bytes: &[u8]| {
        std::fs::write(&path, bytes).unwrap();
        SafetensorsFile::open(&path)
    };
    for len in 0..bytes.len() {
        assert!(
            open(&bytes[..len]).is_err(),
            "a prefix of {len} bytes was read"
        );
    }
    let norm = "model.norm.weight";
    assert_eq!(open(&bytes).unwrap().read(norm).unwrap().len(), 2);
    let longer = open(&[&bytes[..], &[0]].concat()).unwrap_err().to_string();
    assert!(longer.contains("the tensors end at byte"), "{longer}");
}

#[test]
fn a_safetensors_header_cannot_lie() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("x.safetensors");
    let with = |len: u64, header: &str, data: usize| {
        let bytes = [&len.to_le_bytes()[..], header.as_bytes(), &vec![0; data]].concat();
        std::fs::write(&path, bytes).unwrap();
        SafetensorsFile::open(&path).unwrap_err().to_string()
    };
    let said = |header: &str, data: usize| with(header.len() as u64, header, data);
    let cases = [
        (with(u64::MAX, "{}", 0), "the header says"),
        (with(1 << 40, "{}", 0), "the header says"),
        (said("[]", 0), "no JSON object"),
        (said("{", 0), "no JSON"),
        (
            said(
                r#"{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
                4,
            ),
            "twice",
        ),
        (
            said(
                r#"{"t":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,4]}}"#,
                4,
            ),
            "overflows",
        ),
        (
            said(
                r#"{"t":{"dtype":"F32","shape":[9223372036854775807],"data_offsets":[0,4]}}"#,
                4,
            ),
            "overflows",
        ),
        (
            said(
                r#"{"t":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}"#,
                4,
            ),
            "takes 8 bytes",
        ),
        (
            said(
                r#"{"t":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#,
                4,
            ),
            "outside",
        ),
        (
            said(
                r#"{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,99]}}"#,
                4,
            ),
            "outside",
        ),
        (
            said(
                r#"{"t":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#,
                4,
            ),
            "shape",
        ),
        (
            said(
                r#"{"t":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
                8,
            ),
            "begins at",
        ),
        (
            said(
                r#"{"t":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"u":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
                4,
            ),
            "begins at",
        ),
        (
            said(
                r#"{"t":{"dtype":"F8_E4M3","shape":[4],"data_offsets":[0,4]}}"#,
                4,
            ),
            "F8_E4M3",
        ),
        (said(r#"{"t":7}"#, 0), "dtype"),
    ];
    for (error, rule) in cases {
        assert!(
            error.contains("x.safetensors") && error.contains(rule),
            "{rule}: {error}"
        );
    }
}

#[test]
fn a_gguf_that_cannot_be_honoured_is_refused_by_name() {
    let config = config(Family::Llama, true);
    let weights = random_weights(&config);
    let good = gguf_keys(&config, &tiny::tokenizer_metadata("test"));
    let tensors: Vec<(String, QTensor)> = {
        let loaded = |slot: &Slot| {
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
        };
        Slot::all(&config).iter().map(loaded).collect()
    };
    let with = |key: &str, value: Option<CandleValue>| {
        let mut keys: Vec<_> = good
            .iter()
            .filter(|(name, _)| name != key)
            .cloned()
            .collect();
        keys.extend(value.map(|value| (key.to_owned(), value)));
        read_gguf(&write_gguf(&keys, &tensors))
            .unwrap_err()
            .to_string()
    };
    let text = |value: &str| Some(CandleValue::String(value.to_owned()));
    let cases = [
        (with("general.architecture", text("gemma")), "gemma"),
        (with("general.architecture", None), "general.architecture"),
        (
            with("llama.block_count", Some(CandleValue::U32(3))),
            "blk.2.",
        ),
        (
            with("llama.block_count", Some(CandleValue::U32(1))),
            "blk.1.",
        ),
        (
            with("llama.block_count", Some(CandleValue::U32(u32::MAX))),
            "layers",
        ),
        (
            with("llama.embedding_length", text("many")),
            "llama.embedding_length",
        ),
        (
            with("llama.attention.head_count", Some(CandleValue::U32(0))),
            "heads",
        ),
        (
            with("llama.rope.dimension_count", Some(CandleValue::U32(4))),
            "llama.rope.dimension_count",
        ),
        (
            with("llama.rope.scaling.type", text("yarn")),
            "llama.rope.scaling.type",
        ),
        (
            with("llama.expert_count", Some(CandleValue::U32(8))),
            "llama.expert_count",
        ),
        (
            with("split.count", Some(CandleValue::U32(2))),
            "split.count",
        ),
        (with("general.type", text("adapter")), "general.type"),
        (
            with(
                "llama.attention.layer_norm_rms_epsilon",
                Some(CandleValue::F32(f32::NAN)),
            ),
            "rms_eps",
        ),
        (
            with("tokenizer.ggml.model", text("bert")),
            "tokenizer.ggml.model",
        ),
        (
            with("tokenizer.ggml.pre", text("tekken")),
            "tokenizer.ggml.pre",
        ),
        (with("tokenizer.ggml.merges", None), "tokenizer.ggml.merges"),
        (
            with("tokenizer.ggml.eos_token_id", Some(CandleValue::U32(9999))),
            "tokenizer.ggml.eos_token_id",
        ),
        (
            with("tokenizer.chat_template", text("{% if %}")),
            "chat template",
        ),
    ];
    for (error, named) in cases {
        assert!(
            error.contains("test") && error.contains(named),
            "{named}: {error}"
        );
    }
}

#[test]
fn every_prefix_of_a_gguf_model_is_refused() {
    let config = ModelConfig {
        hidden: 4,
        heads: 1,
        kv_heads: 1,
        head_dim: 4,
        intermediate: 4,
        layers: 1,
        ..config(Family::Qwen3, true)
    };
    let bytes = gguf_bytes(&config, &random_weights(&config));
    read_gguf(&bytes).unwrap();
    // The writer pads the last tensor; everything before that padding is needed.
    let end = bytes.len() - bytes.iter().rev().take_while(|byte| **byte == 0).count() - 4;
    for len in (0..end).step_by(7).chain(end - 64..end) {
        assert!(
            read_gguf(&bytes[..len]).is_err(),
            "a prefix of {len} bytes was read"
        );
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]
    #[test]
    fn flipped_bytes_never_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5), front in any::<bool>()) {
        static FILES: std::sync::OnceLock<(Vec<u8>, Vec<u8>)> = std::sync::OnceLock::new();
        let (gguf, safetensors) = FILES.get_or_init(|| {
            let config = config(Family::Llama, true);
            let weights = random_weights(&config);
            (gguf_bytes(&config, &weights), safetensors_bytes(&raw_tensors(&config, &weights)))
        });
        let flip = |bytes: &[u8]| {
            let mut bytes = bytes.to_vec();
            let reach = if front { 2000.min(bytes.len()) } else { bytes.len() };
            flips.iter().for_each(|(index, value)| bytes[index.index(reach)] = *value);
            bytes
        };
        let _ = read_gguf(&flip(gguf));
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.safetensors");
        std::fs::write(&path, flip(safetensors)).unwrap();
        if let Ok(mut file) = SafetensorsFile::open(&path) {
            let names: Vec<String> = file.tensors.keys().cloned().collect();
            for name in names {
                let _ = file.read(&name);
            }
        }
    }
}
