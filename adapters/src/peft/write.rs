//! From configuration and weights to the bytes that PEFT 0.21 would save for them: the same bytes for the same values.
//!
//! This file must not know a base: the weights say how large everything is.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use safetensors::tensor::{Dtype, TensorView};
use serde::Serialize as _;
use serde_json::ser::{PrettyFormatter, Serializer};
use serde_json::{Map, Number, Value, json};

use super::config_file::NO_MODULES;
use super::full;
use super::keys::{self, HiddenPart, Part};
use crate::config::{
    AdapterConfig, BaseTensor, Ia3Config, Init, LoraConfig, Modules, ScaleOn, Site, SitePlan,
};
use crate::error::AdapterError;
use crate::version::AdapterArtifact;
use crate::weights::{AdapterWeights, Delta, Numbers, ScoreHead, SiteAdapter};

/// The version whose fields and spelling are written.
const PEFT_VERSION: &str = "0.21.2";

/// Writes an adapter, each tensor in the dtype of its numbers; [`super::read`] gives back the same configuration and weights.
///
/// # Errors
/// [`AdapterError::Inconsistent`] when the weights are not those that the configuration describes: reading the files
/// back would give another adapter, or none.
pub fn write(
    config: impl Into<AdapterConfig>,
    weights: &AdapterWeights,
) -> Result<AdapterArtifact, AdapterError> {
    let config = config.into();
    consistent(&config, weights)?;
    let config_json = match &config {
        AdapterConfig::Lora(lora) => config_json(lora),
        AdapterConfig::Ia3(ia3) => ia3_json(ia3),
        AdapterConfig::Full(config) => pretty(&full::fields(config)),
    };
    let safetensors = tensors(weights)?;
    let labels_json = weights
        .head
        .as_ref()
        .map(|head| pretty(&json!(head.labels)));
    let head_json = weights.head.as_ref().and_then(|head| head.settings.write());
    Ok(AdapterArtifact {
        config_json,
        safetensors,
        labels_json,
        head_json,
    })
}

fn inconsistent(
    subject: &str,
    found: impl Into<String>,
    expected: impl Into<String>,
) -> AdapterError {
    let (subject, found, expected) = (subject.to_owned(), found.into(), expected.into());
    AdapterError::Inconsistent {
        subject,
        found,
        expected,
    }
}

fn consistent(config: &AdapterConfig, weights: &AdapterWeights) -> Result<(), AdapterError> {
    // By name, so that a new part does not compile before it has been thought of here.
    let AdapterWeights {
        sites,
        scales,
        full,
        head: _,
    } = weights;
    whole(config, full)?;
    let changed: BTreeSet<(usize, Site)> = sites.keys().chain(scales.keys()).copied().collect();
    let layers = changed.iter().map(|(layer, _)| layer + 1).max();
    let layers = layers.unwrap_or(0);
    match config {
        AdapterConfig::Lora(lora) => {
            let plan = lora.plan(layers).map_err(|mut errors| errors.remove(0))?;
            targeted(&changed, &plan.keys().copied().collect())?;
            for (&(layer, site), plan) in &plan {
                let found = sites.get(&(layer, site));
                low_rank(&site.path(layer), found, plan, lora.use_dora)?;
            }
        }
        AdapterConfig::Full(_) => targeted(&changed, &BTreeSet::new())?,
        AdapterConfig::Ia3(ia3) => {
            let plan = ia3.plan(layers).map_err(|mut errors| errors.remove(0))?;
            targeted(&changed, &plan.keys().copied().collect())?;
            for (&(layer, site), on) in &plan {
                if scales
                    .get(&(layer, site))
                    .is_none_or(|scale| scale.on != *on)
                {
                    let expected = format!("a vector on its {on:?}");
                    return Err(inconsistent(&site.path(layer), "none such", expected));
                }
            }
        }
    }
    head_consistent(config, weights)
}

