//! Rows to ids, by the same steps that a request goes through: whatever would differ would be learned and never met.
//!
//! This file must not know files or what a loss does with the ids.

use std::collections::BTreeSet;

use super::window::cut;
use super::{Example, Examples, TrainOn};
use crate::profile::ServingProfile;
use crate::text::{ChatTemplate, Message, TextError, Tokenizer, encode_chat};
use crate::train::dataset::{
    ChatMessage, DataFinding, DataReport, DataRule, Dataset, Kind, Role, Row,
};

/// The name of a regression head's only row.
pub const SCORE_LABEL: &str = "score";

/// Everything that turns a row into ids.
#[derive(Clone, Copy, Debug)]
pub struct Encoding<'a> {
    /// The base's tokenizer.
    pub tokenizer: &'a Tokenizer,
    /// The template that Chat renders with: the base's, or the profile's where the server accepts one.
    pub template: Option<&'a ChatTemplate>,
    /// System prompt and prompt template.
    pub profile: &'a ServingProfile,
    /// Ids that end a generation.
    pub stop_ids: &'a [u32],
    /// Which turns of completions, chats and instructions are learned.
    pub train_on: TrainOn,
    /// Tokens of one example at most; of raw text, the tokens of a window, at least 2.
    pub max_tokens: usize,
    /// The classes in the order of the head's rows, when they are given: the job's, or the training part's for the
    /// validation part. Otherwise the rows' own labels, sorted bytewise.
    pub labels: Option<&'a [String]>,
    /// Findings listed in the report.
    pub max_findings: usize,
}

/// A row that has more tokens than allowed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TooLong {
    /// Its line.
    pub line: u64,
    /// Its tokens.
    pub tokens: usize,
    /// Its tokens before the first learned one; 0 of classes, and where all is learned.
    pub prompt: usize,
}

/// What became of rows.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// The examples of the rows that are good; there may be none.
    pub examples: Examples,
    /// Rows that are too long.
    pub too_long: Vec<TooLong>,
    /// Every row that is not good, those among them.
    pub report: DataReport,
}

/// Why a row cannot be learned: the rule that it breaks, its field and the reason; tokens and prompt where it is too long.
struct Unfit {
    rule: DataRule,
    field: &'static str,
    reason: String,
    length: Option<(usize, usize)>,
}

