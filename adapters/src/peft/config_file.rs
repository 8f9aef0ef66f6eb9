//! `adapter_config.json` as PEFT 0.21 writes it: every field read, checked or refused.
//!
//! A known field that changes what an adapter computes in a way that we do not is an error, however the tensors look. An
//! unknown field is fine when its value is PEFT's way to say "off" (null, false, empty), an error when it switches a
//! method on (`use_...: true`, or a `..._config` with content), and a warning otherwise, as in PEFT, which drops it.
//! This file must not know tensors.

use serde_json::{Map, Value};

use super::{Checker, full};
use crate::config::{
    AdapterConfig, Ia3Config, Init, LoraConfig, MAX_PATTERN_BYTES, Modules, Site, TaskType,
};
use crate::report::Rule;
use crate::strict_json;

/// PEFT's value for "no module at all", written for adapters that are only a head.
pub(super) const NO_MODULES: &str = "dummy-target-modules";

/// Fields whose "off" value is null, false or empty, and what is switched on otherwise.
const SWITCHES: [(&str, &str); 14] = [
    ("alora_invocation_tokens", "activated LoRA"),
    ("arrow_config", "Arrow routing"),
    ("fan_in_fan_out", "weights stored as [in, out]"),
    ("kasa_config", "KaSA"),
    ("layer_replication", "replicated layers"),
    ("lora_bias", "a bias on B"),
    ("megatron_config", "Megatron layers"),
    ("monteclora_config", "MonteCLoRA"),
    ("target_parameters", "LoRA on parameters"),
    ("trainable_token_indices", "trained token embeddings"),
    ("use_bdlora", "block-diagonal LoRA"),
    ("use_qalora", "QA-LoRA"),
    ("velora_config", "VeLoRA"),
    ("use_alora", "activated LoRA"),
];

/// Fields that say how the adapter came to be and change nothing in what it computes.
const HISTORY: [&str; 12] = [
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
];

/// Fields that [`Fields::config`] reads.
const READ: [&str; 17] = [
    "alpha_pattern",
    "base_model_name_or_path",
    "bias",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_dropout",
    "modules_to_save",
    "peft_type",
    "r",
    "rank_pattern",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
];

/// Fields of an (IA)3 configuration that [`Fields::ia3`] reads.
const READ_IA3: [&str; 7] = [
    "base_model_name_or_path",
    "exclude_modules",
    "feedforward_modules",
    "modules_to_save",
    "peft_type",
    "target_modules",
    "task_type",
];

/// Fields of an (IA)3 configuration that change nothing in what the adapter computes.
const HISTORY_IA3: [&str; 5] = [
    "auto_mapping",
    "inference_mode",
    "init_ia3_weights",
    "peft_version",
    "revision",
];

/// Reads the configuration. `None` when it has no usable form; the findings say why.
pub(super) fn read(bytes: &[u8], check: &mut Checker) -> Option<AdapterConfig> {
    const FILE: &str = crate::version::AdapterArtifact::CONFIG_FILE;
    if bytes.len() > check.limits.max_config_bytes {
        let (found, limit) = (bytes.len(), check.limits.max_config_bytes);
        let next = "remove what does not belong into it";
        check.error(
            FILE,
            Rule::Limit,
            format!("{found} bytes"),
            format!("at most {limit}"),
            next,
        );
        return None;
    }
    let object = match strict_json::parse(bytes) {
        Ok(Value::Object(object)) => object,
        Ok(_) => {
            let next = "upload the file that PEFT's save_pretrained wrote";
            check.error(
                FILE,
                Rule::Json,
                "JSON that is no object",
                "an object",
                next,
            );
            return None;
        }
        Err(reason) => {
            let next = "upload the file that PEFT's save_pretrained wrote";
            check.error(FILE, Rule::Json, reason, "JSON", next);
            return None;
        }
    };
    let before = check.report.errors();
    let mut fields = Fields {
        object: &object,
        check,
    };
    let kind = object.get("peft_type").and_then(Value::as_str);
    let config = match kind {
        Some("IA3") => {
            let ia3 = fields.ia3();
            let known: [&[&str]; 3] = [&READ_IA3, &HISTORY_IA3, &["fan_in_fan_out"]];
            unknown_fields(&object, &known, check);
            Some(AdapterConfig::Ia3(ia3))
        }
        Some(full::KIND) => {
            let full = fields.full();
            unknown_fields(&object, &[&full::READ], check);
            Some(AdapterConfig::Full(full))
        }
        _ => {
            let lora = fields.config();
            let switches = SWITCHES.map(|(name, _)| name);
            unknown_fields(&object, &[&READ, &HISTORY, &switches], check);
            lora.map(AdapterConfig::Lora)
        }
    };
    (check.report.errors() == before)
        .then_some(config)
        .flatten()
}

