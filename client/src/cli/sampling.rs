//! Arguments that several inference commands share, and the remarks under their results.

use std::io::{self, IsTerminal, Read};
use std::path::{Path, PathBuf};

use clap::Args;

use crate::{
    cli::output::{Failure, Out, seconds_of, span},
    client::Client,
    error::Error,
    v1::{self, constraint::Kind},
};

/// Which weights answer.
#[derive(Clone, Debug, Args)]
pub(crate) struct AdapterArg {
    /// The adapter that answers: NAME, NAME@ALIAS or NAME/VERSION. Without it, the base model. Given several times, each
    /// with its weight, a mixture answers: `--adapter polite=0.7 --adapter legal=0.3`.
    #[arg(long, short, value_name = "ADAPTER[=WEIGHT]", value_parser = Part::parse)]
    adapter: Vec<Part>,
}

/// One adapter of a mixture.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Part {
    name: String,
    weight: Option<f32>,
}

impl Part {
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let Some((name, weight)) = text.split_once('=') else {
            let (name, weight) = (text.to_owned(), None);
            return Ok(Part { name, weight });
        };
        let number = weight
            .parse()
            .map_err(|_| format!("the weight '{weight}' is no number"))?;
        Ok(Part {
            name: name.to_owned(),
            weight: Some(number),
        })
    }

    /// Name and weight as the client takes them.
    pub(crate) fn weighted(&self) -> (&str, Option<f32>) {
        (&self.name, self.weight)
    }
}

impl AdapterArg {
    pub(crate) fn target(&self, client: &Client) -> Result<Option<v1::InferenceTarget>, Error> {
        let parts = self.adapter.iter().map(Part::weighted);
        client.mixture(parts).map(Some)
    }

    /// Lets others answer from now on: the same words as on the command line, or none for the base model.
    pub(crate) fn answer_by(&mut self, words: &str) -> Result<(), String> {
        self.adapter = words
            .split_whitespace()
            .map(Part::parse)
            .collect::<Result<_, _>>()?;
        Ok(())
    }

    /// The base needs a tenant too: a service key must say whom it asks for.
    pub(crate) fn needs_tenant(&self) -> bool {
        self.adapter.is_empty()
            || self
                .adapter
                .iter()
                .any(|part| !part.name.starts_with("tenants/"))
    }
}

/// How text is generated. What is left out comes from the adapter's profile, then from the server.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Generation")]
pub(crate) struct SamplingArgs {
    /// At most so many tokens.
    #[arg(long, short = 'm')]
    max_tokens: Option<u32>,
    /// At least so many tokens.
    #[arg(long)]
    min_tokens: Option<u32>,
    /// 0 always takes the most likely token.
    #[arg(long, short = 't')]
    temperature: Option<f32>,
    /// Keep the smallest set of tokens with this probability.
    #[arg(long)]
    top_p: Option<f32>,
    /// Keep the so many most likely tokens.
    #[arg(long)]
    top_k: Option<u32>,
    /// Drop tokens below this part of the best one's probability.
    #[arg(long)]
    min_p: Option<f32>,
    /// Above 1: repeat less.
    #[arg(long)]
    repetition_penalty: Option<f32>,
    /// Subtracted for each time that a token was generated.
    #[arg(long, allow_negative_numbers = true)]
    frequency_penalty: Option<f32>,
    /// Subtracted from tokens that were generated.
    #[arg(long, allow_negative_numbers = true)]
    presence_penalty: Option<f32>,
    /// Makes sampling repeatable.
    #[arg(long)]
    seed: Option<u64>,
    /// So many candidates.
    #[arg(long, short)]
    n: Option<u32>,
    /// Text that ends the answer; may be given several times.
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Token id that ends the answer; may be given several times.
    #[arg(long, value_name = "ID")]
    stop_id: Vec<u32>,
    /// Added to a token's logit: ID=VALUE; may be given several times.
    #[arg(long, value_name = "ID=VALUE", value_parser = bias)]
    logit_bias: Vec<(u32, f32)>,
    /// Go on after the model's own end.
    #[arg(long)]
    ignore_eos: bool,
    /// The answer is JSON that the JSON schema in FILE accepts.
    #[arg(long, value_name = "FILE", group = "constraint")]
    json_schema: Option<PathBuf>,
    /// The answer matches this regular expression as a whole.
    #[arg(long, value_name = "REGEX", group = "constraint")]
    regex: Option<String>,
    /// The answer is one of these texts; may be given several times.
    #[arg(long, value_name = "TEXT", group = "constraint")]
    choice: Vec<String>,
    /// The answer is a text of the grammar (Lark) in FILE.
    #[arg(long, value_name = "FILE", group = "constraint")]
    grammar: Option<PathBuf>,
    /// Ask for log-probabilities, with so many alternatives. Shown with --json.
    #[arg(long, value_name = "COUNT", num_args = 0..=1, default_missing_value = "0")]
    logprobs: Option<u32>,
}

