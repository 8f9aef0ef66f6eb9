//! Reading, writing and refusing adapters: PEFT's own files, random ones, and damaged ones.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod full;
mod ia3;
mod refusals;

use std::path::PathBuf;

use proptest::prelude::*;
use rand::{Rng as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde_json::{Value, json};

use super::*;
use crate::config::{AdapterConfig, BaseShape, LoraConfig, Modules, Site};
use crate::version::AdapterArtifact;
use crate::weights::{AdapterWeights, Numbers, ScoreHead, SiteAdapter};

/// A base small enough to damage byte by byte; no two sides are equal, so that swapped ones show.
const TINY: BaseShape = BaseShape {
    layers: 3,
    hidden: 6,
    intermediate: 10,
    heads: 4,
    kv_heads: 1,
    head_dim: 2,
    vocab: 11,
    tied_embeddings: false,
};

const SMOLLM2: BaseShape = BaseShape {
    layers: 30,
    hidden: 576,
    intermediate: 1536,
    heads: 9,
    kv_heads: 3,
    head_dim: 64,
    vocab: 49152,
    tied_embeddings: false,
};

fn random(n: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    (0..n).map(|_| rng.random_range(-2.0..2.0)).collect()
}

/// Random weights for everything that the configuration targets.
fn weights(config: &LoraConfig, base: &BaseShape, labels: usize, seed: u64) -> AdapterWeights {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let sites = config
        .plan(base.layers)
        .unwrap()
        .into_iter()
        .map(|((layer, site), plan)| {
            let (inputs, outputs) = base.dims(site);
            let adapter = SiteAdapter {
                r: plan.r,
                scale: plan.scale,
                a: random(plan.r * inputs, &mut rng).into(),
                b: random(outputs * plan.r, &mut rng).into(),
                magnitude: config.use_dora.then(|| random(outputs, &mut rng)),
            };
            ((layer, site), adapter)
        });
    let sites = sites.collect();
    let head = (labels > 0).then(|| ScoreHead {
        labels: (0..labels).map(|i| format!("l{i}é")).collect(),
        weight: random(labels * base.hidden, &mut rng),
        ..ScoreHead::default()
    });
    AdapterWeights {
        sites,
        head,
        ..AdapterWeights::default()
    }
}

/// A small adapter that uses most features at once.
fn rich() -> (LoraConfig, AdapterWeights) {
    let config = LoraConfig {
        lora_dropout: 0.05,
        rank_pattern: vec![
            ("layers.2.self_attn.q_proj".into(), 2),
            ("q_proj".into(), 1),
        ],
        alpha_pattern: vec![("o_proj".into(), 2.5)],
        exclude_modules: Some(Modules::List(vec![
            "model.layers.1.self_attn.o_proj".into(),
        ])),
        use_rslora: true,
        use_dora: true,
        base_model_name_or_path: Some("org/bäse".into()),
        ..LoraConfig::new(3, 7.0, &[Site::Q, Site::O])
    };
    let config = config.with_score_head();
    let weights = weights(&config, &TINY, 3, 1);
    (config, weights)
}

fn read_tiny(
    artifact: &AdapterArtifact,
) -> Result<(AdapterConfig, AdapterWeights, Report), Report> {
    read(artifact, &TINY, &Limits::default())
}

fn with_config(artifact: &AdapterArtifact, changes: &[(&str, Value)]) -> AdapterArtifact {
    let mut config: Value = serde_json::from_slice(&artifact.config_json).unwrap();
    for (key, value) in changes {
        config[*key] = value.clone();
    }
    AdapterArtifact {
        config_json: config.to_string().into_bytes(),
        ..artifact.clone()
    }
}

/// Rewrites the tensors by name: (name, dtype, shape, bytes), dropping those for which `change` gives `None`.
type Raw = (String, String, Vec<usize>, Vec<u8>);
fn with_tensors(
    artifact: &AdapterArtifact,
    change: impl FnMut(Raw) -> Option<Raw>,
) -> AdapterArtifact {
    let file = safetensors::SafeTensors::deserialize(&artifact.safetensors).unwrap();
    let raw = file.iter().map(|(name, view)| {
        (
            name.to_owned(),
            format!("{:?}", view.dtype()),
            view.shape().to_vec(),
            view.data().to_vec(),
        )
    });
    let mut kept: Vec<Raw> = raw.filter_map(change).collect();
    kept.sort();
    AdapterArtifact {
        safetensors: container(&kept),
        ..artifact.clone()
    }
}

fn container(tensors: &[Raw]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, dtype, shape, bytes) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        header.insert(
            name.clone(),
            json!({"dtype": dtype, "shape": shape, "data_offsets": offsets}),
        );
        data.extend(bytes);
    }
    let header = Value::Object(header).to_string().into_bytes();
    [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat()
}

