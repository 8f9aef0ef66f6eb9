//! From an artifact's bytes to weights that fit a base, or to every reason why not.
//!
//! The configuration says which modules carry what rank; the tensors must be exactly those. This file must not know how
//! either file is spelled.

use std::collections::{BTreeMap, HashSet};

use serde_json::Value;

use super::config_file::cut;
use super::keys::{self, Key, Part};
use super::tensor_file::{self, Tensor};
use super::{Checker, Limits, config_file};
use crate::config::{BaseShape, LoraConfig, Modules, Site, SitePlan, TaskType};
use crate::error::AdapterError;
use crate::head::{HeadSettings, Problem};
use crate::report::{Finding, Report, Rule, Severity};
use crate::strict_json;
use crate::version::AdapterArtifact;
use crate::weights::{AdapterWeights, Numbers, ScoreHead, SiteAdapter};

type Plan = BTreeMap<(usize, Site), SitePlan>;

/// Reads an adapter for a base of this shape. The report beside the weights holds warnings only.
///
/// # Errors
/// The report of every finding when one of them refuses the adapter.
pub fn read(
    artifact: &AdapterArtifact,
    base: &BaseShape,
    limits: &Limits,
) -> Result<(LoraConfig, AdapterWeights, Report), Report> {
    let mut check = Checker {
        limits,
        report: Report::default(),
    };
    let config = config_file::read(&artifact.config_json, &mut check);
    let plan = config
        .as_ref()
        .and_then(|config| plan(config, base, &mut check));
    let labels = artifact
        .labels_json
        .as_deref()
        .map(|bytes| labels(bytes, &mut check));
    let tensors = tensor_file::read(&artifact.safetensors, &mut check);
    let mut parts = Parts::default();
    for name in tensors.iter().flat_map(|t| &t.unsound) {
        parts.note(&keys::classify(name));
    }
    for tensor in tensors.iter().flat_map(|t| &t.sound) {
        parts.add(tensor, config.as_ref().zip(plan.as_ref()), base, &mut check);
    }
    // Without the configuration or the container "missing" would only repeat what is wrong there.
    let (Some(config), Some(plan), Some(_)) = (config, plan, tensors) else {
        return Err(check.report);
    };
    parts.missing(&config, &plan, &mut check);
    let settings = settings(artifact, &config, &mut check);
    let head = parts.head(&config, (labels, settings), &mut check);
    if !check.report.is_ok() {
        return Err(check.report);
    }
    let sites = plan
        .iter()
        .filter_map(|(site, plan)| Some((*site, parts.site(*site, plan)?)));
    let weights = AdapterWeights {
        sites: sites.collect(),
        head,
    };
    Ok((config, weights, check.report))
}

/// The names in a `labels.json`: a non-empty array of different, non-empty strings.
///
/// # Errors
/// The report of every finding.
pub fn read_labels(bytes: &[u8], limits: &Limits) -> Result<Vec<String>, Report> {
    let mut check = Checker {
        limits,
        report: Report::default(),
    };
    let names = labels(bytes, &mut check).unwrap_or_default();
    if check.report.is_ok() {
        Ok(names)
    } else {
        Err(check.report)
    }
}

/// The warning for an adapter that names another base than the one it is used on. Shapes have been checked by then;
/// the names of one base differ between a hub, a path and a quantised copy, so that this is no error.
#[must_use]
pub fn base_name_warning(config: &LoraConfig, base_name: &str) -> Option<Finding> {
    let named = config
        .base_model_name_or_path
        .as_deref()
        .filter(|n| !n.is_empty())?;
    (named != base_name).then(|| Finding {
        severity: Severity::Warning,
        subject: "base_model_name_or_path".to_owned(),
        rule: Rule::BaseModel,
        found: format!("'{}'", cut(named)),
        expected: format!("'{}'", cut(base_name)),
        next_step: "compare the weights if the two are not copies of one model; all shapes fit"
            .to_owned(),
    })
}