fn is_off(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::String(text) => text.is_empty(),
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(true) | Value::Number(_) => false,
    }
}

fn unknown_fields(object: &Map<String, Value>, known: &[&[&str]], check: &mut Checker) {
    for (key, value) in object {
        let known = known.iter().any(|names| names.contains(&key.as_str()));
        if known || is_off(value) {
            continue;
        }
        let switched_on = key.starts_with("use_") && *value == Value::Bool(true)
            || key.ends_with("_config") && value.is_object();
        if switched_on {
            let next = "save the adapter as plain LoRA, rsLoRA or DoRA, or merge it";
            check.error(
                key,
                Rule::UnknownField,
                brief(value),
                "a method that is known",
                next,
            );
        } else {
            let next = "nothing, if it only describes the training";
            check.warning(
                key,
                Rule::UnknownField,
                brief(value),
                "a field of PEFT 0.21",
                next,
            );
        }
    }
}

/// A value cut to what fits a message.
fn brief(value: &Value) -> String {
    let text = value.to_string();
    if text.chars().count() <= 80 {
        return text;
    }
    let head: String = text.chars().take(77).collect();
    format!("{head}...")
}

pub(super) struct Fields<'a, 'b> {
    object: &'a Map<String, Value>,
    pub(super) check: &'a mut Checker<'b>,
}

impl Fields<'_, '_> {
    fn config(&mut self) -> Option<LoraConfig> {
        self.peft_type();
        self.switches();
        let modules_to_save = self.modules_to_save();
        let config = LoraConfig {
            r: self.rank("r", self.object.get("r"), 8),
            lora_alpha: self.alpha("lora_alpha", self.object.get("lora_alpha"), 8.0),
            lora_dropout: self.dropout(),
            target_modules: self.target_modules(),
            exclude_modules: self.modules("exclude_modules"),
            layers_to_transform: self.numbers("layers_to_transform"),
            layers_pattern: self.strings("layers_pattern"),
            rank_pattern: self.table("rank_pattern", |f, k, v| f.rank(k, Some(v), 0)),
            alpha_pattern: self.table("alpha_pattern", |f, k, v| f.alpha(k, Some(v), 0.0)),
            use_rslora: self.flag("use_rslora"),
            use_dora: self.flag("use_dora"),
            init_lora_weights: self.init(),
            modules_to_save,
            task_type: self.task_type(),
            base_model_name_or_path: self.text("base_model_name_or_path"),
        };
        self.layer_rules(&config);
        Some(config)
    }

