//! What a classification head's logits mean: the kind of question it answers, and what was fitted on held-out examples.
//!
//! Kept as `head.json` beside the labels, a small file of its own, so that the files that PEFT reads stay PEFT's. A head without
//! one answers with one label and plain softmax. This file must not know tensors or where they lie.

use candle_core::cpu::erf::erf_f64;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::strict_json;

/// The version of `head.json` that is written and read.
const VERSION: u64 = 1;

/// Hidden layers of a head at most.
pub const MAX_HIDDEN_LAYERS: usize = 8;
/// Outputs of a hidden layer at most.
pub const MAX_HIDDEN_WIDTH: usize = 8192;
/// A hidden layer's outputs are a multiple of this: what products take at a time.
pub const HIDDEN_WIDTH_STEP: usize = 8;

/// What kind of question a head answers, under the names of transformers' `problem_type`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Problem {
    /// One label of several; softmax, cross-entropy.
    #[default]
    #[serde(rename = "single_label_classification")]
    SingleLabel,
    /// Each label or not; a sigmoid each, binary cross-entropy.
    #[serde(rename = "multi_label_classification")]
    MultiLabel,
    /// A number; mean squared error.
    #[serde(rename = "regression")]
    Regression,
}

/// What a hidden layer makes of its sums, number by number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// `x Phi(x)`, Phi the normal distribution by the error function (Hendrycks and Gimpel, 2016); torch's `nn.GELU()`.
    Gelu,
    /// The hyperbolic tangent.
    Tanh,
}

/// Which of a text's states, after the final norm, become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// The last token's state.
    #[default]
    Last,
    /// The mean of all tokens' states.
    Mean,
}

/// What is known of a head beside its weights and labels.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeadSettings {
    /// What it answers.
    #[serde(rename = "problem_type", default)]
    pub problem: Problem,
    /// Logits are divided by it before the softmax; above 0. `None` is 1. Of f32, because its shortest decimal comes back bit for bit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature: Option<f32>,
    /// A text whose best label's calibrated probability is below this is out of scope; in 0..=1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub out_of_scope_below: Option<f32>,
    /// Outputs of the fully connected layers below `score`, the first one first; none reads the state itself.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hidden_layers: Vec<usize>,
    /// Behind each of them; there if and only if they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub activation: Option<Activation>,
    /// Which states it reads.
    #[serde(default, skip_serializing_if = "Pooling::is_last")]
    pub pooling: Pooling,
}

/// `head.json` as it is written.
#[derive(Serialize)]
struct Written<'a> {
    version: u64,
    #[serde(flatten)]
    settings: &'a HeadSettings,
}

/// A head's answer to one text.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// One a label: softmax with the temperature, or sigmoids; of regression the value itself.
    pub scores: Vec<f32>,
    /// The best label's score is below the threshold.
    pub out_of_scope: bool,
}

// === impl Problem ===

impl Problem {
    /// The name that transformers and `head.json` use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::SingleLabel => "single_label_classification",
            Self::MultiLabel => "multi_label_classification",
            Self::Regression => "regression",
        }
    }
}

// === impl Pooling ===

impl Pooling {
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "serde asks by reference")]
    fn is_last(&self) -> bool {
        *self == Self::Last
    }

    /// What a head with it reads, in words.
    #[must_use]
    pub const fn reads(self) -> &'static str {
        match self {
            Self::Last => "the last token's state",
            Self::Mean => "the mean of all tokens' states",
        }
    }
}

// === impl Activation ===

impl Activation {
    /// The name that `head.json` uses.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Relu => "relu",
            Self::Gelu => "gelu",
            Self::Tanh => "tanh",
        }
    }

    /// What it makes of a sum.
    #[must_use]
    pub fn of(self, x: f64) -> f64 {
        match self {
            Self::Relu => x.max(0.0),
            Self::Gelu => x * normal(x),
            Self::Tanh => x.tanh(),
        }
    }

    /// Its slope at a sum; 0 at the corner of `relu`, as torch has it.
    #[must_use]
    pub fn slope(self, x: f64) -> f64 {
        match self {
            Self::Relu => f64::from(u8::from(x > 0.0)),
            Self::Gelu => {
                let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
                normal(x) + x * density
            }
            Self::Tanh => 1.0 - x.tanh().powi(2),
        }
    }
}

/// The share of the normal distribution below `x`.
fn normal(x: f64) -> f64 {
    0.5 * (1.0 + erf_f64(x * std::f64::consts::FRAC_1_SQRT_2))
}