fn plan(config: &LoraConfig, base: &BaseShape, check: &mut Checker) -> Option<Plan> {
    let last = base.layers.saturating_sub(1);
    for layer in config
        .layers_to_transform
        .iter()
        .flatten()
        .filter(|l| **l >= base.layers)
    {
        let next = "use the base that the adapter was trained on";
        let expected = format!("layers 0 to {last}");
        check.error(
            "layers_to_transform",
            Rule::Layer,
            layer.to_string(),
            expected,
            next,
        );
    }
    unknown_targets(config, base, check);
    match config.plan(base.layers) {
        Ok(plan) if plan.is_empty() && config.target_modules != Modules::Nothing => {
            let next =
                "name modules among q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj";
            let (found, expected) = ("no module of this base matches", "at least one");
            check.error("target_modules", Rule::NoTargets, found, expected, next);
            None
        }
        Ok(plan) => {
            rank_limits(&plan, base, check);
            Some(plan)
        }
        Err(errors) => {
            for error in errors {
                let AdapterError::Pattern {
                    field,
                    pattern,
                    reason,
                } = error
                else {
                    continue;
                };
                let found = format!("'{pattern}' {reason}");
                let next = "list the modules instead";
                check.error(field, Rule::Pattern, found, "a regular expression", next);
            }
            None
        }
    }
}

/// A listed module that is no linear site of a decoder layer: PEFT would adapt it (or fail), we cannot.
fn unknown_targets(config: &LoraConfig, base: &BaseShape, check: &mut Checker) {
    let Modules::List(names) = &config.target_modules else {
        return;
    };
    let paths = (0..base.layers).flat_map(|layer| Site::ALL.map(|s| s.path(layer)));
    let suffixes: HashSet<String> = paths
        .flat_map(|path| {
            let tails = path
                .match_indices('.')
                .map(|(i, _)| path[i + 1..].to_owned());
            let mut all: Vec<String> = tails.collect();
            all.push(path);
            all
        })
        .collect();
    for name in names.iter().filter(|n| !suffixes.contains(*n)) {
        let found = format!("'{}'", cut(name));
        let expected =
            "modules among q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj";
        let next = "train without it; embeddings and the output head cannot carry LoRA here";
        check.error("target_modules", Rule::Unsupported, found, expected, next);
    }
}

/// A rank above both sides of the weight is no low-rank update; PEFT allows it, but nothing trained sensibly has it.
fn rank_limits(plan: &Plan, base: &BaseShape, check: &mut Checker) {
    for (&(layer, site), plan) in plan {
        let (inputs, outputs) = base.dims(site);
        if plan.r > inputs.min(outputs) {
            let expected = format!("at most {}", inputs.min(outputs));
            let next = "use a lower rank for this module";
            check.warning(
                site.path(layer),
                Rule::Rank,
                plan.r.to_string(),
                expected,
                next,
            );
        }
    }
}

/// Labels as read; `None` when they have no usable form.
fn labels(bytes: &[u8], check: &mut Checker) -> Option<Vec<String>> {
    const FILE: &str = AdapterArtifact::LABELS_FILE;
    let next = "write an array with the name of each row of score, such as [\"no\", \"yes\"]";
    let limit = check.limits.max_labels_bytes;
    if bytes.len() > limit {
        let found = format!("{} bytes", bytes.len());
        check.error(FILE, Rule::Limit, found, format!("at most {limit}"), next);
        return None;
    }
    let items = match strict_json::parse(bytes) {
        Ok(Value::Array(items)) => items,
        Ok(_) => {
            check.error(
                FILE,
                Rule::Labels,
                "JSON that is no array",
                "an array of strings",
                next,
            );
            return None;
        }
        Err(reason) => {
            check.error(FILE, Rule::Json, reason, "an array of strings", next);
            return None;
        }
    };
    let limit = check.limits.max_labels;
    if items.is_empty() || items.len() > limit {
        let found = format!("{} labels", items.len());
        check.error(FILE, Rule::Limit, found, format!("1 to {limit}"), next);
        return None;
    }
    let mut seen = HashSet::new();
    let mut names = Vec::with_capacity(items.len());
    for (row, item) in items.iter().enumerate() {
        let subject = format!("{FILE}[{row}]");
        match item {
            Value::String(name) if name.is_empty() => {
                check.error(subject, Rule::Labels, "an empty name", "a name", next);
            }
            Value::String(name) if !seen.insert(name) => {
                let found = format!("'{}' again", cut(name));
                check.error(subject, Rule::Labels, found, "different names", next);
            }
            Value::String(name) => names.push(name.clone()),
            _ => check.error(subject, Rule::Labels, "no string", "a string", next),
        }
    }
    (names.len() == items.len()).then_some(names)
}