    fn ia3(&mut self) -> Ia3Config {
        let fan = self.object.get("fan_in_fan_out").filter(|v| !is_off(v));
        if let Some(value) = fan {
            let next = "merge it into the base, or train without it";
            let found = format!("{} (weights stored as [in, out])", brief(value));
            let expected = "null or false";
            self.check
                .error("fan_in_fan_out", Rule::Unsupported, found, expected, next);
        }
        // What PEFT fills in for the families that are served here.
        let down = || Modules::sites(&[Site::Down]);
        let feedforward_modules = match self.object.get("feedforward_modules") {
            None | Some(Value::Null) => down(),
            Some(_) => match self.modules("feedforward_modules") {
                // A word is a pattern here, and no path is one of PEFT's shorthands.
                None | Some(Modules::AllLinear) => Modules::Nothing,
                Some(modules) => modules,
            },
        };
        Ia3Config {
            target_modules: self.target_modules(),
            exclude_modules: self.modules("exclude_modules"),
            feedforward_modules,
            modules_to_save: self.modules_to_save(),
            task_type: self.task_type(),
            base_model_name_or_path: self.text("base_model_name_or_path"),
        }
    }

    fn target_modules(&mut self) -> Modules {
        self.modules("target_modules").unwrap_or_else(|| {
            let next =
                "list the modules that the adapter changes, such as [\"q_proj\", \"v_proj\"]";
            self.value_error("target_modules", "no modules", "a list or a pattern", next);
            Modules::Nothing
        })
    }

    fn peft_type(&mut self) {
        match self.object.get("peft_type") {
            Some(Value::String(kind)) if kind == "LORA" => {}
            Some(other) => {
                let found = brief(other);
                let next = "train or convert it to LoRA or (IA)3";
                let expected = "\"LORA\" or \"IA3\"";
                self.check
                    .error("peft_type", Rule::Unsupported, found, expected, next);
            }
            None => {
                let next = "upload the file that PEFT's save_pretrained wrote";
                let expected = "\"LORA\" or \"IA3\"";
                self.value_error("peft_type", "nothing", expected, next);
            }
        }
    }

    fn switches(&mut self) {
        for (field, what) in SWITCHES {
            let Some(value) = self.object.get(field).filter(|v| !is_off(v)) else {
                continue;
            };
            let found = format!("{} ({what})", brief(value));
            let next = "merge it into the base, or train without it";
            self.check
                .error(field, Rule::Unsupported, found, "null or false", next);
        }
        match self.object.get("bias") {
            None | Some(Value::Null) => {}
            Some(Value::String(bias)) if bias == "none" => {}
            Some(other) => {
                let (found, next) = (brief(other), "train with bias=\"none\"");
                self.check
                    .error("bias", Rule::Unsupported, found, "\"none\"", next);
            }
        }
    }

    /// `score` heads only. PEFT itself adds both names for a sequence classifier, whichever the model has.
    pub(super) fn modules_to_save(&mut self) -> Option<Vec<String>> {
        let modules = self.strings("modules_to_save")?;
        for name in modules
            .iter()
            .filter(|m| !["score", "classifier"].contains(&m.as_str()))
        {
            let next = "train without it: only a score head can stand beside an adapter here";
            self.check.error(
                "modules_to_save",
                Rule::Unsupported,
                format!("'{}'", cut(name)),
                "\"score\"",
                next,
            );
        }
        Some(modules)
    }

    fn init(&mut self) -> Init {
        const FIELD: &str = "init_lora_weights";
        let name = match self.object.get(FIELD) {
            None | Some(Value::Null) => return Init::Default(true),
            Some(Value::Bool(value)) => return Init::Default(*value),
            Some(Value::String(name)) => name,
            Some(other) => {
                self.value_error(FIELD, &brief(other), "a boolean or a name", "");
                return Init::Default(true);
            }
        };
        let lower = name.to_lowercase();
        let changes_base = ["pissa", "corda"].iter().any(|p| lower.starts_with(p))
            || ["olora", "loftq", "lora_ga"].contains(&lower.as_str());
        if changes_base {
            let found = format!(
                "'{}': its A and B fit only the base that it changed",
                cut(name)
            );
            let next = "save it again with save_pretrained(path_initial_model_for_weight_conversion=...), which \
                        converts it to plain LoRA (LoftQ cannot be converted: train on the unquantised base)";
            let expected = "an initialisation that leaves the base alone";
            self.check
                .error(FIELD, Rule::InitChangedBase, found, expected, next);
        } else if !["gaussian", "eva", "orthogonal", "mica"].contains(&lower.as_str()) {
            let next = "if it leaves the base alone, set the field to true";
            let found = format!("'{}'", cut(name));
            let expected = "true, false, gaussian, eva, orthogonal or mica";
            self.check
                .error(FIELD, Rule::Unsupported, found, expected, next);
        }
        Init::Named(name.clone())
    }

