//! From an artifact's bytes to weights that fit a base, or to every reason why not.
//!
//! The configuration says which modules carry what rank; the tensors must be exactly those. This file must not know how
//! either file is spelled.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use serde_json::Value;

use super::config_file::cut;
use super::keys::{self, HiddenPart, Key, Part};
use super::tensor_file::{self, Tensor};
use super::{Checker, Limits, config_file};
use crate::config::{
    AdapterConfig, BaseShape, BaseTensor, FullConfig, Modules, ScaleOn, Site, SitePlan,
};
use crate::error::AdapterError;
use crate::head::{HeadSettings, Problem};
use crate::report::{Finding, Report, Rule, Severity};
use crate::strict_json;
use crate::version::AdapterArtifact;
use crate::weights::{
    AdapterWeights, Delta, HiddenLayer, Numbers, ScoreHead, SiteAdapter, SiteScale,
};

type Plan = BTreeMap<(usize, Site), SitePlan>;

/// What the configuration promises to be in the file.
enum Promise {
    /// Low-rank updates, with magnitudes or without.
    LowRank { plan: Plan, dora: bool },
    /// Vectors of (IA)3.
    Scales(BTreeMap<(usize, Site), ScaleOn>),
    /// Deltas of whole tensors.
    Whole(BTreeSet<BaseTensor>),
}

