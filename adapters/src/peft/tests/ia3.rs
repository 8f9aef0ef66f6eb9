//! (IA)3's files: PEFT's own, ours, and what is refused.

use super::*;
use crate::combine::{Term, combine};
use crate::config::{Ia3Config, ScaleOn};
use crate::gguf::{LoraBase, write_lora};
use crate::weights::SiteScale;

/// Keys and values on outputs, the queries of one layer and `down_proj` on inputs.
fn vectors() -> (Ia3Config, AdapterWeights) {
    let config = Ia3Config {
        target_modules: Modules::List(
            [
                "k_proj",
                "v_proj",
                "down_proj",
                "model.layers.1.self_attn.q_proj",
            ]
            .map(str::to_owned)
            .into(),
        ),
        feedforward_modules: Modules::Pattern(r".*\.(down|q)_proj".to_owned()),
        base_model_name_or_path: Some("org/bäse".into()),
        ..Ia3Config::default()
    };
    let mut rng = ChaCha8Rng::seed_from_u64(4);
    let plan = config.plan(TINY.layers).unwrap();
    assert_eq!(plan.len(), 10);
    assert_eq!(plan[&(1, Site::Q)], ScaleOn::Inputs);
    assert_eq!(plan[&(2, Site::K)], ScaleOn::Outputs);
    let scales = plan.into_iter().map(|((layer, site), on)| {
        let l = random(on.width(TINY.dims(site)), &mut rng);
        ((layer, site), SiteScale { on, l })
    });
    let weights = AdapterWeights {
        scales: scales.collect(),
        ..AdapterWeights::default()
    };
    (config, weights)
}

#[test]
fn what_is_written_reads_back() {
    let (config, weights) = vectors();
    assert_eq!(weights.misfit(&TINY), None);
    let artifact = write(&config, &weights).unwrap();
    let (read, found, report) = read_tiny(&artifact).unwrap();
    assert_eq!((read, &found), (config.into(), &weights));
    assert!(report.findings.is_empty(), "{report}");
    let mut short = weights.clone();
    short.scales.get_mut(&(0, Site::Down)).unwrap().l.pop();
    let (path, wrong) = short.misfit(&TINY).unwrap();
    assert_eq!(path, "model.layers.0.mlp.down_proj");
    assert_eq!(wrong, "l has 9 values, not 10");
}

#[test]
fn pefts_files_come_back_byte_for_byte() {
    let base = BaseShape {
        layers: 2,
        hidden: 32,
        intermediate: 64,
        heads: 4,
        kv_heads: 2,
        head_dim: 8,
        vocab: 320,
        tied_embeddings: false,
    };
    for name in ["adapters/ia3", "adapters/ia3_wide", "train_ia3/final"] {
        let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/golden");
        let artifact = from_dir(&dir.join(name), &Limits::default()).unwrap();
        let (config, weights, report) = read(&artifact, &base, &Limits::default()).unwrap();
        assert!(report.findings.is_empty(), "{name}: {report}");
        let again = write(&config, &weights).unwrap();
        assert_eq!(again.safetensors, artifact.safetensors, "{name}");
        assert_eq!(again.config_json, artifact.config_json, "{name}");
    }
}

#[test]
fn what_cannot_be_honoured_is_refused_by_its_field() {
    let (config, weights) = vectors();
    let artifact = write(&config, &weights).unwrap();
    let cases = [
        ("target_modules", json!(["k_proj"]), "OUTSIDE_TARGETS"),
        ("target_modules", json!(["k_proj", "lm_head"]), "lm_head"),
        ("target_modules", json!(null), "no modules"),
        ("feedforward_modules", json!([]), "[1, 10]"),
        ("feedforward_modules", json!("("), "regular expression"),
        ("fan_in_fan_out", json!(true), "[in, out]"),
        ("modules_to_save", json!(["embed_tokens"]), "embed_tokens"),
        ("use_novel", json!(true), "use_novel"),
        (
            "peft_type",
            json!("LORA"),
            "a vector of (IA)3 with peft_type LORA",
        ),
        ("peft_type", json!("ADALORA"), "\"LORA\" or \"IA3\""),
    ];
    for (field, value, expected) in cases {
        let changed = with_config(&artifact, &[(field, value)]);
        let report = read_tiny(&changed).unwrap_err();
        let text = report.to_string() + &serde_json::to_string(&report.findings).unwrap();
        let plain = text.replace("\\\"", "\"");
        let found = plain.to_lowercase().contains(&expected.to_lowercase());
        assert!(found, "{field}: {text}");
    }
}

#[test]
fn neither_sums_nor_gguf_hold_vectors() {
    let (config, weights) = vectors();
    let term = Term {
        name: "scaled",
        weights: &weights,
        factor: 1.0,
    };
    let error = combine(&[term], None).unwrap_err().to_string();
    assert!(
        error.starts_with("scaled: model.layers.0.self_attn.k_proj is scaled by (IA)3"),
        "{error}"
    );
    let base = LoraBase {
        architecture: "llama",
        paired_rows: true,
        head_dim: TINY.head_dim,
    };
    let error = write_lora("a", &config.into(), &weights, &base).unwrap_err();
    assert!(error.to_string().contains("a vector of (IA)3"), "{error}");
    assert!(error.to_string().contains("espalierd merge"), "{error}");
}