fn f32s(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|v| v.to_le_bytes()).collect()
}

fn refused(artifact: &AdapterArtifact) -> Report {
    read_tiny(artifact).expect_err("this adapter must be refused")
}

fn has(report: &Report, rule: Rule, subject: &str) -> bool {
    report
        .findings
        .iter()
        .any(|f| f.rule == rule && f.subject.contains(subject))
}

#[test]
fn what_is_written_reads_back_the_same() {
    let (config, weights) = rich();
    let artifact = write(&config, &weights).unwrap();
    assert_eq!(
        artifact,
        write(&config, &weights).unwrap(),
        "the same values give the same bytes"
    );
    let (config_read, weights_read, report) = read_tiny(&artifact).unwrap();
    assert_eq!(
        (&config_read, &weights_read),
        (&config.clone().into(), &weights)
    );
    assert_eq!(report, Report::default());
    assert_eq!(
        write(&config_read, &weights_read).unwrap().digest(),
        artifact.digest()
    );
    // The other reader of the format agrees about every tensor.
    let file = safetensors::SafeTensors::deserialize(&artifact.safetensors).unwrap();
    let q = &weights.sites[&(2, Site::Q)];
    let view = file
        .tensor("base_model.model.model.layers.2.self_attn.q_proj.lora_B.weight")
        .unwrap();
    assert_eq!(
        (view.shape(), view.data()),
        (&[8, 2][..], &f32s(&q.b.to_f32())[..])
    );
    let name = "base_model.model.model.layers.0.self_attn.o_proj.lora_magnitude_vector";
    assert_eq!(file.tensor(name).unwrap().shape(), [6]);
    assert_eq!(
        file.tensor("base_model.model.score.weight")
            .unwrap()
            .shape(),
        [3, 6]
    );
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn any_adapter_reads_back_the_same(
        seed: u64, r in 1..5_usize, alpha in 1..400_u32, rslora: bool, dora: bool, labels in 0..4_usize,
        mask in 1..128_u32, layers in prop::option::of(prop::collection::vec(0..3_usize, 1..3)),
        ranks in prop::collection::vec((0..7_usize, 1..6_usize), 0..4),
    ) {
        let sites: Vec<Site> = Site::ALL.into_iter().filter(|s| mask >> s.index() & 1 == 1).collect();
        let pattern = |(i, r): &(usize, usize)| (Site::ALL[*i].module().to_owned(), *r);
        let mut config = LoraConfig {
            use_rslora: rslora,
            use_dora: dora,
            layers_to_transform: layers,
            ..LoraConfig::new(r, f64::from(alpha) / 8.0, &sites)
        };
        for (name, r) in ranks.iter().map(pattern) {
            if !config.rank_pattern.iter().any(|(n, _)| *n == name) {
                config.rank_pattern.push((name, r));
            }
        }
        if labels > 0 {
            config = config.with_score_head();
        }
        let weights = weights(&config, &TINY, labels, seed);
        let artifact = write(&config, &weights).unwrap();
        let (config_read, weights_read, _) = read_tiny(&artifact).map_err(|r| TestCaseError::fail(r.to_string()))?;
        prop_assert_eq!(config_read, config.into());
        prop_assert_eq!(weights_read, weights);
    }

    #[test]
    fn damaged_files_are_refused_or_read_but_never_panic(
        seed: u64, in_config: bool, flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
    ) {
        let (config, mut weights) = rich();
        weights.head.as_mut().unwrap().weight.rotate_left(seed as usize % 7);
        let mut artifact = write(&config, &weights).unwrap();
        for (at, byte) in flips {
            let bytes = if in_config { &mut artifact.config_json } else { &mut artifact.safetensors };
            let header = 4000.min(bytes.len());
            let at = at.index(header);
            bytes[at] = byte;
        }
        if let Ok((_, weights, _)) = read_tiny(&artifact) {
            prop_assert_eq!(weights.misfit(&TINY), None);
        }
    }

    #[test]
    fn rubbish_never_panics(config in any::<Vec<u8>>(), tensors in any::<Vec<u8>>(), labels in any::<Vec<u8>>()) {
        let artifact = AdapterArtifact { config_json: config, safetensors: tensors, labels_json: Some(labels), head_json: None };
        prop_assert!(read_tiny(&artifact).is_err());
    }
}

#[test]
fn every_prefix_is_refused() {
    let (config, weights) = rich();
    let whole = write(&config, &weights).unwrap();
    for end in 0..whole.safetensors.len() {
        let safetensors = whole.safetensors[..end].to_vec();
        refused(&AdapterArtifact {
            safetensors,
            ..whole.clone()
        });
    }
    for end in 0..whole.config_json.len() {
        let config_json = whole.config_json[..end].to_vec();
        refused(&AdapterArtifact {
            config_json,
            ..whole.clone()
        });
    }
    let mut longer = whole.clone();
    longer.safetensors.push(0);
    assert!(has(&refused(&longer), Rule::Header, "safetensors"));
}