impl SamplingArgs {
    pub(crate) fn sampling(&self) -> v1::SamplingParams {
        v1::SamplingParams {
            temperature: self.temperature,
            top_p: self.top_p,
            top_k: self.top_k,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            frequency_penalty: self.frequency_penalty,
            presence_penalty: self.presence_penalty,
            seed: self.seed,
            n: self.n,
            logit_bias: self.logit_bias.iter().copied().collect(),
        }
    }

    pub(crate) fn stop(&self) -> v1::StopConditions {
        v1::StopConditions {
            max_tokens: self.max_tokens,
            min_tokens: self.min_tokens,
            stop: self.stop.clone(),
            stop_token_ids: self.stop_id.clone(),
            ignore_eos: self.ignore_eos.then_some(true),
            include_stop: None,
        }
    }

    /// What the answer must match, files read.
    pub(crate) fn constraint(&self) -> Result<Option<v1::Constraint>, Failure> {
        let kind = if let Some(path) = &self.json_schema {
            Some(Kind::JsonSchema(text_of(path)?))
        } else if let Some(path) = &self.grammar {
            Some(Kind::Grammar(text_of(path)?))
        } else if let Some(regex) = &self.regex {
            Some(Kind::Regex(regex.clone()))
        } else if !self.choice.is_empty() {
            let texts = self.choice.clone();
            Some(Kind::Choices(v1::Choices { texts }))
        } else {
            None
        };
        Ok(kind.map(|kind| v1::Constraint { kind: Some(kind) }))
    }

    pub(crate) fn logprobs(&self) -> Option<v1::LogprobOptions> {
        self.logprobs.map(|top| v1::LogprobOptions { top })
    }

    /// More than one candidate cannot be written one after the other as it comes.
    pub(crate) fn has_many(&self) -> bool {
        self.n.is_some_and(|n| n > 1)
    }
}

fn text_of(path: &Path) -> Result<String, Failure> {
    std::fs::read_to_string(path)
        .map_err(|error| Failure::Local(format!("cannot read {}: {error}", path.display())))
}

fn bias(text: &str) -> Result<(u32, f32), String> {
    let wrong = || format!("{text:?} is not ID=VALUE");
    let (id, value) = text.split_once('=').ok_or_else(wrong)?;
    Ok((
        id.parse().map_err(|_| wrong())?,
        value.parse().map_err(|_| wrong())?,
    ))
}

/// A text from the argument, or all of stdin with `-` or without one.
pub(crate) fn text_or_stdin(argument: Option<&str>) -> Result<String, Failure> {
    match argument {
        Some(text) if text != "-" => Ok(text.to_owned()),
        None if io::stdin().is_terminal() => Err(Failure::Usage(
            "no text: give it as an argument, or through a pipe".to_owned(),
        )),
        _ => {
            let mut text = String::new();
            let read = io::stdin().read_to_string(&mut text);
            read.map_err(|error| Failure::Local(format!("stdin: {error}")))?;
            Ok(text)
        }
    }
}

