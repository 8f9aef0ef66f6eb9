//! GGUF adapters against the files that llama.cpp's converter makes of the golden adapters, against what PEFT computes, and refusals.

#![allow(
    clippy::unwrap_used,
    reason = "a test that cannot set itself up has failed"
)]

use std::collections::BTreeMap;
use std::io::Cursor;
use std::path::{Path, PathBuf};

use super::{Gguf, LoraBase, Metadata, half_of_pair, write_lora};
use crate::config::{BaseShape, LoraConfig, Site};
use crate::peft;
use crate::weights::{AdapterWeights, ScoreHead};

/// The model of the goldens.
const SHAPE: BaseShape = BaseShape {
    layers: 2,
    hidden: 32,
    intermediate: 64,
    heads: 4,
    kv_heads: 2,
    head_dim: 8,
    vocab: 299,
    tied_embeddings: false,
};

const LLAMA: LoraBase = LoraBase {
    architecture: "llama",
    paired_rows: true,
    head_dim: SHAPE.head_dim,
};

fn golden(path: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/golden")).join(path)
}

fn adapter(name: &str) -> (LoraConfig, AdapterWeights) {
    let limits = peft::Limits::default();
    let dir = golden(&format!("adapters/{name}"));
    let artifact = peft::from_dir(&dir, &limits).unwrap();
    let (config, weights, _) = peft::read(&artifact, &SHAPE, &limits).unwrap();
    (config.lora().unwrap().clone(), weights)
}

type Tensors = BTreeMap<String, (Vec<usize>, Vec<f32>)>;

fn read(bytes: Vec<u8>) -> (Metadata, Tensors) {
    let mut gguf = Gguf::read("test", Cursor::new(bytes)).unwrap();
    let (metadata, infos) = (gguf.metadata().clone(), gguf.tensors().clone());
    let tensors = infos.into_iter().map(|(name, info)| {
        let values = gguf.dequantize(&name).unwrap();
        (name, (info.shape, values))
    });
    (metadata, tensors.collect())
}

/// What the converter leaves out, by the end of a tensor's name: it writes alpha as it stands in the configuration.
fn left_out(name: &str, adapter: &str) -> f64 {
    let gate = name.ends_with("ffn_gate.weight.lora_b");
    if adapter == "patterns" && gate {
        3.0 / 8.0
    } else {
        1.0
    }
}

#[test]
fn files_are_those_of_llama_cpp_s_converter() {
    let other = |architecture, paired_rows| LoraBase {
        architecture,
        paired_rows,
        ..LLAMA
    };
    let cases = [
        ("all_linear_r3", "all_linear_r3", LLAMA),
        ("qv_rslora_r4", "qv_rslora_r4", LLAMA),
        ("patterns", "patterns", LLAMA),
        ("bf16_r3", "bf16_r3", LLAMA),
        ("last_layer_r2", "last_layer_r2", LLAMA),
        ("all_linear_r3", "mistral", LLAMA),
        ("all_linear_r3", "qwen2", other("qwen2", false)),
        ("all_linear_r3", "qwen3", other("qwen3", false)),
    ];
    for (name, file, base) in cases {
        let (config, weights) = adapter(name);
        let ours = read(write_lora(name, &config.clone().into(), &weights, &base).unwrap());
        let theirs = read(std::fs::read(golden(&format!("gguf/{file}.gguf"))).unwrap());
        for key in ["general.architecture", "general.type", "adapter.type"] {
            let (ours, theirs) = (ours.0.text(key).unwrap(), theirs.0.text(key).unwrap());
            assert!(
                ours.is_some() && ours == theirs,
                "{file} {key}: {ours:?} {theirs:?}"
            );
        }
        let alpha = |metadata: &Metadata| metadata.float("adapter.lora.alpha").unwrap().unwrap();
        let rslora = if config.use_rslora { 2.0 } else { 1.0 };
        assert_eq!(alpha(&ours.0), rslora * alpha(&theirs.0), "{file}");
        let names: Vec<_> = ours.1.keys().collect();
        assert_eq!(names, theirs.1.keys().collect::<Vec<_>>(), "{file}");
        for (tensor, (shape, values)) in &theirs.1 {
            let factor = left_out(tensor, name);
            let wanted: Vec<f32> = values
                .iter()
                .map(|x| (factor * f64::from(*x)) as f32)
                .collect();
            assert_eq!(ours.1[tensor], (shape.clone(), wanted), "{file} {tensor}");
        }
    }
}