/// Checks the layers below `score`.
///
/// # Errors
/// The field, and what is wrong with it, with value and limit.
pub fn check_hidden(
    layers: &[usize],
    activation: Option<Activation>,
) -> Result<(), (&'static str, String)> {
    let wrong = |reason| Err(("hidden_layers", reason));
    if layers.len() > MAX_HIDDEN_LAYERS {
        let found = layers.len();
        return wrong(format!(
            "has {found} layers, at most {MAX_HIDDEN_LAYERS} are possible"
        ));
    }
    let fits = |width: usize| {
        (1..=MAX_HIDDEN_WIDTH).contains(&width) && width.is_multiple_of(HIDDEN_WIDTH_STEP)
    };
    if let Some(width) = layers.iter().find(|width| !fits(**width)) {
        return wrong(format!(
            "has a width of {width}, expected a multiple of {HIDDEN_WIDTH_STEP} up to {MAX_HIDDEN_WIDTH}"
        ));
    }
    match (layers, activation) {
        ([], Some(activation)) => {
            let reason = format!(
                "is {} without hidden_layers for it to stand behind: name their widths, or leave it out",
                activation.as_str()
            );
            Err(("activation", reason))
        }
        ([_, ..], None) => {
            let reason = "is missing, hidden_layers need relu, gelu or tanh";
            Err(("activation", reason.to_owned()))
        }
        _ => Ok(()),
    }
}

/// The layers below `score`, and what they read, in words.
#[must_use]
pub fn stack(layers: &[usize], activation: Option<Activation>, pooling: Pooling) -> String {
    let on = pooling.reads();
    let Some(activation) = activation else {
        return format!("no hidden layers on {on}");
    };
    let widths: Vec<String> = layers.iter().map(usize::to_string).collect();
    let (widths, activation) = (widths.join(", "), activation.as_str());
    format!("hidden layers {widths} with {activation} on {on}")
}

/// What keeps a head from being the `score` of PEFT and transformers, one matrix on the last token's state; in words.
#[must_use]
pub fn beyond_score(
    layers: &[usize],
    activation: Option<Activation>,
    pooling: Pooling,
) -> Option<String> {
    match (layers, pooling) {
        ([], Pooling::Last) => None,
        ([], pooling) => Some(format!(
            "the head reads {}, and score reads {}",
            pooling.reads(),
            Pooling::Last.reads()
        )),
        _ => Some(format!(
            "the head has {}, and score is one matrix",
            stack(layers, activation, pooling)
        )),
    }
}

// === impl HeadSettings ===

impl HeadSettings {
    /// Reads `head.json`.
    ///
    /// # Errors
    /// What is wrong with it, with value and limit.
    pub fn read(bytes: &[u8]) -> Result<Self, String> {
        let mut value = strict_json::parse(bytes)?;
        let object = value.as_object_mut().ok_or("is no object")?;
        match object.remove("version") {
            Some(Value::Number(version)) if version.as_u64() == Some(VERSION) => {}
            Some(other) => return Err(format!("version is {other}, expected {VERSION}")),
            None => return Err(format!("version is missing, expected {VERSION}")),
        }
        let settings: Self = serde_json::from_value(value).map_err(|error| error.to_string())?;
        settings.check()?;
        Ok(settings)
    }

    /// The bytes of `head.json`; `None` where a head is what it is without one.
    #[must_use]
    pub fn write(&self) -> Option<Vec<u8>> {
        if *self == Self::default() {
            return None;
        }
        let written = Written {
            version: VERSION,
            settings: self,
        };
        serde_json::to_vec_pretty(&written).ok()
    }

    /// # Errors
    /// The first number that is outside its range.
    fn check(&self) -> Result<(), String> {
        check_hidden(&self.hidden_layers, self.activation)
            .map_err(|(field, reason)| format!("{field} {reason}"))?;
        if let Some(t) = self.temperature
            && !(1e-3..=1e3).contains(&t)
        {
            return Err(format!("temperature is {t}, expected 0.001 to 1000"));
        }
        if let Some(below) = self.out_of_scope_below
            && !(0.0..=1.0).contains(&below)
        {
            return Err(format!("out_of_scope_below is {below}, expected 0 to 1"));
        }
        let fitted = self.temperature.or(self.out_of_scope_below);
        match (self.problem, fitted) {
            (Problem::SingleLabel, _) | (_, None) => Ok(()),
            (problem, Some(_)) => Err(format!(
                "temperature and out_of_scope_below are for single_label_classification, this is {}",
                problem.as_str()
            )),
        }
    }

    /// The layers below `score`, and what they read, in words.
    #[must_use]
    pub fn stack(&self) -> String {
        stack(&self.hidden_layers, self.activation, self.pooling)
    }

    /// What keeps it from being the `score` of PEFT and transformers, in words.
    #[must_use]
    pub fn beyond_score(&self) -> Option<String> {
        beyond_score(&self.hidden_layers, self.activation, self.pooling)
    }