    pub(super) fn task_type(&mut self) -> Option<TaskType> {
        match self.object.get("task_type") {
            None | Some(Value::Null) => None,
            Some(Value::String(task)) if task == "CAUSAL_LM" => Some(TaskType::CausalLm),
            Some(Value::String(task)) if task == "SEQ_CLS" => Some(TaskType::SeqCls),
            Some(other) => {
                let (found, expected) = (brief(other), "\"CAUSAL_LM\", \"SEQ_CLS\" or null");
                self.check
                    .error("task_type", Rule::Unsupported, found, expected, "");
                None
            }
        }
    }

    /// A list, a pattern or a shorthand. `None` when absent or empty.
    fn modules(&mut self, field: &'static str) -> Option<Modules> {
        match self.object.get(field) {
            Some(Value::String(text)) if text == "all-linear" => Some(Modules::AllLinear),
            Some(Value::String(text)) if text == NO_MODULES => Some(Modules::Nothing),
            Some(Value::String(text)) if !text.is_empty() => Some(Modules::Pattern(text.clone())),
            Some(Value::String(_)) => None,
            _ => self
                .strings(field)
                .filter(|l| !l.is_empty())
                .map(Modules::List),
        }
    }

    /// A list of layers, or one layer.
    pub(super) fn numbers(&mut self, field: &'static str) -> Option<Vec<usize>> {
        let one;
        let items = match self.object.get(field)? {
            Value::Null => return None,
            Value::Array(items) => items,
            other => {
                one = vec![other.clone()];
                &one
            }
        };
        self.list_limit(field, items.len());
        let mut layers = Vec::with_capacity(items.len());
        for item in items {
            match item.as_u64().and_then(|n| usize::try_from(n).ok()) {
                Some(layer) => layers.push(layer),
                None => self.value_error(field, &brief(item), "layer numbers from 0", ""),
            }
        }
        Some(layers)
    }

    /// Combinations that PEFT refuses too, so that no two readers of the file disagree about its layers.
    fn layer_rules(&mut self, config: &LoraConfig) {
        let by_list = matches!(config.target_modules, Modules::List(_));
        if config.layers_to_transform.is_some() && !by_list {
            let next = "write the layers into the pattern, or list the modules";
            let found = "layers beside a pattern of modules";
            self.value_error("layers_to_transform", found, "null with a pattern", next);
        }
        let pattern = config
            .layers_pattern
            .as_ref()
            .is_some_and(|p| !p.is_empty());
        if pattern && config.layers_to_transform.is_none() {
            let found = "a pattern without layers_to_transform";
            self.value_error("layers_pattern", found, "both or neither", "");
        }
    }

    fn table<T>(
        &mut self,
        field: &'static str,
        mut read: impl FnMut(&mut Self, &str, &Value) -> T,
    ) -> Vec<(String, T)> {
        let entries = match self.object.get(field) {
            None | Some(Value::Null) => return Vec::new(),
            Some(Value::Object(entries)) => entries,
            Some(other) => {
                self.value_error(field, &brief(other), "a table from patterns to numbers", "");
                return Vec::new();
            }
        };
        self.list_limit(field, entries.len());
        let mut table = Vec::new();
        for (pattern, value) in entries.iter().take(self.check.limits.max_list) {
            let subject = format!("{field}.{}", cut(pattern));
            table.push((pattern.clone(), read(self, &subject, value)));
        }
        table
    }