impl From<(DataRule, &'static str, String)> for Unfit {
    fn from((rule, field, reason): (DataRule, &'static str, String)) -> Self {
        Self {
            rule,
            field,
            reason,
            length: None,
        }
    }
}

/// Ids and what is learned of them.
type RowExamples = Result<Vec<Example>, Unfit>;

/// Encodes every row, as [`encode`] does, and takes all or none.
///
/// # Errors
/// The report of every row that cannot be learned whole; none is cut or left out.
pub fn build(data: &Dataset, encoding: &Encoding) -> Result<Examples, DataReport> {
    let encoded = encode(data, encoding);
    if encoded.report.error_count() > 0 {
        return Err(encoded.report);
    }
    Ok(encoded.examples)
}

/// Encodes every row.
///
/// A completion's prompt is encoded as Generate would encode it, and its completion ends with a stop id, so that the model learns to
/// stop. A chat is encoded as Chat would: each learned answer follows the very ids from which it would be generated. Classes are
/// encoded as Classify would. An instruction becomes a chat of two messages. Raw text is encoded as Generate would, ends with a stop
/// id, and is cut in windows. A row that cannot be learned whole is in the report.
#[must_use]
pub fn encode(data: &Dataset, encoding: &Encoding) -> Encoded {
    let mut report = DataReport::default();
    let rendered = match data.kind {
        Kind::Chat => Some("messages"),
        Kind::Instruction => Some("instruction"),
        _ => None,
    };
    if let (Some(field), None) = (rendered, encoding.template) {
        let reason = format!(
            "this base has no chat template to render {} rows with; use prompt/completion rows",
            data.kind.as_str()
        );
        let finding = DataFinding {
            line: 0,
            field: field.to_owned(),
            rule: DataRule::Template,
            reason,
        };
        report.error(finding, encoding.max_findings);
        return Encoded {
            examples: Examples {
                items: Vec::new(),
                lines: Vec::new(),
                labels: None,
            },
            too_long: Vec::new(),
            report,
        };
    }
    let answered = matches!(data.kind, Kind::Class | Kind::Labels | Kind::Score);
    let labels = answered.then(|| labels(data, encoding));
    let (mut items, mut lines, mut too_long) = (Vec::new(), Vec::new(), Vec::new());
    for (row, line) in data.rows.iter().zip(&data.lines) {
        match encoding.row(row, labels.as_deref()) {
            Ok(examples) => {
                lines.extend(examples.iter().map(|_| *line));
                items.extend(examples);
            }
            Err(unfit) => {
                too_long.extend(unfit.length.map(|(tokens, prompt)| TooLong {
                    line: *line,
                    tokens,
                    prompt,
                }));
                let finding = DataFinding {
                    line: *line,
                    field: unfit.field.to_owned(),
                    rule: unfit.rule,
                    reason: unfit.reason,
                };
                report.error(finding, encoding.max_findings);
            }
        }
    }
    Encoded {
        examples: Examples {
            items,
            lines,
            labels,
        },
        too_long,
        report,
    }
}

fn labels(data: &Dataset, encoding: &Encoding) -> Vec<String> {
    if let Some(labels) = encoding.labels {
        return labels.to_vec();
    }
    if data.kind == Kind::Score {
        return vec![SCORE_LABEL.to_owned()];
    }
    let found: BTreeSet<&String> = data
        .rows
        .iter()
        .flat_map(|row| match row {
            Row::Class { label, .. } => std::slice::from_ref(label),
            Row::Labels { labels, .. } => labels,
            _ => &[],
        })
        .collect();
    found.into_iter().cloned().collect()
}

/// A text that the tokenizer cannot encode, or a chat that the template refuses.
fn unencodable(field: &'static str) -> impl Fn(TextError) -> Unfit {
    move |error| (DataRule::Template, field, error.to_string()).into()
}

/// The row of the head that a label names.
fn row_of(label: &str, field: &'static str, labels: &[String]) -> Result<usize, Unfit> {
    labels
        .iter()
        .position(|known| known == label)
        .ok_or_else(|| {
            let reason = format!("{label:?} is not among the {} labels", labels.len());
            (DataRule::UnknownLabel, field, reason).into()
        })
}

impl Encoding<'_> {
    fn row(&self, row: &Row, labels: Option<&[String]>) -> RowExamples {
        match row {
            Row::Completion { prompt, completion } => self.completion(prompt, completion),
            Row::Chat { messages } => self.chat(messages),
            Row::Class { text, label } => {
                let label = row_of(label, "label", labels.unwrap_or_default())?;
                let ids = self.classified(text)?;
                Ok(vec![Example::Class { ids, label }])
            }
            Row::Labels {
                text,
                labels: names,
            } => {
                let known = labels.unwrap_or_default();
                let rows = names.iter().map(|name| row_of(name, "labels", known));
                let mut labels = rows.collect::<Result<Vec<usize>, Unfit>>()?;
                labels.sort_unstable();
                let ids = self.classified(text)?;
                Ok(vec![Example::Labels { ids, labels }])
            }
            Row::Score { text, score } => {
                let (ids, score) = (self.classified(text)?, *score);
                Ok(vec![Example::Score { ids, score }])
            }
            Row::Text { text } => self.document(text),
            Row::Instruction {
                instruction,
                input,
                output,
            } => {
                let examples = self.chat(&conversation(instruction, input, output));
                examples.map_err(|unfit| Unfit {
                    field: "instruction",
                    ..unfit
                })
            }
        }
    }

    fn document(&self, text: &str) -> RowExamples {
        let mut ids = self.tokenizer.encode(text).map_err(unencodable("text"))?;
        self.end(&mut ids);
        if ids.len() < 2 {
            let reason = "is one token without any before it: there is nothing to learn".to_owned();
            return Err((DataRule::NothingToLearn, "text", reason).into());
        }
        Ok(cut(&ids, self.max_tokens))
    }

    /// A text as Classify would encode it.
    fn classified(&self, text: &str) -> Result<Vec<u32>, Unfit> {
        let ids = self.tokenizer.encode(text).map_err(unencodable("text"))?;
        if ids.is_empty() {
            return Err((DataRule::Empty, "text", "has no tokens".to_owned()).into());
        }
        self.fits("text", ids.len(), || 0)?;
        Ok(ids)
    }

    fn completion(&self, prompt: &str, completion: &str) -> RowExamples {
        let encode = |text: &str| {
            self.tokenizer
                .encode(text)
                .map_err(unencodable("completion"))
        };
        let prompt = self.profile.raw_prompt(prompt);
        let mut ids = encode(&prompt)?;
        let around = Around::of(self.tokenizer).map_err(unencodable("completion"))?;
        // Together first: a tokenizer that puts a space in front of every text would put one in front of the completion.
        let together = encode(&format!("{prompt}{completion}"))?;
        let read = around.inside(&ids).len();
        let tail = if around.inside(&together).starts_with(around.inside(&ids)) {
            around.inside(&together)[read..].to_vec()
        } else {
            // Characters from both sides make one token; a request would not see that token either.
            around.inside(&encode(completion)?).to_vec()
        };
        if tail.is_empty() {
            let reason = "has no tokens: there is nothing to learn".to_owned();
            return Err((DataRule::NothingToLearn, "completion", reason).into());
        }
        let start = ids.len();
        ids.extend(tail);
        self.end(&mut ids);
        let first = match self.train_on {
            TrainOn::Assistant | TrainOn::LastAssistant => start.max(1),
            TrainOn::All => 1,
        };
        self.fits("completion", ids.len(), || first)?;
        let learn: Vec<bool> = (0..ids.len()).map(|i| i >= first).collect();
        if !learn.contains(&true) {
            let reason = "is one token without any before it: there is nothing to learn".to_owned();
            return Err((DataRule::NothingToLearn, "completion", reason).into());
        }
        Ok(vec![Example::Lm { ids, learn }])
    }

    /// The conversation's ids and what is learned of them, as [`TrainOn`] says.
    fn chat(&self, messages: &[ChatMessage]) -> RowExamples {
        let first = messages.first().map(|m| m.role.as_str());
        let system = self
            .profile
            .system_for(first)
            .map(|text| Message::new("system", text));
        let offset = usize::from(system.is_some());
        let spoken = messages
            .iter()
            .map(|m| Message::new(m.role.as_str(), m.content.as_str()));
        let spoken: Vec<Message> = system.into_iter().chain(spoken).collect();
        let whole = self.rendered(&spoken, false)?;
        if self.train_on == TrainOn::All {
            self.fits("messages", whole.len(), || 0)?;
            return self.every_turn(messages, &spoken, whole);
        }
        let answers = messages
            .iter()
            .enumerate()
            .filter(|(_, m)| m.role == Role::Assistant);
        let skipped = match self.train_on {
            TrainOn::LastAssistant => answers.clone().count().saturating_sub(1),
            _ => 0,
        };
        let learned: Vec<usize> = answers
            .skip(skipped)
            .filter(|(_, m)| m.learn)
            .map(|(i, _)| i + offset)
            .collect();
        let Some(first) = learned.first() else {
            let reason = "there is no answer to learn: the one to train on has weight 0".to_owned();
            return Err((DataRule::NothingToLearn, "messages", reason).into());
        };
        // Before the turns are rendered, each with all that went before it.
        self.fits("messages", whole.len(), || {
            let before = self.rendered(&spoken[..*first], true);
            before.map_or(0, |ids| ids.len())
        })?;
        let turns: Vec<Turn> = learned
            .iter()
            .map(|i| self.turn(&spoken, *i))
            .collect::<Result<_, _>>()?;
        self.answers(turns, whole)
    }

    /// One example for the conversation when every answer stands in it as it was generated; otherwise (a template that renders
    /// earlier turns in another way once later ones follow) one example for each learned answer.
    fn answers(&self, turns: Vec<Turn>, mut whole: Vec<u32>) -> RowExamples {
        if turns.iter().all(|turn| whole.starts_with(&turn.ids)) {
            let mut learn = vec![false; whole.len()];
            for turn in &turns {
                learn[turn.start..turn.end].fill(true);
            }
            if let Some(last) = turns.last().filter(|t| t.ids.len() == whole.len()) {
                learn.resize(last.ended.len(), true);
                whole.clone_from(&last.ended);
            }
            let first = turns.first().map_or(0, |turn| turn.start);
            self.fits("messages", whole.len(), || first)?;
            return Ok(vec![Example::Lm { ids: whole, learn }]);
        }
        turns
            .into_iter()
            .map(|turn| {
                let mut learn = vec![false; turn.ids.len()];
                learn[turn.start..turn.end].fill(true);
                learn.resize(turn.ended.len(), true);
                self.fits("messages", turn.ended.len(), || turn.start)?;
                Ok(Example::Lm {
                    ids: turn.ended,
                    learn,
                })
            })
            .collect()
    }

    /// The whole conversation, learned from its second token on, but for messages of weight 0.
    fn every_turn(
        &self,
        messages: &[ChatMessage],
        spoken: &[Message],
        mut whole: Vec<u32>,
    ) -> RowExamples {
        let mut learn: Vec<bool> = (0..whole.len()).map(|at| at > 0).collect();
        let offset = spoken.len() - messages.len();
        for (i, _) in messages.iter().enumerate().filter(|(_, m)| !m.learn) {
            let before = self.rendered(&spoken[..i + offset], false)?;
            let through = self.rendered(&spoken[..=i + offset], false)?;
            if !whole.starts_with(&through) || !through.starts_with(&before) {
                let reason = format!(
                    "the chat template renders message {i} differently once others follow, so that its weight 0 has no place; remove it"
                );
                return Err((DataRule::Template, "messages", reason).into());
            }
            learn[before.len()..through.len()].fill(false);
        }
        // The checked row ends with an answer, which a stop id follows where the template writes none.
        let last = self.turn(spoken, spoken.len() - 1)?;
        if last.ids == whole {
            learn.resize(last.ended.len(), messages.last().is_some_and(|m| m.learn));
            whole = last.ended;
        }
        self.fits("messages", whole.len(), || 0)?;
        if !learn.contains(&true) {
            let reason = "every message has weight 0: there is nothing to learn".to_owned();
            return Err((DataRule::NothingToLearn, "messages", reason).into());
        }
        Ok(vec![Example::Lm { ids: whole, learn }])
    }

    /// The answer at `i` behind the ids from which it would be generated.
    fn turn(&self, spoken: &[Message], i: usize) -> Result<Turn, Unfit> {
        let before = self.rendered(&spoken[..i], true)?;
        let ids = self.rendered(&spoken[..=i], false)?;
        let start = before.len().max(1);
        if !ids.starts_with(&before) || ids.len() <= start {
            let reason = format!(
                "the chat template renders message {i} differently from what it is generated after, so that it cannot be learned as it would be served"
            );
            return Err((DataRule::Template, "messages", reason).into());
        }
        // What the template writes behind the stop id is never generated.
        let stop = ids[start..]
            .iter()
            .rposition(|id| self.stop_ids.contains(id));
        let end = stop.map_or(ids.len(), |at| start + at + 1);
        let mut ended = ids.clone();
        if stop.is_none() {
            self.end(&mut ended);
        }
        Ok(Turn {
            ids,
            ended,
            start,
            end,
        })
    }

    fn rendered(&self, messages: &[Message], open: bool) -> Result<Vec<u32>, Unfit> {
        let Some(template) = self.template else {
            let reason = "this base has no chat template".to_owned();
            return Err((DataRule::Template, "messages", reason).into());
        };
        encode_chat(self.tokenizer, template, messages, &[], open).map_err(unencodable("messages"))
    }

    /// Puts a stop id at the end unless one is there: the model must learn where to stop.
    fn end(&self, ids: &mut Vec<u32>) {
        if ids.last().is_some_and(|id| self.stop_ids.contains(id)) {
            return;
        }
        let eos = self.tokenizer.eos_id();
        let stops = eos.filter(|id| self.stop_ids.is_empty() || self.stop_ids.contains(id));
        ids.extend(stops.or(self.stop_ids.first().copied()));
    }

    /// Refuses more tokens than allowed; `prompt` counts those before the first learned one and is asked only then.
    fn fits(
        &self,
        field: &'static str,
        tokens: usize,
        prompt: impl FnOnce() -> usize,
    ) -> Result<(), Unfit> {
        let limit = self.max_tokens;
        if tokens <= limit {
            return Ok(());
        }
        Err(Unfit {
            rule: DataRule::TooLong,
            field,
            reason: format!("the row has {tokens} tokens, limit {limit}; shorten it or split it"),
            length: Some((tokens, prompt())),
        })
    }
}