/// Whole tensors are those that the configuration unfreezes; those that not every family has may lack.
fn whole(config: &AdapterConfig, full: &BTreeMap<BaseTensor, Delta>) -> Result<(), AdapterError> {
    let unfrozen = match config {
        AdapterConfig::Full(config) => config.tensors(),
        AdapterConfig::Lora(_) | AdapterConfig::Ia3(_) => BTreeSet::new(),
    };
    if let Some(tensor) = full.keys().find(|at| !unfrozen.contains(at)) {
        let expected = "none, because it is not unfrozen";
        return Err(inconsistent(&tensor.path(), "a delta", expected));
    }
    let absent = |at: &&BaseTensor| at.everywhere() && !full.contains_key(at);
    match unfrozen.iter().find(absent) {
        Some(tensor) => {
            let expected = "a delta, because it is unfrozen";
            Err(inconsistent(&tensor.path(), "nothing", expected))
        }
        None => Ok(()),
    }
}

/// What the weights change is what the configuration targets.
fn targeted(
    changed: &BTreeSet<(usize, Site)>,
    planned: &BTreeSet<(usize, Site)>,
) -> Result<(), AdapterError> {
    if let Some((layer, site)) = planned.difference(changed).next() {
        let expected = "weights, because it is targeted";
        return Err(inconsistent(&site.path(*layer), "no weights", expected));
    }
    if let Some((layer, site)) = changed.difference(planned).next() {
        let expected = "none, because it is not targeted";
        return Err(inconsistent(&site.path(*layer), "weights", expected));
    }
    Ok(())
}

/// A site's low-rank update is the one that is planned.
fn low_rank(
    path: &str,
    adapter: Option<&SiteAdapter>,
    plan: &SitePlan,
    use_dora: bool,
) -> Result<(), AdapterError> {
    let Some(adapter) = adapter else {
        let expected = "a low-rank update, as the configuration is LoRA's";
        return Err(inconsistent(path, "a vector of (IA)3", expected));
    };
    let same = adapter.r == plan.r && adapter.scale.to_bits() == plan.scale.to_bits();
    if !same {
        let found = format!("rank {} and scale {}", adapter.r, adapter.scale);
        return Err(inconsistent(
            path,
            found,
            format!("rank {} and scale {}", plan.r, plan.scale),
        ));
    }
    if adapter.magnitude.is_some() != use_dora {
        let expected = format!("a magnitude if use_dora, which is {use_dora}");
        return Err(inconsistent(path, "the opposite", expected));
    }
    let whole =
        adapter.r > 0 && adapter.a.len() % adapter.r == 0 && adapter.b.len() % adapter.r == 0;
    let outputs = adapter.b.len() / adapter.r.max(1);
    if !whole
        || adapter
            .magnitude
            .as_ref()
            .is_some_and(|m| m.len() != outputs)
    {
        return Err(inconsistent(
            path,
            "lengths of A, B or magnitude",
            "multiples of the rank",
        ));
    }
    Ok(())
}

/// Whether a head of one layer has rows of different lengths.
fn uneven(head: &ScoreHead) -> bool {
    let one = head.hidden.is_empty() && head.settings.hidden_layers.is_empty();
    one && !head.weight.len().is_multiple_of(head.labels.len())
}

fn head_consistent(config: &AdapterConfig, weights: &AdapterWeights) -> Result<(), AdapterError> {
    if weights.head.is_some() != config.wants_score() {
        let found = if weights.head.is_some() {
            "a head"
        } else {
            "no head"
        };
        return Err(inconsistent(
            "modules_to_save",
            found,
            "a head if and only if it names score",
        ));
    }
    match &weights.head {
        Some(head) if head.labels.is_empty() || uneven(head) => {
            let found = format!(
                "{} values for {} labels",
                head.weight.len(),
                head.labels.len()
            );
            Err(inconsistent("score", found, "rows of one length"))
        }
        Some(head) => match head.misfit(head.inputs()) {
            Some((path, found)) => Err(inconsistent(
                &path,
                found,
                "layers as its settings name them",
            )),
            None => Ok(()),
        },
        None => Ok(()),
    }
}

