//! The files of an unfrozen version: our own form, for PEFT has none of single tensors.
//!
//! `adapter_config.json` says `"peft_type": "ESPALIER_FULL"`, which PEFT refuses by its name; each tensor is `W' - W` under the name
//! that the base has it by, with `.delta` behind. This file must not know values.

use serde_json::{Map, Value, json};

use super::config_file::Fields;
use crate::config::{FullConfig, LayerTensor};
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
pub(super) fn name(layer: usize, tensor: LayerTensor) -> String {
    tensor.path(layer) + SUFFIX
}

/// The tensor that a name stands for.
pub(super) fn tensor(name: &str) -> Option<(usize, LayerTensor)> {
    let path = name.strip_suffix(SUFFIX)?;
    let (number, _) = path.strip_prefix("model.layers.")?.split_once('.')?;
    let layer = number.parse().ok()?;
    // One spelling for one layer: what is written for it is what was read.
    let tensor = LayerTensor::ALL
        .into_iter()
        .find(|t| t.path(layer) == path)?;
    Some((layer, tensor))
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
        if layers.is_empty() {
            self.value_error("layers", "no layer", "layer numbers from 0", "");
        }
        let modules = self.strings("modules").unwrap_or_default();
        for name in &modules {
            let known = |tensor: &LayerTensor| tensor.module() == name;
            if !LayerTensor::ALL.iter().any(known) {
                let found = format!("'{}'", super::config_file::cut(name));
                let next = "name modules of a decoder layer, such as q_proj or input_layernorm";
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