    /// What the head answers with these logits `[labels]`. Sums run in f64.
    #[must_use]
    pub fn answer(&self, logits: &[f32]) -> Answer {
        let scores: Vec<f32> = match self.problem {
            Problem::SingleLabel => {
                let temperature = f64::from(self.temperature.unwrap_or(1.0));
                let scaled = logits.iter().map(|logit| f64::from(*logit) / temperature);
                softmax(&scaled.collect::<Vec<_>>())
                    .into_iter()
                    .map(|p| p as f32)
                    .collect()
            }
            Problem::MultiLabel => logits
                .iter()
                .map(|logit| sigmoid(f64::from(*logit)) as f32)
                .collect(),
            Problem::Regression => logits.to_vec(),
        };
        let best = scores.iter().copied().fold(0.0, f32::max);
        let below = self.out_of_scope_below;
        Answer {
            out_of_scope: below.is_some_and(|below| best < below),
            scores,
        }
    }
}

/// Probabilities of logits.
#[must_use]
pub fn softmax(logits: &[f64]) -> Vec<f64> {
    let best = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let weights: Vec<f64> = logits.iter().map(|logit| (logit - best).exp()).collect();
    let total: f64 = weights.iter().sum();
    weights.into_iter().map(|weight| weight / total).collect()
}

/// `1 / (1 + e^-x)` without overflow.
#[must_use]
pub fn sigmoid(x: f64) -> f64 {
    if x >= 0.0 {
        1.0 / (1.0 + (-x).exp())
    } else {
        x.exp() / (1.0 + x.exp())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn settings_come_back_and_bad_ones_are_named() {
        assert_eq!(HeadSettings::default().write(), None);
        let settings = HeadSettings {
            problem: Problem::SingleLabel,
            temperature: Some(1.0 / 3.0),
            out_of_scope_below: Some(0.625),
            hidden_layers: vec![64, 8],
            activation: Some(Activation::Gelu),
            pooling: Pooling::Mean,
        };
        let bytes = settings.write().unwrap();
        assert_eq!(HeadSettings::read(&bytes).unwrap(), settings);
        for (text, named) in [
            ("[]", "no object"),
            ("{}", "version is missing"),
            (r#"{"version": 2}"#, "version is 2"),
            (r#"{"version": 1, "colour": 3}"#, "colour"),
            (r#"{"version": 1, "problem_type": "ranking"}"#, "ranking"),
            (r#"{"version": 1, "temperature": 0}"#, "temperature is 0"),
            (r#"{"version": 1, "out_of_scope_below": 1.5}"#, "1.5"),
            (
                r#"{"version": 1, "hidden_layers": [12], "activation": "relu"}"#,
                "width of 12",
            ),
            (r#"{"version": 1, "hidden_layers": [8]}"#, "activation"),
            (r#"{"version": 1, "activation": "tanh"}"#, "tanh without"),
            (r#"{"version": 1, "pooling": "first"}"#, "first"),
            (
                r#"{"version": 1, "hidden_layers": [8], "activation": "swish"}"#,
                "swish",
            ),
            (
                r#"{"version": 1, "problem_type": "regression", "temperature": 2}"#,
                "regression",
            ),
        ] {
            let error = HeadSettings::read(text.as_bytes()).unwrap_err();
            assert!(error.contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn slopes_are_those_of_finite_differences() {
        for activation in [Activation::Relu, Activation::Gelu, Activation::Tanh] {
            for x in [-3.1, -0.7, -0.01, 0.2, 1.3, 4.0] {
                let step = 1e-5;
                let slope = (activation.of(x + step) - activation.of(x - step)) / (2.0 * step);
                let off = (slope - activation.slope(x)).abs();
                assert!(off < 1e-9, "{activation:?} {x}: {off}");
            }
        }
        // torch.nn.functional.gelu(torch.tensor(1.0, dtype=torch.float64))
        assert!((Activation::Gelu.of(1.0) - 0.841_344_746_068_542_9).abs() < 1e-12);
    }

    #[test]
    fn each_problem_answers_in_its_own_way() {
        let mut head = HeadSettings {
            temperature: Some(2.0),
            out_of_scope_below: Some(0.74),
            ..HeadSettings::default()
        };
        let logits = [0.0, 2.0];
        let share = 1.0 / (1.0 + (-1.0f64).exp()) as f32;
        let answer = head.answer(&logits);
        assert!((answer.scores[1] - share).abs() < 1e-6, "{answer:?}");
        assert!(answer.out_of_scope, "0.731 is below 0.74");
        head.out_of_scope_below = Some(0.73);
        assert!(!head.answer(&logits).out_of_scope);
        let of = |problem| HeadSettings {
            problem,
            ..HeadSettings::default()
        };
        let each = of(Problem::MultiLabel).answer(&[0.0, 100.0, -100.0]).scores;
        assert_eq!(each[..2], [0.5, 1.0]);
        assert!(each[2] >= 0.0 && each[2] < 1e-30);
        assert_eq!(of(Problem::Regression).answer(&[-3.5]).scores, [-3.5]);
    }
}
