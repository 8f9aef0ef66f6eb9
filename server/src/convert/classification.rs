//! Classification between the wire and the job service: how a head is to learn, and what it was found to be worth.

use espalier_adapters::head::{Activation, Pooling, Problem};
use espalier_adapters::train::quality::Quality;
use espalier_proto::v1;

use super::training::invalid;
use crate::jobs::{ClassOptions, ClassificationResult};
use crate::status::Refusal;

/// What a head is asked beside its labels.
pub(super) fn options(given: &v1::ClassificationMethod) -> Result<ClassOptions, Refusal> {
    if given.problem_type != 0 {
        return Err(invalid(
            "spec.classification.problem_type",
            "it is said by the rows and told in the reply: leave it out",
        ));
    }
    Ok(ClassOptions {
        problem: Problem::default(),
        balance: given.balance_classes,
        class_weights: given.class_weights.clone().into_iter().collect(),
        out_of_scope_share: given.out_of_scope_share,
        ladder: given.ladder,
        hidden_layers: given.hidden_layers.iter().map(|w| *w as usize).collect(),
        activation: activation(given.activation)?,
        pooling: pooling(given.pooling)?,
        dropout: given.dropout,
    })
}

/// A head's method for the wire.
pub(super) fn method_reply(
    head_only: bool,
    labels: Vec<String>,
    options: ClassOptions,
) -> v1::ClassificationMethod {
    v1::ClassificationMethod {
        head_only: Some(head_only),
        labels,
        balance_classes: options.balance,
        class_weights: options.class_weights.into_iter().collect(),
        out_of_scope_share: options.out_of_scope_share,
        problem_type: problem(options.problem),
        ladder: options.ladder,
        hidden_layers: options.hidden_layers.iter().map(|w| *w as u32).collect(),
        activation: match options.activation {
            None => v1::Activation::Unspecified,
            Some(Activation::Relu) => v1::Activation::Relu,
            Some(Activation::Gelu) => v1::Activation::Gelu,
            Some(Activation::Tanh) => v1::Activation::Tanh,
        }
        .into(),
        pooling: match options.pooling.unwrap_or_default() {
            Pooling::Last => v1::Pooling::Last,
            Pooling::Mean => v1::Pooling::Mean,
        }
        .into(),
        dropout: options.dropout,
    }
}

fn pooling(given: i32) -> Result<Option<Pooling>, Refusal> {
    match v1::Pooling::try_from(given) {
        Ok(v1::Pooling::Unspecified) => Ok(None),
        Ok(v1::Pooling::Last) => Ok(Some(Pooling::Last)),
        Ok(v1::Pooling::Mean) => Ok(Some(Pooling::Mean)),
        Err(_) => Err(invalid(
            "spec.classification.pooling",
            format!("{given} is no pooling; LAST and MEAN are"),
        )),
    }
}

fn activation(given: i32) -> Result<Option<Activation>, Refusal> {
    match v1::Activation::try_from(given) {
        Ok(v1::Activation::Unspecified) => Ok(None),
        Ok(v1::Activation::Relu) => Ok(Some(Activation::Relu)),
        Ok(v1::Activation::Gelu) => Ok(Some(Activation::Gelu)),
        Ok(v1::Activation::Tanh) => Ok(Some(Activation::Tanh)),
        Err(_) => Err(invalid(
            "spec.classification.activation",
            format!("{given} is no activation; RELU, GELU and TANH are"),
        )),
    }
}

/// What a head answers, for the wire.
pub(crate) fn problem(problem: Problem) -> i32 {
    match problem {
        Problem::SingleLabel => v1::ProblemType::SingleLabel,
        Problem::MultiLabel => v1::ProblemType::MultiLabel,
        Problem::Regression => v1::ProblemType::Regression,
    }
    .into()
}

/// What a head is worth, for the wire.
pub(super) fn result(result: ClassificationResult) -> v1::ClassificationResult {
    let mut reply = v1::ClassificationResult {
        problem_type: problem(result.problem),
        labels: result.labels,
        examples: result.examples,
        accuracy: result.quality.accuracy(),
        macro_f1: result.quality.macro_f1(),
        log_loss: result.log_loss,
        temperature: result.temperature,
        out_of_scope_below: result.out_of_scope_below,
        ..v1::ClassificationResult::default()
    };
    match result.quality {
        Quality::SingleLabel { confusion, .. } => reply.confusion = confusion,
        Quality::MultiLabel { micro_f1, .. } => reply.micro_f1 = Some(micro_f1),
        Quality::Regression {
            mean_squared_error,
            mean_absolute_error,
            r_squared,
        } => {
            reply.mean_squared_error = Some(mean_squared_error);
            reply.mean_absolute_error = Some(mean_absolute_error);
            reply.r_squared = r_squared;
        }
    }
    reply
}
