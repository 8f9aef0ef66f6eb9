//! Classification at the command line: how a head is to learn, what it was found to be worth, and what it answers.

use clap::{Args, ValueEnum};

use crate::{
    cli::{
        infer::PoolingArg,
        output::{Failure, Out},
    },
    v1,
};

/// Labels up to which the confusion matrix is printed.
const SHOWN_LABELS: usize = 12;

/// How a head is to learn.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Classification")]
pub(crate) struct HeadArgs {
    /// Train the head alone, on the frozen base. Ready in seconds.
    #[arg(long)]
    head_only: bool,
    /// First a head alone, live in seconds; then LoRA, which takes its place when the validation rows say that it is better.
    #[arg(long, conflicts_with = "head_only")]
    ladder: bool,
    /// The labels that may appear.
    #[arg(long, value_delimiter = ',')]
    labels: Vec<String>,
    /// Rows with one label: weigh labels by how seldom they are.
    #[arg(long, conflicts_with = "class_weight")]
    balance: bool,
    /// Rows with one label: what an example of a label counts; may be given several times [usual: 1].
    #[arg(long, value_name = "LABEL=WEIGHT", value_parser = label_weight)]
    class_weight: Vec<(String, f64)>,
    /// The share of right answers on validation that may be called out of scope [usual: 0.05].
    #[arg(long, value_name = "SHARE")]
    out_of_scope: Option<f64>,
    /// Fully connected layers below the last one: their outputs, multiples of 8, the first one first [usual: none].
    #[arg(long, value_name = "WIDTHS", value_delimiter = ',')]
    hidden_layers: Vec<u32>,
    /// What stands behind each hidden layer [usual: gelu].
    #[arg(long, value_enum, requires = "hidden_layers")]
    activation: Option<ActivationArg>,
    /// Which of a text's states the head reads [usual: mean with --head-only, else last, which is what PEFT knows].
    #[arg(long, value_enum)]
    pooling: Option<PoolingArg>,
    /// Drop this share of the inputs of the head's layers in training [usual: 0].
    #[arg(long, value_name = "SHARE")]
    head_dropout: Option<f64>,
}

/// What a hidden layer makes of its sums.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum ActivationArg {
    /// max(x, 0).
    Relu,
    /// x times the share of the normal distribution below x.
    Gelu,
    /// The hyperbolic tangent.
    Tanh,
}

impl From<ActivationArg> for v1::Activation {
    fn from(given: ActivationArg) -> Self {
        match given {
            ActivationArg::Relu => Self::Relu,
            ActivationArg::Gelu => Self::Gelu,
            ActivationArg::Tanh => Self::Tanh,
        }
    }
}

fn label_weight(text: &str) -> Result<(String, f64), String> {
    let wrong = || format!("{text:?} is not LABEL=WEIGHT");
    let (label, weight) = text.rsplit_once('=').ok_or_else(wrong)?;
    let weight = weight.parse().map_err(|_| wrong())?;
    Ok((label.to_owned(), weight))
}

impl HeadArgs {
    pub(crate) fn message(&self) -> v1::ClassificationMethod {
        v1::ClassificationMethod {
            head_only: self.head_only.then_some(true),
            labels: self.labels.clone(),
            balance_classes: self.balance,
            class_weights: self.class_weight.iter().cloned().collect(),
            out_of_scope_share: self.out_of_scope,
            ladder: self.ladder,
            hidden_layers: self.hidden_layers.clone(),
            activation: self
                .activation
                .map_or(0, |a| v1::Activation::from(a).into()),
            pooling: self.pooling.map_or(0, |p| v1::Pooling::from(p).into()),
            dropout: self.head_dropout.unwrap_or_default(),
            ..v1::ClassificationMethod::default()
        }
    }