/// Texts from the arguments, or one a line from stdin.
pub(crate) fn texts_or_stdin(arguments: &[String]) -> Result<Vec<String>, Failure> {
    if !arguments.is_empty() && arguments != ["-"] {
        return Ok(arguments.to_vec());
    }
    let lines = text_or_stdin(arguments.first().map(String::as_str))?;
    let texts: Vec<String> = lines
        .lines()
        .filter(|l| !l.is_empty())
        .map(str::to_owned)
        .collect();
    if texts.is_empty() {
        return Err(Failure::Usage("no texts: stdin has no line".to_owned()));
    }
    Ok(texts)
}

/// Who answered, as short as it can be said.
pub(crate) fn answered_by(effective: Option<&v1::EffectiveTarget>) -> String {
    let Some(effective) = effective else {
        return "an unnamed target".to_owned();
    };
    let name = |adapter: &v1::EffectiveAdapter| {
        let digest: String = adapter.digest.chars().take(12).collect();
        match adapter.weight {
            1.0 => format!("{} ({digest})", adapter.version),
            weight => format!("{weight} x {} ({digest})", adapter.version),
        }
    };
    match effective.adapters.as_slice() {
        [] => format!("{} alone", effective.base_model),
        adapters => adapters.iter().map(name).collect::<Vec<_>>().join(" + "),
    }
}

/// The line under a result: who answered, how much, how fast.
pub(crate) fn remark_result(
    out: Out,
    effective: Option<&v1::EffectiveTarget>,
    usage: Option<&v1::Usage>,
    timings: Option<&v1::Timings>,
) {
    let mut parts = vec![answered_by(effective)];
    if let Some(usage) = usage {
        let mut text = format!("{} tokens in", usage.input_tokens);
        if usage.cached_input_tokens > 0 {
            text.push_str(&format!(" ({} cached)", usage.cached_input_tokens));
        }
        if usage.output_tokens > 0 {
            text.push_str(&format!(", {} out", usage.output_tokens));
        }
        parts.push(text);
    }
    if let Some(timings) = timings {
        let mut add = |what: &str, duration: Option<&prost_types::Duration>| {
            if let Some(duration) = duration.filter(|d| seconds_of(d) >= 5e-4) {
                parts.push(format!("{what} {}", span(seconds_of(duration))));
            }
        };
        add("adapter loaded in", timings.adapter_load.as_ref());
        add("first token after", timings.time_to_first_token.as_ref());
        add("then each", timings.time_per_output_token.as_ref());
        add("total", timings.total.as_ref());
    }
    out.remark(format_args!("[{}]", parts.join(" · ")));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_has_an_id_and_a_value() {
        assert_eq!(bias("5=-1.5"), Ok((5, -1.5)));
        for wrong in ["5", "x=1", "5=x", "=", "-1=2"] {
            assert!(bias(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn an_adapter_may_have_a_weight() {
        let part = |name: &str, weight| {
            let name = name.to_owned();
            Ok(Part { name, weight })
        };
        assert_eq!(Part::parse("tickets"), part("tickets", None));
        assert_eq!(
            Part::parse("tickets@canary=-0.5"),
            part("tickets@canary", Some(-0.5))
        );
        let wrong = Part::parse("tickets=much");
        assert!(wrong.is_err_and(|why| why.contains("'much'")));
    }

    #[test]
    fn a_mixture_is_named_with_its_weights() {
        let part = |name: &str, weight| v1::EffectiveAdapter {
            version: name.to_owned(),
            digest: "0123456789abcdef".to_owned(),
            weight,
        };
        let effective = v1::EffectiveTarget {
            adapters: vec![part("a", 1.0), part("b", 0.25)],
            ..Default::default()
        };
        let text = answered_by(Some(&effective));
        assert_eq!(text, "a (0123456789ab) + 0.25 x b (0123456789ab)");
    }

    #[test]
    fn the_answer_names_version_and_digest() {
        let effective = v1::EffectiveTarget {
            adapters: vec![v1::EffectiveAdapter {
                version: "tenants/a/adapters/b/versions/3".to_owned(),
                digest: "0123456789abcdef".to_owned(),
                weight: 1.0,
            }],
            ..Default::default()
        };
        let text = answered_by(Some(&effective));
        assert_eq!(text, "tenants/a/adapters/b/versions/3 (0123456789ab)");
    }
}