#[test]
fn half_precision_widens_exactly() {
    let config = LoraConfig::new(2, 3.0, &[Site::V]);
    let artifact = write(&config, &weights(&config, &TINY, 0, 5)).unwrap();
    for dtype in ["F16", "BF16"] {
        let mut want: Vec<f32> = Vec::new();
        let half = with_tensors(&artifact, |(name, _, shape, data)| {
            let values = data
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b));
            let bytes = values
                .flat_map(|v| {
                    let (bytes, wide) = match dtype {
                        "F16" => (
                            half::f16::from_f32(v).to_le_bytes(),
                            half::f16::from_f32(v).to_f32(),
                        ),
                        _ => (
                            half::bf16::from_f32(v).to_le_bytes(),
                            half::bf16::from_f32(v).to_f32(),
                        ),
                    };
                    if name.contains("layers.1.") && name.contains("lora_A") {
                        want.push(wide);
                    }
                    bytes
                })
                .collect();
            Some((name, dtype.to_owned(), shape, bytes))
        });
        let (_, read, _) = read_tiny(&half).unwrap();
        let a = &read.sites[&(1, Site::V)].a;
        assert_eq!(*a.to_f32(), *want, "{dtype}");
        let kept = match a {
            Numbers::F32(_) => "F32",
            Numbers::Bf16(_) => "BF16",
            Numbers::F16(_) => "F16",
        };
        assert_eq!(kept, dtype, "as stored");
    }
}