/// What `head.json` says; the defaults without one.
fn settings(artifact: &AdapterArtifact, config: &LoraConfig, check: &mut Checker) -> HeadSettings {
    const FILE: &str = AdapterArtifact::HEAD_FILE;
    let Some(bytes) = &artifact.head_json else {
        return HeadSettings::default();
    };
    let limit = check.limits.max_config_bytes;
    if bytes.len() > limit {
        let (found, next) = (
            format!("{} bytes", bytes.len()),
            "upload the file that was written",
        );
        check.error(FILE, Rule::Limit, found, format!("at most {limit}"), next);
    } else if !wants_score(config) {
        let next = "upload no head settings with an adapter that has no head";
        check.error(
            FILE,
            Rule::Head,
            "settings without a head",
            "no settings",
            next,
        );
    }
    HeadSettings::read(bytes).unwrap_or_else(|reason| {
        let next = "upload the file as it was downloaded, or none for plain softmax";
        check.error(FILE, Rule::Head, reason, "settings of version 1", next);
        HeadSettings::default()
    })
}

/// What the tensors of the file turned out to be.
#[derive(Default)]
struct Parts {
    values: BTreeMap<(usize, Site, Part), Numbers>,
    /// Parts that are in the file, sound or not, so that a bad tensor is not called missing too.
    present: HashSet<(usize, Site, Part)>,
    score: Option<Vec<f32>>,
    score_rows: Option<usize>,
}

impl Parts {
    /// Notes a tensor that is in the file but cannot be used.
    fn note(&mut self, key: &Key) {
        match *key {
            Key::Site(layer, site, part) => drop(self.present.insert((layer, site, part))),
            Key::Score => self.score_rows = Some(0),
            Key::Unsupported(..) | Key::Unknown(_) => {}
        }
    }

    fn add(
        &mut self,
        tensor: &Tensor,
        wanted: Option<(&LoraConfig, &Plan)>,
        base: &BaseShape,
        check: &mut Checker,
    ) {
        match keys::classify(&tensor.name) {
            Key::Site(layer, site, part) => {
                self.present.insert((layer, site, part));
                if let Some((config, plan)) = wanted {
                    self.add_part((layer, site, part), tensor, (config, plan, base), check);
                } else {
                    finite(tensor, &tensor.numbers(), check);
                }
            }
            Key::Score => self.add_score(tensor, wanted.map(|w| w.0), base, check),
            Key::Unsupported(found, next) => {
                let expected = "LoRA weights of decoder layers, or a score head";
                check.error(cut(&tensor.name), Rule::Unsupported, found, expected, next);
            }
            Key::Unknown(next) => {
                let expected = "names as PEFT writes them";
                check.error(
                    cut(&tensor.name),
                    Rule::UnknownTensor,
                    "an unknown tensor",
                    expected,
                    next,
                );
            }
        }
    }

