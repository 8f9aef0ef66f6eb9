//! `InferenceService`: resolve the target once, check, tokenise, hand over to the engine, and turn its events into the
//! reply. A call holds what it resolved until its end; a stream that is dropped drops the engine's receiver, and with
//! that its sequences leave at the next step. No text of a request is ever logged.

mod answer;
mod ask;
mod batch;
mod lines;
mod tools;

use std::pin::Pin;

use espalier_adapters::text::Message;
use espalier_engine::constraint::ConstraintSource;
use espalier_engine::request::RequestKind;
use espalier_proto::v1;
use futures::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

use self::answer::{Collected, Operation};
use self::ask::{Asker, Labelling, Plan};
use super::{Call, Shell};
use crate::convert::{chat, count, reply, request};
use crate::status::Refusal;

/// The service.
#[derive(Clone)]
pub(crate) struct InferenceService {
    asker: Asker,
}

type Chunks<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

impl InferenceService {
    pub(crate) fn new(shell: Shell) -> Self {
        InferenceService {
            asker: Asker::new(shell),
        }
    }

    /// Everything of Generate up to the engine.
    async fn plan_generate(
        &self,
        call: &Call,
        message: v1::GenerateRequest,
    ) -> Result<Plan, Refusal> {
        let limits = &self.asker.shell.config.limits;
        request::request_id(&message.request_id, limits)?;
        let held = self.asker.resolve(call, message.target).await?;
        let profile = held.profile();
        let settings = request::settings(
            message.sampling,
            message.stop,
            message.logprobs,
            &profile,
            limits,
        )?;
        let constraint = request::constraint(message.constraint)?;
        let prompt = match request::prompt(message.input, limits)? {
            request::Prompt::Text(text) => request::Prompt::Text(profile.raw_prompt(&text)),
            ids => ids,
        };
        let prompt = self.asker.encode("text", prompt).await?;
        let mut plan = Plan::new(held, prompt, settings, call.named(&message.request_id));
        self.settle(call, &mut plan, constraint).await?;
        Ok(plan)
    }

    /// Everything of Chat up to the engine.
    async fn plan_chat(&self, call: &Call, message: v1::ChatRequest) -> Result<Plan, Refusal> {
        let limits = &self.asker.shell.config.limits;
        request::request_id(&message.request_id, limits)?;
        let held = self.asker.resolve(call, message.target).await?;
        let profile = held.profile();
        let mut settings = request::settings(
            message.sampling,
            message.stop,
            message.logprobs,
            &profile,
            limits,
        )?;
        let mut constraint = request::constraint(message.constraint)?;
        let messages = chat::messages(message.messages, limits)?;
        let offer = chat::offer(message.tools, message.tool_choice, limits)?;
        let tools = match &offer {
            None => None,
            Some(_) if constraint.is_some() => {
                let why = "cannot stand beside tools; leave one out, or set tool_choice to TOOL_CHOICE_MODE_NONE";
                return Err(Refusal::invalid_field("constraint", why));
            }
            Some(offer) => {
                let tools = self.asker.tool_use(offer)?;
                constraint = tools.required(offer);
                Some(tools)
            }
        };
        let (messages, system) = with_system(messages, &profile);
        settings.system_prompt = system;
        let offered = offer.map(|offer| offer.tools).unwrap_or_default();
        let prompt = self.asker.encode_chat(messages, offered, true).await?;
        let mut plan = Plan::new(held, prompt, settings, call.named(&message.request_id));
        plan.tools = tools;
        self.settle(call, &mut plan, constraint).await?;
        Ok(plan)
    }

    /// What waits until the prompt is known: how many tokens are left for the answer, and what it must match.
    async fn settle(
        &self,
        call: &Call,
        plan: &mut Plan,
        constraint: Option<ConstraintSource>,
    ) -> Result<(), Refusal> {
        let limits = &self.asker.shell.config.limits;
        plan.settings
            .fit(plan.prompt.len(), self.asker.context(), limits)?;
        let field = plan.tools.is_some().then_some("tools");
        let compiled = self.asker.compile(call, &plan.held, constraint).await;
        // A call's grammar is ours; what cannot be compiled in it are the tools' schemas.
        plan.constraint = compiled.map_err(|refusal| match field {
            Some(field) => refusal.blaming(field),
            None => refusal,
        })?;
        Ok(())
    }

