//! The commands without generated text: `classify`, `embed`, `score`, `tokenize`, `detokenize`.

use clap::{Args, ValueEnum};

use crate::{
    cli::{
        Session,
        chat::message,
        classification::answer_text,
        output::{Failure, Out},
        sampling::{AdapterArg, remark_result, text_or_stdin, texts_or_stdin},
    },
    v1::{self, score_item, tokenize_request::Input},
};

/// Texts of one call; more of them become several calls.
const BATCH: usize = 32;

/// Choose among labels.
#[derive(Debug, Args)]
pub(crate) struct Classify {
    /// The texts; one a line from stdin when left out.
    texts: Vec<String>,
    #[command(flatten)]
    pub(crate) adapter: AdapterArg,
    /// Labels to score by likelihood, separated by commas; for adapters without a head.
    #[arg(long, value_delimiter = ',')]
    labels: Vec<String>,
    /// Show so many labels of each text.
    #[arg(long, default_value_t = 1)]
    top: usize,
}

impl Classify {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let Session { client, out } = session;
        let texts = texts_or_stdin(&self.texts)?;
        for batch in texts.chunks(BATCH) {
            let request = v1::ClassifyRequest {
                target: self.adapter.target(client)?,
                texts: batch.to_vec(),
                labels: self.labels.clone(),
                request_id: String::new(),
            };
            let reply = client.classify(request).await?;
            if out.is_json() {
                one_or_lines(*out, &reply, texts.len())?;
                continue;
            }
            for (text, result) in batch.iter().zip(&reply.results) {
                let scores = answer_text(result, self.top);
                if texts.len() == 1 {
                    out.line(scores)?;
                } else {
                    out.line(format_args!("{scores}\t{text}"))?;
                }
            }
            let (usage, timings) = (reply.usage.as_ref(), reply.timings.as_ref());
            remark_result(*out, reply.effective.as_ref(), usage, timings);
        }
        Ok(())
    }
}

/// A document when there is one call, else one line a call.
fn one_or_lines<M: prost::Message + prost::Name>(
    out: Out,
    reply: &M,
    texts: usize,
) -> Result<(), Failure> {
    if texts <= BATCH {
        out.document(reply)
    } else {
        out.json_line(reply)
    }
}

/// How token states become one vector.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum PoolingArg {
    /// The last token's state.
    Last,
    /// The mean of all tokens' states.
    Mean,
}

impl From<PoolingArg> for v1::Pooling {
    fn from(given: PoolingArg) -> Self {
        match given {
            PoolingArg::Last => Self::Last,
            PoolingArg::Mean => Self::Mean,
        }
    }
}

/// Turn texts into vectors.
#[derive(Debug, Args)]
pub(crate) struct Embed {
    /// The texts; one a line from stdin when left out.
    texts: Vec<String>,
    #[command(flatten)]
    pub(crate) adapter: AdapterArg,
    /// How token states become one vector.
    #[arg(long, value_enum, default_value = "last")]
    pooling: PoolingArg,
    /// Keep the vectors' lengths; else each has length 1.
    #[arg(long)]
    raw: bool,
}

impl Embed {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let Session { client, out } = session;
        let texts = texts_or_stdin(&self.texts)?;
        for batch in texts.chunks(BATCH) {
            let pooling = v1::Pooling::from(self.pooling);
            let request = v1::EmbedRequest {
                target: self.adapter.target(client)?,
                texts: batch.to_vec(),
                pooling: pooling.into(),
                normalize: Some(!self.raw),
                request_id: String::new(),
            };
            let reply = client.embed(request).await?;
            if out.is_json() {
                one_or_lines(*out, &reply, texts.len())?;
                continue;
            }
            for embedding in &reply.embeddings {
                let values = embedding.values.iter().map(f32::to_string);
                out.line(values.collect::<Vec<_>>().join(" "))?;
            }
            let (usage, timings) = (reply.usage.as_ref(), reply.timings.as_ref());
            remark_result(*out, reply.effective.as_ref(), usage, timings);
        }
        Ok(())
    }
}