#[test]
fn a_head_alone_and_labels_by_default() {
    let config = LoraConfig::head_only();
    let mut weights = weights(&config, &TINY, 2, 9);
    let mut artifact = write(&config, &weights).unwrap();
    assert_eq!(read_tiny(&artifact).unwrap().1, weights);
    artifact.labels_json = None;
    weights.head.as_mut().unwrap().labels = vec!["LABEL_0".into(), "LABEL_1".into()];
    assert_eq!(read_tiny(&artifact).unwrap().1, weights);
    artifact.labels_json = Some(br#"["one"]"#.to_vec());
    assert!(has(&refused(&artifact), Rule::Labels, "labels.json"));
    let generator = LoraConfig::new(2, 3.0, &[Site::Q]);
    let mut artifact = write(&generator, &self::weights(&generator, &TINY, 0, 9)).unwrap();
    artifact.labels_json = Some(br#"["one"]"#.to_vec());
    assert!(has(&refused(&artifact), Rule::Labels, "labels.json"));
}

#[test]
fn writing_what_would_read_back_differently_is_refused() {
    let (config, weights) = rich();
    let changed = |change: fn(&mut LoraConfig, &mut AdapterWeights)| {
        let (mut config, mut weights) = (config.clone(), weights.clone());
        change(&mut config, &mut weights);
        write(&config, &weights).expect_err("inconsistent")
    };
    changed(|c, _| c.lora_alpha = 8.0);
    changed(|c, _| c.use_dora = false);
    changed(|c, _| c.rank_pattern.clear());
    changed(|c, w| {
        c.modules_to_save = None;
        c.task_type = None;
        w.head.as_mut().unwrap().labels.pop();
    });
    changed(|_, w| w.head = None);
    changed(|_, w| drop(w.sites.remove(&(0, Site::Q))));
    changed(|c, _| c.target_modules = Modules::sites(&[Site::Q]));
}

#[test]
fn another_base_by_name_is_a_warning() {
    let (config, _) = rich();
    assert_eq!(base_name_warning(&config.clone().into(), "org/bäse"), None);
    let warning = base_name_warning(&config.into(), "other").unwrap();
    assert_eq!(
        (warning.severity, warning.rule),
        (Severity::Warning, Rule::BaseModel)
    );
    assert_eq!(
        base_name_warning(&LoraConfig::new(1, 1.0, &[]).into(), "other"),
        None
    );
}

#[test]
fn directories_hold_the_parts_and_follow_no_link() {
    let (config, weights) = rich();
    let artifact = write(&config, &weights).unwrap();
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("adapter");
    let limits = Limits::default();
    to_dir(&artifact, &dir).unwrap();
    assert_eq!(from_dir(&dir, &limits).unwrap(), artifact);
    // Without labels of its own a classifier takes those of the config beside it.
    let bare = AdapterArtifact {
        labels_json: None,
        head_json: None,
        ..artifact.clone()
    };
    to_dir(&bare, &dir).unwrap();
    assert_eq!(from_dir(&dir, &limits).unwrap(), bare);
    let id2label = br#"{"id2label": {"1": "b", "0": "a", "2": "c"}}"#;
    std::fs::write(dir.join("config.json"), id2label).unwrap();
    let labels = from_dir(&dir, &limits).unwrap().labels_json.unwrap();
    assert_eq!(read_labels(&labels, &limits).unwrap(), ["a", "b", "c"]);
    let small = Limits {
        max_weights_bytes: 10,
        ..limits
    };
    assert!(
        from_dir(&dir, &small)
            .unwrap_err()
            .to_string()
            .contains("limit 10")
    );
    let weights_file = dir.join(AdapterArtifact::WEIGHTS_FILE);
    std::fs::rename(&weights_file, temp.path().join("secret")).unwrap();
    assert!(
        from_dir(&dir, &limits)
            .unwrap_err()
            .to_string()
            .contains("missing")
    );
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink(temp.path().join("secret"), &weights_file).unwrap();
        assert!(
            from_dir(&dir, &limits)
                .unwrap_err()
                .to_string()
                .contains("regular file")
        );
        to_dir(&artifact, &dir).unwrap();
        let kept = std::fs::read(temp.path().join("secret")).unwrap();
        assert_eq!(
            kept, artifact.safetensors,
            "the link was replaced, not followed"
        );
        assert_eq!(from_dir(&dir, &limits).unwrap(), artifact);
    }
}

/// The adapters that PEFT itself wrote, outside of this repository.
fn golden() -> Option<PathBuf> {
    let default = concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared/golden");
    let dir =
        std::env::var_os("ESPALIER_GOLDEN").map_or_else(|| PathBuf::from(default), PathBuf::from);
    if dir.is_dir() {
        return Some(dir);
    }
    eprintln!(
        "skipped: no golden files at {}; ESPALIER_GOLDEN names another place",
        dir.display()
    );
    None
}

#[test]
fn pefts_own_adapters_read_and_write_back() {
    let Some(golden) = golden() else { return };
    let read_golden = |name: &str| {
        let artifact = from_dir(&golden.join(name), &Limits::default()).unwrap();
        let (config, weights, report) =
            read(&artifact, &SMOLLM2, &Limits::default()).unwrap_or_else(|r| panic!("{name}: {r}"));
        assert_eq!(report, Report::default(), "{name}");
        assert_eq!(weights.misfit(&SMOLLM2), None);
        let again = write(&config, &weights).unwrap();
        assert_eq!(
            read(&again, &SMOLLM2, &Limits::default()).unwrap().1,
            weights,
            "{name}"
        );
        assert_eq!(
            again.safetensors, artifact.safetensors,
            "{name}: our tensors are PEFT's, byte for byte"
        );
        let theirs = String::from_utf8(artifact.config_json).unwrap();
        assert_eq!(
            String::from_utf8(again.config_json).unwrap(),
            theirs,
            "{name}"
        );
        weights
    };
    let w = read_golden("adapters/all_linear_r2");
    assert_eq!((w.sites.len(), w.sites[&(3, Site::Down)].scale), (210, 4.0));
    let w = read_golden("adapters/qv_rslora_r8");
    assert_eq!(
        (w.sites.len(), w.sites[&(0, Site::V)].scale),
        (60, (16.0 / 8.0_f64.sqrt()) as f32)
    );
    let w = read_golden("adapters/dora_r2");
    assert_eq!(
        (
            w.sites.len(),
            w.sites[&(29, Site::Down)].magnitude.as_ref().unwrap().len()
        ),
        (90, 576)
    );
    let w = read_golden("adapters/patterns");
    let rank = |layer, site| (w.sites[&(layer, site)].r, w.sites[&(layer, site)].scale);
    assert_eq!(rank(0, Site::Q), (7, (4.0 / 7.0_f64) as f32));
    assert_eq!(rank(1, Site::Q), (2, 2.0));
    assert_eq!(rank(29, Site::Q).0, 7);
    assert_eq!(rank(5, Site::Down), (5, (4.0 / 5.0_f64) as f32));
    assert_eq!(rank(5, Site::Up), (2, 4.5));
    let w = read_golden("adapters/bf16_r3");
    assert_eq!((w.sites.len(), w.max_rank()), (90, 3));
    let w = read_golden("adapters/last_layers_r4");
    assert_eq!((w.sites.len(), w.sites.keys().next().unwrap().0), (28, 26));
    let w = read_golden("adapters/seq_cls");
    let head = w.head.unwrap();
    assert_eq!(
        (w.sites.len(), head.labels.len(), head.weight.len()),
        (60, 5, 5 * 576)
    );
    for part in ["init", "final"] {
        read_golden(&format!("train_sft/{part}"));
        read_golden(&format!("train_seq_cls/{part}"));
    }
}
