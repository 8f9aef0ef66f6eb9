//! `espalier chat`: one message and its answer, or a conversation in the terminal.

use std::io::{self, BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use serde_json::Value;

use crate::{
    cli::{
        Session,
        generate::{print_candidates, print_stream},
        output::Failure,
        sampling::{AdapterArg, SamplingArgs, remark_result, text_or_stdin},
    },
    error::Error,
    v1::{self, Role, tool_choice::Choice},
};

const HELP: &str = "\
/reset forgets the conversation, /adapter NAME changes who answers (/adapter alone: the base), /exit or Ctrl-D ends.";

/// Answer a message, or hold a conversation.
#[derive(Debug, Args)]
pub(crate) struct Chat {
    /// The message; from stdin with `-`. Left out in a terminal: a conversation.
    message: Option<String>,
    #[command(flatten)]
    pub(crate) adapter: AdapterArg,
    /// Instructions that stand above the conversation, in place of the adapter's own.
    #[arg(long, short)]
    system: Option<String>,
    /// Tools that the model may call: a JSON array of {"name", "description", "parameters"} in FILE. Calls are printed
    /// as NAME and arguments, one a line; nothing is run.
    #[arg(long, value_name = "FILE", conflicts_with = "constraint")]
    tools: Option<PathBuf>,
    /// Whether it calls: auto, none, required, or the name of the tool that it must call.
    #[arg(long, value_name = "CHOICE", requires = "tools")]
    tool_choice: Option<String>,
    #[command(flatten)]
    sampling: SamplingArgs,
    /// Wait for the whole answer, and ask for it in one message.
    #[arg(long)]
    no_stream: bool,
}

// === impl Chat ===

impl Chat {
    pub(crate) async fn run(mut self, session: &Session) -> Result<(), Failure> {
        if self.message.is_none() && io::stdin().is_terminal() {
            return self.converse(session).await;
        }
        let text = text_or_stdin(self.message.take().as_deref())?;
        let mut messages = self.opening();
        messages.push(message(Role::User, text));
        self.ask(session, messages).await.map(|_| ())
    }

    fn opening(&self) -> Vec<v1::ChatMessage> {
        let system = self.system.clone();
        system
            .map(|text| message(Role::System, text))
            .into_iter()
            .collect()
    }

    /// Asks once, shows the answer and gives it back.
    async fn ask(
        &self,
        session: &Session,
        messages: Vec<v1::ChatMessage>,
    ) -> Result<String, Failure> {
        let Session { client, out } = session;
        let request = v1::ChatRequest {
            target: self.adapter.target(client)?,
            messages,
            sampling: Some(self.sampling.sampling()),
            stop: Some(self.sampling.stop()),
            logprobs: self.sampling.logprobs(),
            request_id: String::new(),
            constraint: self.sampling.constraint()?,
            tools: self
                .tools
                .as_deref()
                .map(tools)
                .transpose()?
                .unwrap_or_default(),
            tool_choice: self.tool_choice.as_deref().map(choice),
        };
        if !self.no_stream && (out.is_json() || !self.sampling.has_many()) {
            let chunks = client.stream_chat(request).await?;
            return print_stream(*out, chunks).await;
        }
        let reply = client.chat(request).await?;
        if out.is_json() {
            out.document(&reply)?;
        } else {
            print_candidates(*out, &reply.candidates)?;
            let (usage, timings) = (reply.usage.as_ref(), reply.timings.as_ref());
            remark_result(*out, reply.effective.as_ref(), usage, timings);
        }
        Ok(reply
            .candidates
            .into_iter()
            .next()
            .map(|c| c.text)
            .unwrap_or_default())
    }

    async fn converse(mut self, session: &Session) -> Result<(), Failure> {
        session.out.remark(HELP);
        let mut messages = self.opening();
        while let Some(line) = read_line().await? {
            let line = line.trim();
            match line.split_once(' ').unwrap_or((line, "")) {
                ("", _) => {}
                ("/exit" | "/quit", _) => break,
                ("/help", _) => session.out.remark(HELP),
                ("/reset", _) => messages = self.opening(),
                ("/adapter", words) => match self.adapter.answer_by(words) {
                    Ok(()) if words.trim().is_empty() => {
                        session.out.remark("[the base model answers now]");
                    }
                    Ok(()) => session
                        .out
                        .remark(format_args!("[{} answers now]", words.trim())),
                    Err(why) => session.out.remark(format_args!("[{why}]")),
                },
                _ => self.turn(session, &mut messages, line).await?,
            }
        }
        Ok(())
    }

    /// One turn. A failed one is taken back, so that the conversation can go on.
    async fn turn(
        &self,
        session: &Session,
        messages: &mut Vec<v1::ChatMessage>,
        line: &str,
    ) -> Result<(), Failure> {
        messages.push(message(Role::User, line.to_owned()));
        let answer = tokio::select! {
            answer = self.ask(session, messages.clone()) => answer,
            _ = tokio::signal::ctrl_c() => {
                // Dropping the stream tells the server to stop.
                session.out.line("")?;
                session.out.remark("[stopped]");
                messages.pop();
                return Ok(());
            }
        };
        match answer {
            Ok(text) => messages.push(message(Role::Assistant, text)),
            Err(Failure::Call(error)) => {
                session.out.fail(&Failure::Call(error));
                messages.pop();
            }
            Err(other) => return Err(other),
        }
        Ok(())
    }
}

/// Tools from a file, as they are or in the envelope that OpenAI's clients put around them.
fn tools(path: &Path) -> Result<Vec<v1::Tool>, Failure> {
    let wrong = |what: String| Failure::Local(format!("{}: {what}", path.display()));
    let text = std::fs::read_to_string(path).map_err(|error| wrong(error.to_string()))?;
    let listed: Vec<Value> =
        serde_json::from_str(&text).map_err(|error| wrong(format!("no JSON array: {error}")))?;
    let tool = |listed: &Value| {
        let tool = listed.get("function").unwrap_or(listed);
        let word = |key: &str| tool[key].as_str().unwrap_or_default().to_owned();
        v1::Tool {
            name: word("name"),
            description: word("description"),
            parameters: tool
                .get("parameters")
                .map(Value::to_string)
                .unwrap_or_default(),
        }
    };
    Ok(listed.iter().map(tool).collect())
}

fn choice(word: &str) -> v1::ToolChoice {
    let mode = match word {
        "auto" => Some(v1::ToolChoiceMode::Auto),
        "none" => Some(v1::ToolChoiceMode::None),
        "required" => Some(v1::ToolChoiceMode::Required),
        _ => None,
    };
    let choice = match mode {
        Some(mode) => Choice::Mode(mode.into()),
        None => Choice::Tool(word.to_owned()),
    };
    v1::ToolChoice {
        choice: Some(choice),
    }
}

pub(crate) fn message(role: Role, content: String) -> v1::ChatMessage {
    v1::ChatMessage {
        role: role.into(),
        content,
        ..Default::default()
    }
}

/// A line from the terminal; `None` at its end. Read on a thread of its own, so that the
/// connection lives on while a person thinks.
async fn read_line() -> Result<Option<String>, Failure> {
    let read = tokio::task::spawn_blocking(|| {
        let _ = write!(io::stderr(), "> ");
        let mut line = String::new();
        let count = io::stdin().lock().read_line(&mut line)?;
        Ok::<_, io::Error>((count > 0).then_some(line))
    });
    tokio::select! {
        line = read => match line {
            Ok(Ok(line)) => Ok(line),
            Ok(Err(error)) => Err(Failure::Local(format!("stdin: {error}"))),
            Err(error) => Err(Error::local(tonic::Code::Internal, "STDIN", error.to_string()).into()),
        },
        _ = tokio::signal::ctrl_c() => Ok(None),
    }
}