/// All fields that PEFT writes, sorted, indented by two. The patterns' order has a meaning and is kept.
fn config_json(config: &LoraConfig) -> Vec<u8> {
    let table = |entries: Vec<(&String, Value)>| {
        Value::Object(entries.into_iter().map(|(k, v)| (k.clone(), v)).collect())
    };
    let ranks = config
        .rank_pattern
        .iter()
        .map(|(k, r)| (k, json!(r)))
        .collect();
    let alphas = config
        .alpha_pattern
        .iter()
        .map(|(k, a)| (k, number(*a)))
        .collect();
    let fields: BTreeMap<&str, Value> = [
        ("alora_invocation_tokens", Value::Null),
        ("alpha_pattern", table(alphas)),
        ("arrow_config", Value::Null),
        ("auto_mapping", Value::Null),
        (
            "base_model_name_or_path",
            json!(config.base_model_name_or_path),
        ),
        ("bias", json!("none")),
        ("corda_config", Value::Null),
        ("ensure_weight_tying", json!(false)),
        ("eva_config", Value::Null),
        (
            "exclude_modules",
            config.exclude_modules.as_ref().map_or(Value::Null, modules),
        ),
        ("fan_in_fan_out", json!(false)),
        ("inference_mode", json!(true)),
        ("init_lora_weights", init(&config.init_lora_weights)),
        ("kasa_config", Value::Null),
        ("layer_replication", Value::Null),
        ("layers_pattern", json!(config.layers_pattern)),
        ("layers_to_transform", json!(config.layers_to_transform)),
        ("loftq_config", json!({})),
        ("lora_alpha", number(config.lora_alpha)),
        ("lora_bias", json!(false)),
        ("lora_dropout", json!(config.lora_dropout)),
        ("lora_ga_config", Value::Null),
        ("megatron_config", Value::Null),
        ("megatron_core", json!("megatron.core")),
        ("modules_to_save", json!(config.modules_to_save)),
        ("monteclora_config", Value::Null),
        ("peft_type", json!("LORA")),
        ("peft_version", json!(PEFT_VERSION)),
        ("qalora_group_size", json!(16)),
        ("r", json!(config.r)),
        ("rank_pattern", table(ranks)),
        ("revision", Value::Null),
        ("target_modules", modules(&config.target_modules)),
        ("target_parameters", Value::Null),
        ("task_type", json!(config.task_type.map(|t| t.as_str()))),
        ("trainable_token_indices", Value::Null),
        ("use_bdlora", Value::Null),
        ("use_dora", json!(config.use_dora)),
        ("use_qalora", json!(false)),
        ("use_rslora", json!(config.use_rslora)),
        ("velora_config", Value::Null),
    ]
    .into_iter()
    .collect();
    let object: Map<String, Value> = fields.into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
    pretty(&Value::Object(object))
}

/// All fields that PEFT writes for (IA)3, in the same form.
fn ia3_json(config: &Ia3Config) -> Vec<u8> {
    let fields = [
        ("auto_mapping", Value::Null),
        (
            "base_model_name_or_path",
            json!(config.base_model_name_or_path),
        ),
        (
            "exclude_modules",
            config.exclude_modules.as_ref().map_or(Value::Null, modules),
        ),
        ("fan_in_fan_out", json!(false)),
        (
            "feedforward_modules",
            match &config.feedforward_modules {
                Modules::Nothing => json!([]),
                other => modules(other),
            },
        ),
        ("inference_mode", json!(true)),
        ("init_ia3_weights", json!(true)),
        ("modules_to_save", json!(config.modules_to_save)),
        ("peft_type", json!("IA3")),
        ("peft_version", json!(PEFT_VERSION)),
        ("revision", Value::Null),
        ("target_modules", modules(&config.target_modules)),
        ("task_type", json!(config.task_type.map(|t| t.as_str()))),
    ];
    let fields: Map<String, Value> = fields.map(|(k, v)| (k.to_owned(), v)).into_iter().collect();
    pretty(&Value::Object(fields))
}

fn modules(modules: &Modules) -> Value {
    match modules {
        Modules::List(names) => json!(names),
        Modules::Pattern(pattern) => json!(pattern),
        Modules::AllLinear => json!("all-linear"),
        Modules::Nothing => json!(NO_MODULES),
    }
}