    /// The options of heads that are given, by name.
    pub(crate) fn given(&self) -> [(&'static str, bool); 10] {
        [
            ("--head-only", self.head_only),
            ("--ladder", self.ladder),
            ("--labels", !self.labels.is_empty()),
            ("--balance", self.balance),
            ("--class-weight", !self.class_weight.is_empty()),
            ("--out-of-scope", self.out_of_scope.is_some()),
            ("--hidden-layers", !self.hidden_layers.is_empty()),
            ("--activation", self.activation.is_some()),
            ("--pooling", self.pooling.is_some()),
            ("--head-dropout", self.head_dropout.is_some()),
        ]
    }
}

/// What a head is worth, in a few lines.
pub(crate) fn print_result(out: Out, result: &v1::ClassificationResult) -> Result<(), Failure> {
    let percent = |name: &str, value: Option<f64>| {
        value.map(|value| format!("{name} {:.1} %", value * 100.0))
    };
    let number = |name: &str, value: Option<f64>| value.map(|value| format!("{name} {value:.4}"));
    let parts = [
        percent("accuracy", result.accuracy),
        percent("macro F1", result.macro_f1),
        percent("micro F1", result.micro_f1),
        number("mean squared error", result.mean_squared_error),
        number("mean absolute error", result.mean_absolute_error),
        number("R squared", result.r_squared),
        number("temperature", result.temperature.map(f64::from)),
        number(
            "out of scope below",
            result.out_of_scope_below.map(f64::from),
        ),
    ];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    out.line(format_args!(
        "on {} validation rows: {}",
        result.examples,
        parts.join(" · ")
    ))?;
    let labels = result.labels.len();
    if labels == 0 || labels > SHOWN_LABELS || result.confusion.len() != labels * labels {
        return Ok(());
    }
    let head: Vec<&str> = std::iter::once("RIGHT \\ SAID")
        .chain(result.labels.iter().map(String::as_str))
        .collect();
    let row = |(label, counts): (&String, &[u64])| {
        let counts = counts.iter().map(u64::to_string);
        std::iter::once(label.clone()).chain(counts).collect()
    };
    let counts = result.confusion.chunks_exact(labels);
    let rows: Vec<Vec<String>> = result.labels.iter().zip(counts).map(row).collect();
    out.table(&head, &rows, "")
}

/// One text's answer in a line: the number, or its most likely labels.
pub(crate) fn answer_text(result: &v1::Classification, top: usize) -> String {
    if let Some(value) = result.value {
        return value.to_string();
    }
    let said = result.labels.len();
    let shown = result.scores.iter().take(top.max(said).max(1));
    let shown = shown.map(|s| format!("{} {:.1}%", s.label, s.probability * 100.0));
    let text = shown.collect::<Vec<_>>().join(", ");
    if result.out_of_scope {
        format!("{text} (out of scope)")
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    #[test]
    fn weights_are_named_by_label() {
        assert_eq!(label_weight("a=b=2.5").unwrap(), ("a=b".to_owned(), 2.5));
        for wrong in ["a", "a=", "a=x"] {
            assert!(label_weight(wrong).unwrap_err().contains("LABEL=WEIGHT"));
        }
    }

    #[test]
    fn an_answer_is_a_number_or_labels() {
        let score = |label: &str, probability| v1::LabelScore {
            label: label.to_owned(),
            probability,
            ..Default::default()
        };
        let mut result = v1::Classification {
            scores: vec![score("a", 0.75), score("b", 0.625), score("c", 0.25)],
            ..Default::default()
        };
        assert_eq!(answer_text(&result, 1), "a 75.0%");
        result.out_of_scope = true;
        assert_eq!(answer_text(&result, 1), "a 75.0% (out of scope)");
        result.out_of_scope = false;
        result.labels = vec!["a".to_owned(), "b".to_owned()];
        assert_eq!(answer_text(&result, 1), "a 75.0%, b 62.5%");
        result.value = Some(-1.5);
        assert_eq!(answer_text(&result, 1), "-1.5");
    }
}