    fn add_part(
        &mut self,
        key: (usize, Site, Part),
        tensor: &Tensor,
        (config, plan, base): (&LoraConfig, &Plan, &BaseShape),
        check: &mut Checker,
    ) {
        let (layer, site, part) = key;
        let name = tensor.name.as_str();
        if layer >= base.layers {
            let expected = format!("layers 0 to {}", base.layers.saturating_sub(1));
            let next = "use the base that the adapter was trained on";
            return check.error(name, Rule::Layer, format!("layer {layer}"), expected, next);
        }
        let Some(site_plan) = plan.get(&(layer, site)) else {
            let next = "correct target_modules, exclude_modules or layers_to_transform, or remove the tensor";
            let (found, expected) = (
                "weights of a module that is not targeted",
                "targeted modules only",
            );
            return check.error(name, Rule::OutsideTargets, found, expected, next);
        };
        if part == Part::Magnitude && !config.use_dora {
            let next = "set use_dora to true if the adapter was trained with DoRA";
            let (found, expected) = ("a DoRA magnitude with use_dora false", "no magnitude");
            return check.error(name, Rule::OutsideTargets, found, expected, next);
        }
        let ((inputs, outputs), r) = (base.dims(site), site_plan.r);
        let expected = match part {
            Part::A => vec![r, inputs],
            Part::B => vec![outputs, r],
            Part::Magnitude => vec![outputs],
        };
        if tensor.shape != expected {
            return wrong_shape(name, part, &tensor.shape, &expected, check);
        }
        let values = tensor.numbers();
        finite(tensor, &values, check);
        self.values.insert(key, values);
    }

    fn add_score(
        &mut self,
        tensor: &Tensor,
        config: Option<&LoraConfig>,
        base: &BaseShape,
        check: &mut Checker,
    ) {
        let name = tensor.name.as_str();
        if config.is_some_and(|c| !wants_score(c)) {
            let next = "name score in modules_to_save, or remove the tensor";
            let (found, expected) = ("a head that the configuration does not name", "no head");
            return check.error(name, Rule::OutsideTargets, found, expected, next);
        }
        let limit = check.limits.max_labels;
        match tensor.shape[..] {
            [rows, width] if width == base.hidden && (1..=limit).contains(&rows) => {
                let values = tensor.numbers();
                finite(tensor, &values, check);
                self.score_rows = Some(rows);
                self.score = Some(values.to_f32().into_owned());
            }
            [rows, width] if width == base.hidden => {
                self.score_rows = Some(rows);
                let next = "use fewer labels, or have the server's limit raised";
                check.error(
                    name,
                    Rule::Limit,
                    format!("{rows} labels"),
                    format!("1 to {limit}"),
                    next,
                );
            }
            _ => {
                self.score_rows = Some(0);
                let found = cut(&format!("{:?}", tensor.shape));
                let expected = format!("[labels, {}]", base.hidden);
                let next = "use the base that the adapter was trained on";
                check.error(name, Rule::Shape, found, expected, next);
            }
        }
    }

    /// Everything the configuration promises and the file does not hold.
    fn missing(&self, config: &LoraConfig, plan: &Plan, check: &mut Checker) {
        let parts: &[Part] = if config.use_dora {
            &[Part::A, Part::B, Part::Magnitude]
        } else {
            &[Part::A, Part::B]
        };
        for &(layer, site) in plan.keys() {
            let absent: Vec<Part> = parts
                .iter()
                .copied()
                .filter(|part| !self.present.contains(&(layer, site, *part)))
                .collect();
            if absent.len() == parts.len() {
                let next = "correct target_modules, or save the adapter again";
                let (found, expected) =
                    ("no tensors of a targeted module", "its lora_A and lora_B");
                check.error(site.path(layer), Rule::MissingTensor, found, expected, next);
                continue;
            }
            for part in absent {
                let next = "save or upload the file again; this one is incomplete";
                let name = keys::name(layer, site, part);
                check.error(name, Rule::MissingTensor, "nothing", "this tensor", next);
            }
        }
        if wants_score(config) && self.score_rows.is_none() {
            let next = "save the adapter from a sequence-classification model, or remove score from modules_to_save";
            check.error(
                keys::SCORE,
                Rule::MissingTensor,
                "nothing",
                "the head",
                next,
            );
        }
        if plan.is_empty() && !wants_score(config) {
            let next = "name target_modules or a score head";
            let (found, expected) = ("neither modules nor a head", "at least one of them");
            check.error("target_modules", Rule::NoTargets, found, expected, next);
        }
    }