/// An instruction as it is asked in a chat: its input behind a blank line, where it has one.
fn conversation(instruction: &str, input: &str, output: &str) -> [ChatMessage; 2] {
    let asked = match input {
        "" => instruction.to_owned(),
        input => format!("{instruction}\n\n{input}"),
    };
    [(Role::User, asked), (Role::Assistant, output.to_owned())].map(|(role, content)| ChatMessage {
        role,
        content,
        learn: true,
    })
}

/// A learned answer.
struct Turn {
    /// The conversation up to and with it.
    ids: Vec<u32>,
    /// The same with a stop id where the template writes none.
    ended: Vec<u32>,
    /// Its first id.
    start: usize,
    /// Behind its last learned one in `ids`.
    end: usize,
}

/// What the tokenizer puts around every text, such as BOS.
struct Around {
    before: usize,
    behind: usize,
}

impl Around {
    fn of(tokenizer: &Tokenizer) -> Result<Self, TextError> {
        // Between the two stands one text, so the lengths tell.
        let (plain, around) = (tokenizer.encode_plain("a")?, tokenizer.encode("a")?);
        let before = around
            .windows(plain.len().max(1))
            .position(|w| w == plain)
            .unwrap_or(0);
        Ok(Self {
            before,
            behind: around.len().saturating_sub(before + plain.len()),
        })
    }

    fn inside<'a>(&self, ids: &'a [u32]) -> &'a [u32] {
        ids.get(self.before..ids.len().saturating_sub(self.behind))
            .unwrap_or_default()
    }
}
