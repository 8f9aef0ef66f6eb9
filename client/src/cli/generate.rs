//! `espalier generate`: a raw text goes on, shown as it comes. The events of both streams of
//! the contract are read here; chats use the same reader.

use clap::Args;
use futures::{Stream, StreamExt};

use crate::{
    cli::{
        Session,
        output::{Failure, Out},
        sampling::{AdapterArg, SamplingArgs, remark_result, text_or_stdin},
    },
    error::Error,
    v1::{self, chat_chunk, generate_chunk, generate_request::Input},
};

/// Continue a raw text.
#[derive(Debug, Args)]
pub(crate) struct Generate {
    /// The text; from stdin with `-` or when left out.
    prompt: Option<String>,
    #[command(flatten)]
    pub(crate) adapter: AdapterArg,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Wait for the whole result, and ask for it in one message.
    #[arg(long)]
    no_stream: bool,
}

/// What a stream tells, whichever service sends it.
pub(crate) enum Told {
    Started(v1::StreamStarted),
    Delta(v1::TokenDelta),
    Finished(v1::CandidateFinished),
    Ended(v1::StreamEnded),
    /// An event that this client does not know yet.
    Other,
}

impl From<v1::GenerateChunk> for Told {
    fn from(chunk: v1::GenerateChunk) -> Self {
        use generate_chunk::Event as E;
        match chunk.event {
            Some(E::Started(started)) => Self::Started(started),
            Some(E::Delta(delta)) => Self::Delta(delta),
            Some(E::Finished(finished)) => Self::Finished(finished),
            Some(E::Ended(ended)) => Self::Ended(ended),
            None => Self::Other,
        }
    }
}

impl From<v1::ChatChunk> for Told {
    fn from(chunk: v1::ChatChunk) -> Self {
        use chat_chunk::Event as E;
        match chunk.event {
            Some(E::Started(started)) => Self::Started(started),
            Some(E::Delta(delta)) => Self::Delta(delta),
            Some(E::Finished(finished)) => Self::Finished(finished),
            Some(E::Ended(ended)) => Self::Ended(ended),
            None => Self::Other,
        }
    }
}

// === impl Generate ===

impl Generate {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let Session { client, out } = session;
        let request = v1::GenerateRequest {
            target: self.adapter.target(client)?,
            input: Some(Input::Text(text_or_stdin(self.prompt.as_deref())?)),
            sampling: Some(self.sampling.sampling()),
            stop: Some(self.sampling.stop()),
            logprobs: self.sampling.logprobs(),
            request_id: String::new(),
            constraint: self.sampling.constraint()?,
        };
        if self.no_stream || (self.sampling.has_many() && !out.is_json()) {
            let reply = client.generate(request).await?;
            if out.is_json() {
                return out.document(&reply);
            }
            print_candidates(*out, &reply.candidates)?;
            let (usage, timings) = (reply.usage.as_ref(), reply.timings.as_ref());
            remark_result(*out, reply.effective.as_ref(), usage, timings);
            return Ok(());
        }
        let chunks = client.stream_generate(request).await?;
        print_stream(*out, chunks).await.map(|_| ())
    }
}

pub(crate) fn print_candidates(out: Out, candidates: &[v1::Candidate]) -> Result<(), Failure> {
    for candidate in candidates {
        if candidates.len() > 1 {
            out.line(format_args!("--- {}", candidate.index))?;
        }
        if !candidate.text.is_empty() || candidate.tool_calls.is_empty() {
            out.line(&candidate.text)?;
        }
        for call in &candidate.tool_calls {
            out.line(shown(call))?;
        }
        remark_end(out, candidate.finish_reason());
    }
    Ok(())
}

fn shown(call: &v1::ToolCall) -> String {
    format!("{} {}", call.name, call.arguments)
}

/// Only an end that one would not expect is worth a word.
fn remark_end(out: Out, reason: v1::FinishReason) {
    if reason == v1::FinishReason::Length {
        out.remark("[cut: the token limit was reached]");
    }
}

/// Shows a stream and gives the text of its first candidate.
pub(crate) async fn print_stream<T>(
    out: Out,
    mut chunks: impl Stream<Item = Result<T, Error>> + Unpin,
) -> Result<String, Failure>
where
    T: Into<Told> + prost::Message + prost::Name,
{
    let mut text = String::new();
    let mut calls = Vec::new();
    let mut effective = None;
    let mut reason = v1::FinishReason::Unspecified;
    let mut ended = None;
    while let Some(chunk) = chunks.next().await {
        let chunk = match chunk {
            Ok(chunk) => chunk,
            Err(error) => {
                // The error stands on a line of its own below what came before it.
                if !text.is_empty() && !out.is_json() {
                    out.line("")?;
                }
                return Err(error.into());
            }
        };
        if out.is_json() {
            out.json_line(&chunk)?;
        }
        match chunk.into() {
            Told::Started(started) => effective = started.effective,
            Told::Delta(delta) if delta.index == 0 => {
                if !out.is_json() {
                    out.piece(&delta.text)?;
                }
                text.push_str(&delta.text);
                calls.extend(delta.tool_calls);
            }
            Told::Finished(finished) => reason = finished.finish_reason(),
            Told::Ended(found) => ended = Some(found),
            Told::Delta(_) | Told::Other => {}
        }
    }
    let Some(ended) = ended else {
        let why = "the stream ended before its last message";
        return Err(Error::local(tonic::Code::DataLoss, "STREAM", why).into());
    };
    if !out.is_json() {
        if !text.is_empty() || calls.is_empty() {
            out.line("")?;
        }
        for call in &calls {
            out.line(shown(call))?;
        }
        remark_end(out, reason);
        let (usage, timings) = (ended.usage.as_ref(), ended.timings.as_ref());
        remark_result(out, effective.as_ref(), usage, timings);
    }
    Ok(text)
}