/// The whole update of every site: alpha / r times B A as llama.cpp multiplies them, rows put back, against scale B A of PEFT's files.
#[test]
fn what_llama_cpp_computes_is_what_peft_computes() {
    let mut mixed = adapter("patterns");
    mixed.0.use_rslora = true;
    let mut none = adapter("qv_rslora_r4");
    none.0.lora_alpha = 0.0;
    for (config, mut weights) in [adapter("patterns"), adapter("qv_rslora_r4"), mixed, none] {
        let plan = config.plan(SHAPE.layers).unwrap();
        for (key, site) in &mut weights.sites {
            site.scale = plan[key].scale;
        }
        let (metadata, tensors) = read(write_lora("a", &config.into(), &weights, &LLAMA).unwrap());
        let alpha = f64::from(metadata.float("adapter.lora.alpha").unwrap().unwrap());
        assert!(alpha != 0.0, "llama.cpp takes an alpha of zero for none");
        for (&(layer, site), adapter) in &weights.sites {
            let name = super::lora::site_name(site);
            let part = |end| &tensors[&format!("blk.{layer}.{name}.weight.lora_{end}")];
            let ((shape, a), (_, b)) = (part("a"), part("b"));
            let [r, inputs] = shape[..] else {
                panic!("{shape:?}")
            };
            let (own_a, own_b) = (adapter.a.to_f32(), adapter.b.to_f32());
            for row in 0..b.len() / r {
                let paired = matches!(site, Site::Q | Site::K);
                let own = if paired {
                    half_of_pair(row, SHAPE.head_dim)
                } else {
                    row
                };
                for column in 0..inputs {
                    let dot = |b: &[f32], a: &[f32], row: usize| -> f64 {
                        let terms = (0..r)
                            .map(|k| f64::from(b[row * r + k]) * f64::from(a[k * inputs + column]));
                        terms.sum()
                    };
                    let ours = alpha / r as f64 * dot(b, a, row);
                    let wanted = f64::from(adapter.scale) * dot(&own_b, &own_a, own);
                    assert!(
                        (ours - wanted).abs() < 1e-6,
                        "{site} {row} {column}: {ours} {wanted}"
                    );
                }
            }
        }
    }
}

#[test]
fn rows_in_pairs_are_a_permutation_that_changes_every_inner_row() {
    let mut rows: Vec<usize> = (0..24).map(|row| half_of_pair(row, 8)).collect();
    assert_eq!(rows[..9], [0, 4, 1, 5, 2, 6, 3, 7, 8]);
    rows.sort_unstable();
    assert_eq!(rows, (0..24).collect::<Vec<_>>());
}

#[test]
fn what_the_form_cannot_hold_is_refused_with_a_way_out() {
    let refused = |config: &LoraConfig, weights: &AdapterWeights| {
        write_lora("a", &config.into(), weights, &LLAMA)
            .unwrap_err()
            .to_string()
    };
    let (config, weights) = adapter("dora_r2");
    let text = refused(&config, &weights);
    assert!(
        text.contains("model.layers.0.self_attn.q_proj") && text.contains("DoRA"),
        "{text}"
    );
    assert!(text.contains("espalierd merge"), "{text}");
    let (config, weights) = adapter("seq_cls");
    let text = refused(&config, &weights);
    assert!(
        text.contains("score") && text.contains("5 labels"),
        "{text}"
    );
    let head_only = AdapterWeights {
        head: Some(ScoreHead {
            labels: vec!["a".to_owned()],
            weight: vec![0.5; 32],
            ..ScoreHead::default()
        }),
        ..AdapterWeights::default()
    };
    assert!(refused(&LoraConfig::head_only(), &head_only).contains("1 labels"));
    let text = refused(&LoraConfig::new(4, 8.0, &[]), &AdapterWeights::default());
    assert!(text.contains("nothing to export"), "{text}");
}