    fn submit(
        &self,
        call: &Call,
        plan: &Plan,
        operation: Operation,
    ) -> Result<answer::Events, Refusal> {
        let events = self
            .asker
            .submit(call, &plan.held, &plan.id, plan.kind(), operation)?;
        Ok(events.with_tools(plan.tools.clone()))
    }

    /// One Generate from its message to its reply.
    pub(crate) async fn answer_generate(
        &self,
        call: &Call,
        message: v1::GenerateRequest,
    ) -> Result<v1::GenerateResponse, Refusal> {
        let plan = self.plan_generate(call, message).await?;
        self.generated(call, plan, Operation::Generate).await
    }

    /// One Chat from its message to its reply.
    pub(crate) async fn answer_chat(
        &self,
        call: &Call,
        message: v1::ChatRequest,
    ) -> Result<v1::ChatResponse, Refusal> {
        let plan = self.plan_chat(call, message).await?;
        let found = self.generated(call, plan, Operation::Chat).await?;
        Ok(v1::ChatResponse {
            candidates: found.candidates,
            usage: found.usage,
            timings: found.timings,
            effective: found.effective,
            settings: found.settings,
            request_id: found.request_id,
        })
    }

    /// Everything of Classify up to the engine.
    async fn plan_classify(
        &self,
        call: &Call,
        message: v1::ClassifyRequest,
    ) -> Result<Labelling, Refusal> {
        let limits = &self.asker.shell.config.limits;
        request::request_id(&message.request_id, limits)?;
        request::texts(&message.texts, limits)?;
        request::labels(&message.labels, limits)?;
        let held = self.asker.resolve(call, message.target).await?;
        let id = call.named(&message.request_id);
        let (kind, method) = self
            .asker
            .classification(&held, message.texts, message.labels)
            .await?;
        Ok(Labelling {
            held,
            id,
            kind,
            method,
        })
    }

    /// One Classify from its message to its reply.
    pub(crate) async fn answer_classify(
        &self,
        call: &Call,
        message: v1::ClassifyRequest,
    ) -> Result<v1::ClassifyResponse, Refusal> {
        let Labelling {
            held,
            id,
            kind,
            method,
        } = self.plan_classify(call, message).await?;
        let collected = self
            .asker
            .submit(call, &held, &id, kind, Operation::Classify)?
            .collect()
            .await?;
        Ok(v1::ClassifyResponse {
            results: collected.classes()?,
            method: method.into(),
            usage: Some(reply::usage(collected.usage)),
            timings: Some(reply::timings(collected.timings, 0)),
            effective: Some(self.asker.effective(&held)),
            request_id: id.to_string(),
        })
    }

    async fn generated(
        &self,
        call: &Call,
        plan: Plan,
        operation: Operation,
    ) -> Result<v1::GenerateResponse, Refusal> {
        let collected = self.submit(call, &plan, operation)?.collect().await?;
        let tokenizer = &self.asker.shell.engine.model().tokenizer;
        let longest = collected
            .candidates
            .values()
            .map(|candidate| candidate.tokens.len())
            .max()
            .unwrap_or(0);
        Ok(v1::GenerateResponse {
            candidates: collected
                .candidates
                .iter()
                .map(|(index, found)| found.to_proto(*index, tokenizer))
                .collect(),
            usage: Some(reply::usage(collected.usage)),
            timings: Some(reply::timings(collected.timings, longest)),
            effective: Some(self.asker.effective(&plan.held)),
            settings: Some(reply::settings(&plan.settings)),
            request_id: plan.id.to_string(),
        })
    }

    /// The events of a stream, in the contract's order: started, deltas, one finished a candidate, ended; each in the
    /// message that `chunk` makes of it.
    fn streamed<T: 'static>(
        &self,
        call: &Call,
        plan: Plan,
        operation: Operation,
        chunk: fn(v1::generate_chunk::Event) -> T,
    ) -> Result<Response<Chunks<T>>, Refusal> {
        let started = v1::StreamStarted {
            effective: Some(self.asker.effective(&plan.held)),
            settings: Some(reply::settings(&plan.settings)),
            request_id: plan.id.to_string(),
        };
        let events = self.submit(call, &plan, operation)?;
        let tokenizer = self.asker.shell.engine.model().tokenizer.clone();
        let first =
            futures::stream::once(async move { Ok(v1::generate_chunk::Event::Started(started)) });
        let held = plan.held;
        let all = first.chain(events.into_stream(tokenizer)).map(move |item| {
            // The tenant's place is given back when the stream ends.
            let _ = &held;
            item.map(chunk).map_err(Status::from)
        });
        Ok(Response::new(Box::pin(all)))
    }
}