/// Reads an adapter for a base of this shape. The report beside the weights holds warnings only.
///
/// # Errors
/// The report of every finding when one of them refuses the adapter.
pub fn read(
    artifact: &AdapterArtifact,
    base: &BaseShape,
    limits: &Limits,
) -> Result<(AdapterConfig, AdapterWeights, Report), Report> {
    let mut check = Checker {
        limits,
        report: Report::default(),
    };
    let config = config_file::read(&artifact.config_json, &mut check);
    let promise = config
        .as_ref()
        .and_then(|config| Promise::of(config, base, &mut check));
    let labels = artifact
        .labels_json
        .as_deref()
        .map(|bytes| labels(bytes, &mut check));
    let tensors = tensor_file::read(&artifact.safetensors, &mut check);
    let settings = config
        .as_ref()
        .map(|config| settings(artifact, config, &mut check))
        .unwrap_or_default();
    let mut parts = Parts {
        widths: settings.hidden_layers.clone(),
        ..Parts::default()
    };
    for name in tensors.iter().flat_map(|t| &t.unsound) {
        parts.note(&keys::classify(name));
    }
    for tensor in tensors.iter().flat_map(|t| &t.sound) {
        parts.add(
            tensor,
            config.as_ref().zip(promise.as_ref()),
            base,
            &mut check,
        );
    }
    // Without the configuration or the container "missing" would only repeat what is wrong there.
    let (Some(config), Some(promise), Some(_)) = (config, promise, tensors) else {
        return Err(check.report);
    };
    parts.missing(&config, &promise, &mut check);
    let head = parts.head(&config, (labels, settings), &mut check);
    if !check.report.is_ok() {
        return Err(check.report);
    }
    let mut weights = AdapterWeights {
        head,
        ..AdapterWeights::default()
    };
    match promise {
        Promise::LowRank { plan, .. } => {
            let sites = plan
                .iter()
                .filter_map(|(site, plan)| Some((*site, parts.site(*site, plan)?)));
            weights.sites = sites.collect();
        }
        Promise::Scales(plan) => {
            let scales = plan
                .iter()
                .filter_map(|(site, on)| Some((*site, parts.scale(*site, *on)?)));
            weights.scales = scales.collect();
        }
        Promise::Whole(_) => weights.full = parts.whole,
    }
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
pub fn base_name_warning(config: &AdapterConfig, base_name: &str) -> Option<Finding> {
    let named = config.base_name().filter(|n| !n.is_empty())?;
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

// === impl Promise ===

impl Promise {
    fn of(config: &AdapterConfig, base: &BaseShape, check: &mut Checker) -> Option<Self> {
        match config {
            AdapterConfig::Lora(lora) => {
                let layers = lora.layers_to_transform.iter().flatten();
                layers_exist("layers_to_transform", layers, base, check);
            }
            AdapterConfig::Ia3(_) => {}
            AdapterConfig::Full(full) => {
                layers_exist("layers", full.layers.iter(), base, check);
                modules_exist(full, base, check);
                return Some(Self::Whole(full.tensors()));
            }
        }
        let modules = config.target_modules().unwrap_or(&Modules::Nothing);
        unknown_targets(modules, base, check);
        let planned = match config {
            AdapterConfig::Lora(lora) => lora.plan(base.layers).map(|plan| Self::LowRank {
                plan,
                dora: lora.use_dora,
            }),
            AdapterConfig::Ia3(ia3) => ia3.plan(base.layers).map(Self::Scales),
            AdapterConfig::Full(full) => Ok(Self::Whole(full.tensors())),
        };
        match planned {
            Ok(promise) if promise.sites().is_empty() && *modules != Modules::Nothing => {
                let next = "name modules among q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj";
                let (found, expected) = ("no module of this base matches", "at least one");
                check.error("target_modules", Rule::NoTargets, found, expected, next);
                None
            }
            Ok(promise) => {
                if let Self::LowRank { plan, .. } = &promise {
                    rank_limits(plan, base, check);
                }
                Some(promise)
            }
            Err(errors) => {
                bad_patterns(errors, check);
                None
            }
        }
    }

    /// Every site that the file is to change.
    fn sites(&self) -> Vec<(usize, Site)> {
        match self {
            Self::LowRank { plan, .. } => plan.keys().copied().collect(),
            Self::Scales(plan) => plan.keys().copied().collect(),
            Self::Whole(_) => Vec::new(),
        }
    }

    fn changes(&self, at: (usize, Site)) -> bool {
        match self {
            Self::LowRank { plan, .. } => plan.contains_key(&at),
            Self::Scales(plan) => plan.contains_key(&at),
            Self::Whole(_) => false,
        }
    }

    /// The tensors of each.
    fn parts(&self) -> &'static [Part] {
        match self {
            Self::LowRank { dora: true, .. } => &[Part::A, Part::B, Part::Magnitude],
            Self::LowRank { .. } => &[Part::A, Part::B],
            Self::Scales(_) => &[Part::Scale],
            Self::Whole(_) => &[],
        }
    }

    /// The shape of a promised tensor.
    fn shape(
        &self,
        (layer, site, part): (usize, Site, Part),
        base: &BaseShape,
    ) -> Option<Vec<usize>> {
        let (inputs, outputs) = base.dims(site);
        match self {
            Self::LowRank { plan, .. } => {
                let r = plan.get(&(layer, site))?.r;
                match part {
                    Part::A => Some(vec![r, inputs]),
                    Part::B => Some(vec![outputs, r]),
                    Part::Magnitude => Some(vec![outputs]),
                    Part::Scale => None,
                }
            }
            Self::Scales(plan) => match plan.get(&(layer, site))? {
                ScaleOn::Outputs => Some(vec![outputs, 1]),
                ScaleOn::Inputs => Some(vec![1, inputs]),
            },
            Self::Whole(_) => None,
        }
    }
}

fn layers_exist<'a>(
    field: &str,
    layers: impl Iterator<Item = &'a usize>,
    base: &BaseShape,
    check: &mut Checker,
) {
    let last = base.layers.saturating_sub(1);
    for layer in layers.filter(|layer| **layer >= base.layers) {
        let next = "use the base that the adapter was trained on";
        let expected = format!("layers 0 to {last}");
        check.error(field, Rule::Layer, layer.to_string(), expected, next);
    }
}

fn modules_exist(full: &FullConfig, base: &BaseShape, check: &mut Checker) {
    let tensors = full.tensors();
    let outside = tensors.iter().filter(|t| BaseTensor::OUTSIDE.contains(t));
    for (tensor, absent) in outside.filter_map(|t| Some((t, t.absent(base)?))) {
        let found = format!("{} of {absent}", tensor.module());
        let next = "use the base that the version was trained on";
        check.error(
            "modules",
            Rule::Unsupported,
            found,
            "modules of the base",
            next,
        );
    }
}