    /// The head with its labels; without any given, LABEL_0 and so on, as transformers names them.
    fn head(
        &mut self,
        config: &LoraConfig,
        (labels, settings): (Option<Option<Vec<String>>>, HeadSettings),
        check: &mut Checker,
    ) -> Option<ScoreHead> {
        const FILE: &str = AdapterArtifact::LABELS_FILE;
        if labels.is_some() && !wants_score(config) {
            let next = "upload no labels with an adapter that has no head";
            check.error(
                FILE,
                Rule::Labels,
                "labels without a head",
                "no labels",
                next,
            );
        }
        let weight = self.score.take()?;
        let rows = self.score_rows?;
        let labels = match labels {
            None => (0..rows).map(|row| format!("LABEL_{row}")).collect(),
            Some(labels) => labels?,
        };
        if labels.len() != rows {
            let next = "name every row of score once, in its order";
            let found = format!("{} labels", labels.len());
            check.error(
                FILE,
                Rule::Labels,
                found,
                format!("{rows}, the rows of score"),
                next,
            );
            return None;
        }
        if settings.problem == Problem::Regression && rows != 1 {
            let (found, next) = (
                format!("regression with {rows} rows of score"),
                "use one row",
            );
            check.error(
                AdapterArtifact::HEAD_FILE,
                Rule::Head,
                found,
                "one row",
                next,
            );
            return None;
        }
        Some(ScoreHead {
            labels,
            weight,
            settings,
        })
    }

    fn site(&mut self, (layer, site): (usize, Site), plan: &SitePlan) -> Option<SiteAdapter> {
        let mut take = |part| self.values.remove(&(layer, site, part));
        let (a, b) = (take(Part::A)?, take(Part::B)?);
        let magnitude = take(Part::Magnitude).map(|m| m.to_f32().into_owned());
        Some(SiteAdapter {
            r: plan.r,
            scale: plan.scale,
            a,
            b,
            magnitude,
        })
    }
}

/// Whether the configuration promises a head. PEFT adds the names itself for a sequence classifier.
pub(super) fn wants_score(config: &LoraConfig) -> bool {
    let named = config
        .modules_to_save
        .as_ref()
        .is_some_and(|m| m.iter().any(|n| n == "score"));
    named || config.task_type == Some(TaskType::SeqCls)
}

fn wrong_shape(name: &str, part: Part, found: &[usize], expected: &[usize], check: &mut Checker) {
    let rank_axis = usize::from(part == Part::B);
    let only_rank = part != Part::Magnitude
        && found.len() == 2
        && found[1 - rank_axis] == expected[1 - rank_axis];
    let (rule, next) = if only_rank {
        (
            Rule::Rank,
            "correct r or rank_pattern to what the adapter was trained with",
        )
    } else {
        (Rule::Shape, "use the base that the adapter was trained on")
    };
    check.error(
        name,
        rule,
        cut(&format!("{found:?}")),
        format!("{expected:?}"),
        next,
    );
}

fn finite(tensor: &Tensor, values: &Numbers, check: &mut Checker) {
    fn bad<T>(values: &[T], finite: impl Fn(&T) -> bool) -> (usize, Option<usize>) {
        let count = values.iter().filter(|v| !finite(v)).count();
        // Most adapters have none: counting runs at the speed of memory, searching does not.
        let first = (count > 0).then(|| values.iter().position(|v| !finite(v)));
        let first = first.flatten();
        (count, first)
    }
    let (count, first) = match values {
        Numbers::F32(values) => bad(values, |v| v.is_finite()),
        Numbers::Bf16(values) => bad(values, |v| v.is_finite()),
        Numbers::F16(values) => bad(values, |v| v.is_finite()),
    };
    if let Some(first) = first {
        let found = format!("{count} values that are NaN or infinite, the first at {first}");
        let next = "the training diverged: train again with a lower learning rate";
        check.error(
            cut(&tensor.name),
            Rule::NotFinite,
            found,
            "finite values",
            next,
        );
    }
}