/// Log-probabilities of continuations.
#[derive(Debug, Args)]
pub(crate) struct Score {
    /// The continuations, each scored by itself.
    #[arg(required = true)]
    continuations: Vec<String>,
    /// What comes before all of them.
    #[arg(long, short, default_value = "")]
    context: String,
    #[command(flatten)]
    pub(crate) adapter: AdapterArg,
    /// Ask for each token too, with so many alternatives. Shown with --json.
    #[arg(long, value_name = "COUNT", num_args = 0..=1, default_missing_value = "0")]
    logprobs: Option<u32>,
}

impl Score {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let Session { client, out } = session;
        let item = |text: &String| v1::ScoreItem {
            context: Some(score_item::Context::ContextText(self.context.clone())),
            continuation: Some(score_item::Continuation::ContinuationText(text.clone())),
        };
        for batch in self.continuations.chunks(BATCH) {
            let request = v1::ScoreRequest {
                target: self.adapter.target(client)?,
                items: batch.iter().map(item).collect(),
                logprobs: self.logprobs.map(|top| v1::LogprobOptions { top }),
                request_id: String::new(),
            };
            let reply = client.score(request).await?;
            if out.is_json() {
                one_or_lines(*out, &reply, self.continuations.len())?;
                continue;
            }
            let row = |(text, result): (&String, &v1::ScoreResult)| {
                vec![
                    format!("{:.4}", result.logprob),
                    result.tokens.to_string(),
                    format!("{:.3}", result.perplexity),
                    format!("{text:?}"),
                ]
            };
            let rows: Vec<_> = batch.iter().zip(&reply.results).map(row).collect();
            out.table(
                &["LOGPROB", "TOKENS", "PERPLEXITY", "CONTINUATION"],
                &rows,
                "",
            )?;
            let (usage, timings) = (reply.usage.as_ref(), reply.timings.as_ref());
            remark_result(*out, reply.effective.as_ref(), usage, timings);
        }
        Ok(())
    }
}

/// Text to token ids.
#[derive(Debug, Args)]
pub(crate) struct Tokenize {
    /// The text; from stdin with `-` or when left out.
    text: Option<String>,
    #[command(flatten)]
    pub(crate) adapter: AdapterArg,
    /// As a user's message in a chat, rendered by the chat template.
    #[arg(long)]
    chat: bool,
    /// Control tokens in the text stay text.
    #[arg(long, conflicts_with = "chat")]
    plain: bool,
    /// Show the ids alone, in one line.
    #[arg(long)]
    ids: bool,
}

impl Tokenize {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let Session { client, out } = session;
        let text = text_or_stdin(self.text.as_deref())?;
        let input = if self.chat {
            Input::Chat(v1::ChatInput {
                messages: vec![message(v1::Role::User, text)],
                add_generation_prompt: None,
                ..Default::default()
            })
        } else {
            Input::Text(text)
        };
        let request = v1::TokenizeRequest {
            target: self.adapter.target(client)?,
            input: Some(input),
            parse_control_tokens: self.plain.then_some(false),
        };
        let reply = client.tokenize(request).await?;
        if out.is_json() {
            return out.document(&reply);
        }
        if self.ids {
            let ids = reply.token_ids.iter().map(u32::to_string);
            return out.line(ids.collect::<Vec<_>>().join(" "));
        }
        for (id, piece) in reply.token_ids.iter().zip(&reply.pieces) {
            out.line(format_args!("{id:>8}  {piece:?}"))?;
        }
        out.remark(format_args!(
            "[{} tokens of {} in the context]",
            reply.token_ids.len(),
            reply.context_length
        ));
        Ok(())
    }
}

/// Token ids to text.
#[derive(Debug, Args)]
pub(crate) struct Detokenize {
    /// The ids.
    #[arg(required = true)]
    ids: Vec<u32>,
    /// Leave control tokens out.
    #[arg(long)]
    skip_control: bool,
}

impl Detokenize {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let Session { client, out } = session;
        let request = v1::DetokenizeRequest {
            token_ids: self.ids,
            skip_control_tokens: self.skip_control.then_some(true),
        };
        let reply = client.detokenize(request).await?;
        if out.is_json() {
            return out.document(&reply);
        }
        out.line(reply.text)
    }
}
