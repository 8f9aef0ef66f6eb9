//! The files of unfrozen versions: written, read back, and refused.

use super::*;
use crate::config::{BaseTensor, FullConfig, LayerTensor};
use crate::weights::Delta;

/// All of layer 2 but what not every family has, and some of its modules in layer 0.
fn deltas(config: &FullConfig) -> AdapterWeights {
    let mut rng = ChaCha8Rng::seed_from_u64(5);
    let tensors = config.tensors().into_iter();
    let full = tensors.filter(|tensor| tensor.everywhere()).map(|at| {
        let shape = at.shape(&TINY);
        let rows = if at.is_matrix() { shape[0] } else { 1 };
        let values = random(shape.iter().product(), &mut rng);
        (at, Delta { rows, values })
    });
    AdapterWeights {
        full: full.collect(),
        ..AdapterWeights::default()
    }
}

fn some() -> FullConfig {
    FullConfig {
        modules: vec!["up_proj".to_owned(), "input_layernorm".to_owned()],
        base_model_name_or_path: Some("org/bäse".to_owned()),
        ..FullConfig::new(vec![0, 2])
    }
}

#[test]
fn what_is_written_reads_back() {
    for config in [some(), FullConfig::new(vec![1]), FullConfig::whole(&TINY)] {
        let weights = deltas(&config);
        assert_eq!(weights.misfit(&TINY), None);
        let artifact = write(&config, &weights).unwrap();
        let (read, found, report) = read_tiny(&artifact).unwrap();
        assert_eq!((read, found), (config.into(), weights));
        assert!(report.findings.is_empty(), "{report}");
    }
    let mut short = deltas(&some());
    let delta = short
        .full
        .get_mut(&BaseTensor::Layer(2, LayerTensor::AttnNorm))
        .unwrap();
    delta.values.pop();
    let (path, wrong) = short.misfit(&TINY).unwrap();
    assert_eq!(path, "model.layers.2.input_layernorm.weight");
    assert_eq!(wrong, "the delta has 5 values, not 6");
}

#[test]
fn what_cannot_be_honoured_is_refused_by_its_field() {
    let artifact = write(some(), &deltas(&some())).unwrap();
    let cases = [
        (
            "layers",
            json!([0]),
            "a delta of a tensor that is not unfrozen",
        ),
        (
            "layers",
            json!([0, 1, 2]),
            "model.layers.1.mlp.up_proj.weight.delta",
        ),
        ("layers", json!([0, 3]), "layers 0 to 2"),
        ("layers", json!([]), "no layer"),
        (
            "modules",
            json!(["up_proj"]),
            "a delta of a tensor that is not unfrozen",
        ),
        ("modules", json!(["w1"]), "'w1'"),
        (
            "modules",
            json!(["up_proj", "input_layernorm", "norm"]),
            "model.norm.weight.delta",
        ),
        ("peft_type", json!("LORA"), "no modules"),
        ("use_novel", json!(true), "use_novel"),
    ];
    for (field, value, expected) in cases {
        let changed = with_config(&artifact, &[(field, value)]);
        let report = read_tiny(&changed).unwrap_err();
        let text = serde_json::to_string(&report.findings).unwrap();
        assert!(text.contains(expected), "{field}: {text}");
    }
    let larger = BaseShape { hidden: 7, ..TINY };
    let report = read(&artifact, &larger, &Limits::default()).unwrap_err();
    assert!(
        report.findings.iter().all(|f| f.rule == Rule::Shape),
        "{report}"
    );
    let tied = BaseShape {
        tied_embeddings: true,
        ..TINY
    };
    let whole = FullConfig::whole(&TINY);
    let artifact = write(&whole, &deltas(&whole)).unwrap();
    let report = read(&artifact, &tied, &Limits::default()).unwrap_err();
    let text = serde_json::to_string(&report.findings).unwrap();
    assert!(
        text.contains("lm_head of a base whose output head"),
        "{text}"
    );
    let mut lacking = deltas(&some());
    lacking.full.pop_first();
    let error = write(some(), &lacking).unwrap_err().to_string();
    assert!(
        error.contains("model.layers.0.mlp.up_proj.weight"),
        "{error}"
    );
}
