//! The files of an unfrozen version: our own form, for PEFT has none of single tensors.
//!
//! `adapter_config.json` says `"peft_type": "ESPALIER_FULL"`, which PEFT refuses by its name; each tensor is `W' - W` under the name
//! that the base has it by, with `.delta` behind. This file must not know values.

use serde_json::{Map, Value, json};

use super::config_file::Fields;
use crate::config::{BaseTensor, FullConfig, LayerTensor};
use crate::report::Rule;

/// `peft_type` of the configuration.
pub(super) const KIND: &str = "ESPALIER_FULL";

/// Fields of its configuration.
pub(super) const READ: [&str; 6] = [
    "base_model_name_or_path",
    "layers",
    "modules",
    "modules_to_save",
    "peft_type",
    "task_type",
];

/// Behind a tensor's name in the base.
const SUFFIX: &str = ".delta";

/// The name of a delta.
pub(super) fn name(tensor: BaseTensor) -> String {
    tensor.path() + SUFFIX
}

/// The tensor that a name stands for.
pub(super) fn tensor(name: &str) -> Option<BaseTensor> {
    let path = name.strip_suffix(SUFFIX)?;
    // One spelling for one tensor: what is written for it is what was read.
    let named = |tensor: &BaseTensor| tensor.path() == path;
    let Some(layers) = path.strip_prefix("model.layers.") else {
        return BaseTensor::OUTSIDE.into_iter().find(named);
    };
    let (number, _) = layers.split_once('.')?;
    let layer = number.parse().ok()?;
    let all = LayerTensor::ALL.into_iter();
    all.map(|tensor| BaseTensor::Layer(layer, tensor))
        .find(named)
}

/// The configuration as an object.
pub(super) fn fields(config: &FullConfig) -> Value {
    let fields = [
        (
            "base_model_name_or_path",
            json!(config.base_model_name_or_path),
        ),
        ("layers", json!(config.layers)),
        ("modules", json!(config.modules)),
        ("modules_to_save", json!(config.modules_to_save)),
        ("peft_type", json!(KIND)),
        ("task_type", json!(config.task_type.map(|t| t.as_str()))),
    ];
    let fields: Map<String, Value> = fields.map(|(k, v)| (k.to_owned(), v)).into_iter().collect();
    Value::Object(fields)
}

impl Fields<'_, '_> {
    /// The configuration of an unfrozen version.
    pub(super) fn full(&mut self) -> FullConfig {
        let mut layers = self.numbers("layers").unwrap_or_default();
        layers.sort_unstable();
        layers.dedup();
        let modules = self.strings("modules").unwrap_or_default();
        if layers.is_empty()
            && modules
                .iter()
                .all(|name| BaseTensor::outside(name).is_none())
        {
            let next = "name layers, or modules outside of them: embed_tokens, norm, lm_head";
            self.value_error("layers", "no layer", "layer numbers from 0", next);
        }
        for name in &modules {
            if LayerTensor::named(name).is_none() && BaseTensor::outside(name).is_none() {
                let found = format!("'{}'", super::config_file::cut(name));
                let next = "name modules of a decoder layer, such as q_proj or input_layernorm, or embed_tokens, norm, lm_head";
                self.check
                    .error("modules", Rule::Unsupported, found, "known modules", next);
            }
        }
        FullConfig {
            layers,
            modules,
            modules_to_save: self.modules_to_save(),
            task_type: self.task_type(),
            base_model_name_or_path: self.text("base_model_name_or_path"),
        }
    }
}