    fn rank(&mut self, subject: &str, value: Option<&Value>, default: usize) -> usize {
        let Some(value) = value else { return default };
        let limit = self.check.limits.max_rank;
        match value.as_u64() {
            Some(rank @ 1..) if rank <= limit as u64 => usize::try_from(rank).unwrap_or(default),
            _ => {
                let (found, expected) = (brief(value), format!("a rank from 1 to {limit}"));
                let next = "use a lower rank, or have the server's limit raised";
                self.check.error(subject, Rule::Rank, found, expected, next);
                1
            }
        }
    }

    fn alpha(&mut self, subject: &str, value: Option<&Value>, default: f64) -> f64 {
        let Some(value) = value else { return default };
        // Beyond this the scale would not be a finite f32.
        let alpha = value.as_f64().filter(|a| a.is_finite() && a.abs() <= 1e30);
        if alpha == Some(0.0) {
            let next = "set the alpha it was trained with";
            let found = "0: the adapter has no effect there";
            self.check
                .warning(subject, Rule::FieldValue, found, "another number", next);
        }
        alpha.unwrap_or_else(|| {
            self.value_error(subject, &brief(value), "a number", "");
            1.0
        })
    }

    fn dropout(&mut self) -> f64 {
        const FIELD: &str = "lora_dropout";
        let Some(value) = self.object.get(FIELD) else {
            return 0.0;
        };
        let dropout = value.as_f64().filter(|p| (0.0..=1.0).contains(p));
        dropout.unwrap_or_else(|| {
            self.value_error(FIELD, &brief(value), "a number from 0 to 1", "");
            0.0
        })
    }

    fn flag(&mut self, field: &'static str) -> bool {
        match self.object.get(field) {
            None | Some(Value::Null) => false,
            Some(Value::Bool(value)) => *value,
            Some(other) => {
                self.value_error(field, &brief(other), "true or false", "");
                false
            }
        }
    }

    pub(super) fn text(&mut self, field: &'static str) -> Option<String> {
        match self.object.get(field)? {
            Value::Null => None,
            Value::String(text) => Some(text.clone()),
            other => {
                self.value_error(field, &brief(other), "a string or null", "");
                None
            }
        }
    }

    /// A list of names, or one name.
    pub(super) fn strings(&mut self, field: &'static str) -> Option<Vec<String>> {
        let one;
        let items = match self.object.get(field)? {
            Value::Null => return None,
            Value::Array(items) => items,
            Value::String(text) if text.is_empty() => return None,
            other => {
                one = vec![other.clone()];
                &one
            }
        };
        self.list_limit(field, items.len());
        let mut strings = Vec::new();
        for item in items.iter().take(self.check.limits.max_list) {
            match item {
                Value::String(text) if text.is_empty() => {
                    self.value_error(field, "an empty name", "names", "");
                }
                Value::String(text) if text.len() > MAX_PATTERN_BYTES => {
                    let found = format!("a name of {} bytes", text.len());
                    let expected = format!("at most {MAX_PATTERN_BYTES}");
                    self.check.error(field, Rule::Limit, found, expected, "");
                }
                Value::String(text) => strings.push(text.clone()),
                other => self.value_error(field, &brief(other), "strings", ""),
            }
        }
        Some(strings)
    }

    fn list_limit(&mut self, field: &str, found: usize) {
        let limit = self.check.limits.max_list;
        if found > limit {
            let found = format!("{found} entries");
            let next = "write them as fewer patterns";
            self.check
                .error(field, Rule::Limit, found, format!("at most {limit}"), next);
        }
    }

    pub(super) fn value_error(&mut self, subject: &str, found: &str, expected: &str, next: &str) {
        self.check
            .error(subject, Rule::FieldValue, found, expected, next);
    }
}

/// A name cut to what fits a message.
pub(super) fn cut(text: &str) -> String {
    text.chars().take(120).collect()
}