fn init(init: &Init) -> Value {
    match init {
        Init::Default(value) => json!(value),
        Init::Named(name) => json!(name),
    }
}

/// Whole numbers as integers, as PEFT's users write alpha.
#[expect(clippy::cast_possible_truncation, reason = "a whole number below 2^53")]
fn number(value: f64) -> Value {
    if value.fract() == 0.0 && value.abs() < 9e15 {
        return json!(value as i64);
    }
    Number::from_f64(value).map_or(Value::Null, Value::Number)
}

/// Python's `json.dumps(value, indent=2)` for values whose text is ASCII or UTF-8.
fn pretty(value: &Value) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut serializer =
        Serializer::with_formatter(&mut bytes, PrettyFormatter::with_indent(b"  "));
    // Writing a `Value` into memory has no way to fail: its keys are strings and its numbers finite.
    let written = value.serialize(&mut serializer);
    debug_assert!(
        written.is_ok(),
        "a JSON value could not be written to memory"
    );
    bytes
}

fn tensors(weights: &AdapterWeights) -> Result<Vec<u8>, AdapterError> {
    let mut data: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = Vec::new();
    let mut add = |name: String, shape: Vec<usize>, (dtype, bytes)| {
        data.push((name, dtype, shape, bytes));
    };
    for (&(layer, site), s) in &weights.sites {
        let name = |part| keys::name(layer, site, part);
        add(name(Part::A), vec![s.r, s.a.len() / s.r], stored(&s.a));
        add(name(Part::B), vec![s.b.len() / s.r, s.r], stored(&s.b));
        if let Some(magnitude) = &s.magnitude {
            let shape = vec![magnitude.len()];
            add(name(Part::Magnitude), shape, single(magnitude));
        }
    }
    for (&(layer, site), scale) in &weights.scales {
        let shape = match scale.on {
            ScaleOn::Outputs => vec![scale.l.len(), 1],
            ScaleOn::Inputs => vec![1, scale.l.len()],
        };
        add(
            keys::name(layer, site, Part::Scale),
            shape,
            single(&scale.l),
        );
    }
    for (tensor, delta) in &weights.full {
        let len = delta.values.len();
        let shape = match tensor.is_matrix() {
            true => vec![delta.rows, len / delta.rows.max(1)],
            false => vec![len],
        };
        add(full::name(*tensor), shape, single(&delta.values));
    }
    if let Some(head) = &weights.head {
        for (index, layer) in head.hidden.iter().enumerate() {
            let (outputs, name) = (layer.bias.len(), |part| keys::hidden_name(index, part));
            let shape = vec![outputs, layer.weight.len() / outputs.max(1)];
            add(name(HiddenPart::Weight), shape, single(&layer.weight));
            add(name(HiddenPart::Bias), vec![outputs], single(&layer.bias));
        }
        let rows = head.labels.len();
        let shape = vec![rows, head.weight.len() / rows];
        add(keys::SCORE.to_owned(), shape, single(&head.weight));
    }
    let failed = |e: safetensors::SafeTensorError| {
        inconsistent("tensors", e.to_string(), "tensors that can be saved")
    };
    let views = data.iter().map(|(name, dtype, shape, bytes)| {
        TensorView::new(*dtype, shape.clone(), bytes).map(|view| (name.as_str(), view))
    });
    let views: Vec<(&str, TensorView)> = views.collect::<Result<_, _>>().map_err(failed)?;
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    safetensors::serialize(views, Some(metadata)).map_err(failed)
}

/// The dtype and the bytes that a file holds.
fn stored(numbers: &Numbers) -> (Dtype, Vec<u8>) {
    match numbers {
        Numbers::F32(numbers) => single(numbers),
        Numbers::Bf16(numbers) => {
            let bytes = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
            (Dtype::BF16, bytes)
        }
        Numbers::F16(numbers) => {
            let bytes = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
            (Dtype::F16, bytes)
        }
    }
}

fn single(numbers: &[f32]) -> (Dtype, Vec<u8>) {
    let bytes = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
    (Dtype::F32, bytes)
}