/// Puts the profile's system prompt in front, unless the chat brings its own; says which one was put.
fn with_system(
    messages: Vec<Message>,
    profile: &espalier_adapters::profile::ServingProfile,
) -> (Vec<Message>, String) {
    let first = messages.first().map(|message| message.role.as_str());
    match profile.system_for(first) {
        None => (messages, String::new()),
        Some(system) => {
            let system = system.to_owned();
            let front = Message::new("system", system.clone());
            (std::iter::once(front).chain(messages).collect(), system)
        }
    }
}

fn generate_chunk(event: v1::generate_chunk::Event) -> v1::GenerateChunk {
    v1::GenerateChunk { event: Some(event) }
}

/// A chat's chunk is a generation's chunk under another name.
fn chat_chunk(event: v1::generate_chunk::Event) -> v1::ChatChunk {
    use v1::chat_chunk::Event as Chat;
    use v1::generate_chunk::Event as Generate;
    let event = match event {
        Generate::Started(started) => Chat::Started(started),
        Generate::Delta(delta) => Chat::Delta(delta),
        Generate::Finished(finished) => Chat::Finished(finished),
        Generate::Ended(ended) => Chat::Ended(ended),
    };
    v1::ChatChunk { event: Some(event) }
}

#[tonic::async_trait]
impl v1::inference_service_server::InferenceService for InferenceService {
    async fn generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<v1::GenerateResponse>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.answer_generate(&call, message).await?))
    }

    type StreamGenerateStream = Chunks<v1::GenerateChunk>;

    async fn stream_generate(
        &self,
        request: Request<v1::GenerateRequest>,
    ) -> Result<Response<Self::StreamGenerateStream>, Status> {
        let (call, message) = Call::of(request)?;
        let plan = self.plan_generate(&call, message).await?;
        Ok(self.streamed(&call, plan, Operation::Generate, generate_chunk)?)
    }

    async fn chat(
        &self,
        request: Request<v1::ChatRequest>,
    ) -> Result<Response<v1::ChatResponse>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.answer_chat(&call, message).await?))
    }

    type StreamChatStream = Chunks<v1::ChatChunk>;

    async fn stream_chat(
        &self,
        request: Request<v1::ChatRequest>,
    ) -> Result<Response<Self::StreamChatStream>, Status> {
        let (call, message) = Call::of(request)?;
        let plan = self.plan_chat(&call, message).await?;
        Ok(self.streamed(&call, plan, Operation::Chat, chat_chunk)?)
    }

    async fn classify(
        &self,
        request: Request<v1::ClassifyRequest>,
    ) -> Result<Response<v1::ClassifyResponse>, Status> {
        let (call, message) = Call::of(request)?;
        Ok(Response::new(self.answer_classify(&call, message).await?))
    }

    async fn embed(
        &self,
        request: Request<v1::EmbedRequest>,
    ) -> Result<Response<v1::EmbedResponse>, Status> {
        let (call, message) = Call::of(request)?;
        let limits = &self.asker.shell.config.limits;
        request::request_id(&message.request_id, limits)?;
        request::texts(&message.texts, limits)?;
        let pooling = request::pooling(message.pooling)?;
        let held = self.asker.resolve(&call, message.target).await?;
        let id = call.named(&message.request_id);
        let inputs = self.asker.encode_texts(message.texts).await?;
        let tokens: Vec<u32> = inputs.iter().map(|ids| count(ids.len())).collect();
        let kind = RequestKind::Embed {
            inputs,
            pooling,
            normalize: message.normalize.unwrap_or(true),
        };
        let collected = self
            .asker
            .submit(&call, &held, &id, kind, Operation::Embed)?
            .collect()
            .await?;
        let vectors = collected.embeddings()?;
        Ok(Response::new(v1::EmbedResponse {
            embeddings: vectors
                .into_iter()
                .zip(tokens)
                .map(|(values, tokens)| v1::Embedding { values, tokens })
                .collect(),
            usage: Some(reply::usage(collected.usage)),
            timings: Some(reply::timings(collected.timings, 0)),
            effective: Some(self.asker.effective(&held)),
            request_id: id.to_string(),
        }))
    }

    async fn score(
        &self,
        request: Request<v1::ScoreRequest>,
    ) -> Result<Response<v1::ScoreResponse>, Status> {
        let (call, message) = Call::of(request)?;
        let limits = &self.asker.shell.config.limits;
        request::request_id(&message.request_id, limits)?;
        let top = request::score_logprobs(message.logprobs, limits)?;
        let items = request::score_items(message.items, limits)?;
        let held = self.asker.resolve(&call, message.target).await?;
        let id = call.named(&message.request_id);
        let mut running = Vec::new();
        for kind in self.asker.scores(items).await? {
            running.push(
                self.asker
                    .submit(&call, &held, &id, kind, Operation::Score)?,
            );
        }
        let mut all = Collected::default();
        let mut results = Vec::new();
        let tokenizer = &self.asker.shell.engine.model().tokenizer;
        for events in running {
            let part = events.collect().await?;
            results.extend(
                part.scores()?
                    .into_iter()
                    .map(|tokens| reply::score(&tokens, top, tokenizer)),
            );
            all.add(&part);
        }
        Ok(Response::new(v1::ScoreResponse {
            results,
            usage: Some(reply::usage(all.usage)),
            timings: Some(reply::timings(all.timings, 0)),
            effective: Some(self.asker.effective(&held)),
            request_id: id.to_string(),
        }))
    }

    async fn tokenize(
        &self,
        request: Request<v1::TokenizeRequest>,
    ) -> Result<Response<v1::TokenizeResponse>, Status> {
        use v1::tokenize_request::Input;
        let (call, message) = Call::of(request)?;
        let limits = &self.asker.shell.config.limits;
        let held = self.asker.resolve(&call, message.target).await?;
        let token_ids = match message.input {
            None => {
                return Err(Refusal::invalid_field("input", "is missing; set text or chat").into());
            }
            Some(Input::Text(text)) => {
                request::one_text("text", &text, limits)?;
                self.asker
                    .encode_raw(text, message.parse_control_tokens.unwrap_or(true))
                    .await?
            }
            Some(Input::Chat(given)) => {
                let messages = chat::messages(given.messages, limits)?;
                let (messages, _) = with_system(messages, &held.profile());
                let offer = chat::offer(given.tools, None, limits)?;
                if let Some(offer) = &offer {
                    self.asker.tool_use(offer)?;
                }
                let tools = offer.map(|offer| offer.tools).unwrap_or_default();
                self.asker
                    .encode_chat(messages, tools, given.add_generation_prompt.unwrap_or(true))
                    .await?
            }
        };
        let tokenizer = &self.asker.shell.engine.model().tokenizer;
        Ok(Response::new(v1::TokenizeResponse {
            pieces: token_ids
                .iter()
                .map(|id| reply::piece(tokenizer, *id))
                .collect(),
            token_ids,
            context_length: count(self.asker.context()),
        }))
    }

    async fn detokenize(
        &self,
        request: Request<v1::DetokenizeRequest>,
    ) -> Result<Response<v1::DetokenizeResponse>, Status> {
        let (call, message) = Call::of(request)?;
        call.principal.authorize_base().map_err(Refusal::from)?;
        let text = self
            .asker
            .decode(
                message.token_ids,
                message.skip_control_tokens.unwrap_or(false),
            )
            .await?;
        Ok(Response::new(v1::DetokenizeResponse { text }))
    }

    type BatchGenerateStream = Chunks<v1::BatchGenerateResponse>;

    async fn batch_generate(
        &self,
        request: Request<Streaming<v1::BatchGenerateRequest>>,
    ) -> Result<Response<Self::BatchGenerateStream>, Status> {
        let (call, items) = Call::of(request)?;
        Ok(Response::new(batch::answer(self.clone(), call, items)))
    }

    type BatchClassifyStream = Chunks<v1::BatchClassifyResponse>;

    async fn batch_classify(
        &self,
        request: Request<Streaming<v1::BatchClassifyRequest>>,
    ) -> Result<Response<Self::BatchClassifyStream>, Status> {
        let (call, items) = Call::of(request)?;
        Ok(Response::new(batch::answer(self.clone(), call, items)))
    }
}