fn bad_patterns(errors: Vec<AdapterError>, check: &mut Checker) {
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
}

/// A listed module that is no linear site of a decoder layer: PEFT would adapt it (or fail), we cannot.
fn unknown_targets(modules: &Modules, base: &BaseShape, check: &mut Checker) {
    let Modules::List(names) = modules else {
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
        let next = "train without it; embeddings and the output head cannot be adapted here";
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
fn settings(
    artifact: &AdapterArtifact,
    config: &AdapterConfig,
    check: &mut Checker,
) -> HeadSettings {
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
    } else if !config.wants_score() {
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
    whole: BTreeMap<BaseTensor, Delta>,
    whole_present: HashSet<BaseTensor>,
    /// Outputs of the layers below the head, as `head.json` names them.
    widths: Vec<usize>,
    hidden: BTreeMap<(usize, HiddenPart), Vec<f32>>,
    hidden_present: HashSet<(usize, HiddenPart)>,
    score: Option<Vec<f32>>,
    score_rows: Option<usize>,
}

impl Parts {
    /// Notes a tensor that is in the file but cannot be used.
    fn note(&mut self, key: &Key) {
        match *key {
            Key::Site(layer, site, part) => drop(self.present.insert((layer, site, part))),
            Key::Whole(tensor) => drop(self.whole_present.insert(tensor)),
            Key::Score => self.score_rows = Some(0),
            Key::Hidden(layer, part) => drop(self.hidden_present.insert((layer, part))),
            Key::Unsupported(..) | Key::Unknown(_) => {}
        }
    }

    fn add(
        &mut self,
        tensor: &Tensor,
        wanted: Option<(&AdapterConfig, &Promise)>,
        base: &BaseShape,
        check: &mut Checker,
    ) {
        match keys::classify(&tensor.name) {
            Key::Site(layer, site, part) => {
                self.present.insert((layer, site, part));
                if let Some((_, promise)) = wanted {
                    self.add_part((layer, site, part), tensor, (promise, base), check);
                } else {
                    finite(tensor, &tensor.numbers(), check);
                }
            }
            Key::Whole(whole) => {
                self.whole_present.insert(whole);
                let promise = wanted.map(|(_, promise)| promise);
                self.add_whole(whole, tensor, (promise, base), check);
            }
            Key::Score => self.add_score(tensor, wanted.map(|w| w.0), base, check),
            Key::Hidden(layer, part) => self.add_hidden((layer, part), tensor, base, check),
            Key::Unsupported(found, next) => {
                let expected = "weights for decoder layers' projections, or a score head";
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
        (promise, base): (&Promise, &BaseShape),
        check: &mut Checker,
    ) {
        let (layer, site, part) = key;
        let name = tensor.name.as_str();
        if layer >= base.layers {
            let expected = format!("layers 0 to {}", base.layers.saturating_sub(1));
            let next = "use the base that the adapter was trained on";
            return check.error(name, Rule::Layer, format!("layer {layer}"), expected, next);
        }
        if !promise.changes((layer, site)) {
            let next = "correct target_modules, exclude_modules or layers_to_transform, or remove the tensor";
            let (found, expected) = (
                "weights of a module that is not targeted",
                "targeted modules only",
            );
            return check.error(name, Rule::OutsideTargets, found, expected, next);
        }
        let shape = promise.shape(key, base);
        let Some(expected) = shape.filter(|_| promise.parts().contains(&part)) else {
            return unpromised(name, (part, promise), check);
        };
        if tensor.shape != expected {
            return wrong_shape(name, part, &tensor.shape, &expected, check);
        }
        let values = tensor.numbers();
        finite(tensor, &values, check);
        self.values.insert(key, values);
    }

    fn add_whole(
        &mut self,
        at: BaseTensor,
        tensor: &Tensor,
        (promise, base): (Option<&Promise>, &BaseShape),
        check: &mut Checker,
    ) {
        let name = tensor.name.as_str();
        let values = tensor.numbers();
        finite(tensor, &values, check);
        let promised = match promise {
            None => return,
            Some(Promise::Whole(tensors)) => tensors.contains(&at),
            Some(_) => false,
        };
        let shape = at.shape(base);
        if !promised {
            let next = "correct layers or modules, or remove the tensor";
            let (found, expected) = (
                "a delta of a tensor that is not unfrozen",
                "unfrozen tensors only",
            );
            check.error(name, Rule::OutsideTargets, found, expected, next);
        } else if tensor.shape != shape {
            let found = cut(&format!("{:?}", tensor.shape));
            let next = "use the base that the version was trained on";
            check.error(name, Rule::Shape, found, format!("{shape:?}"), next);
        } else {
            let rows = if at.is_matrix() { shape[0] } else { 1 };
            let values = values.to_f32().into_owned();
            self.whole.insert(at, Delta { rows, values });
        }
    }

    fn add_hidden(
        &mut self,
        (layer, part): (usize, HiddenPart),
        tensor: &Tensor,
        base: &BaseShape,
        check: &mut Checker,
    ) {
        let name = tensor.name.as_str();
        self.hidden_present.insert((layer, part));
        let Some(outputs) = self.widths.get(layer).copied() else {
            let next = "upload the head.json that belongs to these weights";
            let (found, expected) = (
                "a hidden layer that head.json does not name",
                "the layers of hidden_layers only",
            );
            return check.error(name, Rule::Head, found, expected, next);
        };
        let below = layer.checked_sub(1).and_then(|i| self.widths.get(i));
        let inputs = below.copied().unwrap_or(base.hidden);
        let expected = match part {
            HiddenPart::Weight => vec![outputs, inputs],
            HiddenPart::Bias => vec![outputs],
        };
        if tensor.shape != expected {
            let found = cut(&format!("{:?}", tensor.shape));
            let next = "upload the head.json that belongs to these weights, to the base that they were trained on";
            return check.error(name, Rule::Shape, found, format!("{expected:?}"), next);
        }
        let values = tensor.numbers();
        finite(tensor, &values, check);
        let values = values.to_f32().into_owned();
        self.hidden.insert((layer, part), values);
    }

    fn add_score(
        &mut self,
        tensor: &Tensor,
        config: Option<&AdapterConfig>,
        base: &BaseShape,
        check: &mut Checker,
    ) {
        let name = tensor.name.as_str();
        if config.is_some_and(|config| !config.wants_score()) {
            let next = "name score in modules_to_save, or remove the tensor";
            let (found, expected) = ("a head that the configuration does not name", "no head");
            return check.error(name, Rule::OutsideTargets, found, expected, next);
        }
        let limit = check.limits.max_labels;
        let inputs = self.widths.last().copied().unwrap_or(base.hidden);
        match tensor.shape[..] {
            [rows, width] if width == inputs && (1..=limit).contains(&rows) => {
                let values = tensor.numbers();
                finite(tensor, &values, check);
                self.score_rows = Some(rows);
                self.score = Some(values.to_f32().into_owned());
            }
            [rows, width] if width == inputs => {
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
                let expected = format!("[labels, {inputs}]");
                let next = "use the base that the adapter was trained on";
                check.error(name, Rule::Shape, found, expected, next);
            }
        }
    }

    /// Everything the configuration promises and the file does not hold.
    fn missing(&self, config: &AdapterConfig, promise: &Promise, check: &mut Checker) {
        let parts = promise.parts();
        let sites = promise.sites();
        for &(layer, site) in &sites {
            let absent: Vec<Part> = parts
                .iter()
                .copied()
                .filter(|part| !self.present.contains(&(layer, site, *part)))
                .collect();
            if absent.len() == parts.len() {
                let next = "correct target_modules, or save the adapter again";
                let found = "no tensors of a targeted module";
                let expected = match promise {
                    Promise::LowRank { .. } => "its lora_A and lora_B",
                    Promise::Scales(_) => "its ia3_l",
                    Promise::Whole(_) => "its deltas",
                };
                check.error(site.path(layer), Rule::MissingTensor, found, expected, next);
                continue;
            }
            for part in absent {
                let next = "save or upload the file again; this one is incomplete";
                let name = keys::name(layer, site, part);
                check.error(name, Rule::MissingTensor, "nothing", "this tensor", next);
            }
        }
        if let Promise::Whole(tensors) = promise {
            let absent = |at: &&BaseTensor| at.everywhere() && !self.whole_present.contains(*at);
            for tensor in tensors.iter().filter(absent) {
                let next = "save or upload the file again; this one is incomplete";
                let name = super::full::name(*tensor);
                check.error(name, Rule::MissingTensor, "nothing", "this tensor", next);
            }
        }
        if config.wants_score() && self.score_rows.is_none() {
            let next = "save the adapter from a sequence-classification model, or remove score from modules_to_save";
            check.error(
                keys::SCORE,
                Rule::MissingTensor,
                "nothing",
                "the head",
                next,
            );
        }
        let hidden = (0..self.widths.len()).flat_map(|i| HiddenPart::ALL.map(|part| (i, part)));
        for (layer, part) in hidden.filter(|at| !self.hidden_present.contains(at)) {
            let next = "save or upload the file again, with the head.json that belongs to it";
            let name = keys::hidden_name(layer, part);
            check.error(name, Rule::MissingTensor, "nothing", "this tensor", next);
        }
        let nothing = sites.is_empty() && !matches!(promise, Promise::Whole(_));
        if nothing && !config.wants_score() {
            let next = "name target_modules or a score head";
            let (found, expected) = ("neither modules nor a head", "at least one of them");
            check.error("target_modules", Rule::NoTargets, found, expected, next);
        }
    }

    /// The head with its labels; without any given, LABEL_0 and so on, as transformers names them.
    fn head(
        &mut self,
        config: &AdapterConfig,
        (labels, settings): (Option<Option<Vec<String>>>, HeadSettings),
        check: &mut Checker,
    ) -> Option<ScoreHead> {
        const FILE: &str = AdapterArtifact::LABELS_FILE;
        if labels.is_some() && !config.wants_score() {
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
        let mut hidden = Vec::with_capacity(self.widths.len());
        for layer in 0..self.widths.len() {
            let mut take = |part| self.hidden.remove(&(layer, part));
            hidden.push(HiddenLayer {
                weight: take(HiddenPart::Weight)?,
                bias: take(HiddenPart::Bias)?,
            });
        }
        Some(ScoreHead {
            labels,
            hidden,
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

    fn scale(&mut self, (layer, site): (usize, Site), on: ScaleOn) -> Option<SiteScale> {
        let l = self.values.remove(&(layer, site, Part::Scale))?;
        let l = l.to_f32().into_owned();
        Some(SiteScale { on, l })
    }
}

/// A tensor of a targeted module that the configuration's way of adapting does not have.
fn unpromised(name: &str, (part, promise): (Part, &Promise), check: &mut Checker) {
    let (found, expected, next) = match (part, promise) {
        (Part::Magnitude, Promise::LowRank { .. }) => (
            "a DoRA magnitude with use_dora false",
            "no magnitude",
            "set use_dora to true if the adapter was trained with DoRA",
        ),
        (_, Promise::LowRank { .. }) => (
            "a vector of (IA)3 with peft_type LORA",
            "lora_A and lora_B",
            "upload the adapter_config.json that belongs to these weights",
        ),
        (_, Promise::Whole(_)) => (
            "weights of an adapter with peft_type ESPALIER_FULL",
            "deltas of whole tensors",
            "upload the adapter_config.json that belongs to these weights",
        ),
        (_, Promise::Scales(_)) => (
            "weights of LoRA with peft_type IA3",
            "ia3_l",
            "upload the adapter_config.json that belongs to these weights",
        ),
    };
    check.error(name, Rule::OutsideTargets, found, expected, next);
}

fn wrong_shape(name: &str, part: Part, found: &[usize], expected: &[usize], check: &mut Checker) {
    let rank_axis = usize::from(part == Part::B);
    let only_rank = matches!(part, Part::A | Part::B)
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
