//! The way to the engine: from a message's target to a resolved version, from texts to ids, from both to a running
//! request. Long texts are tokenised on the blocking threads, so that one caller's novel does not stop the others.

use std::sync::Arc;

use espalier_adapters::profile::ServingProfile;
use espalier_adapters::text::{Message, TextError, Tokenizer, Tool, ToolFormat, encode_chat};
use espalier_engine::constraint::{Constraint, ConstraintSource};
use espalier_engine::error::EngineError;
use espalier_engine::request::{Generate, Priority, Request, RequestKind, TargetVersion};
use espalier_proto::v1;
use tonic::Code;

use super::answer::{Events, Operation};
use super::tools::ToolUse;
use crate::convert::chat::Offer;
use crate::convert::request::{Prompt, Settings, Target, fits, target};
use crate::convert::{Faults, reply};
use crate::middleware::{ItemPermit, TenantPermit};
use crate::registry::ResolvedVersion;
use crate::services::{Call, Shell};
use crate::status::Refusal;

/// Texts of more bytes than this are tokenised elsewhere: about a millisecond of work.
const LONG_TEXT_BYTES: usize = 16 * 1024;
/// Whom the work of callers without a tenant counts for; no tenant can have this name.
const NOBODY: &str = "-";

/// Shared by all calls.
#[derive(Clone)]
pub(super) struct Asker {
    pub(super) shell: Shell,
}

/// What a call resolved, held until its end.
pub(super) struct Held {
    /// Those that answer, with their weights, in the request's order; none is the base.
    pub(super) versions: Vec<(Arc<ResolvedVersion>, f32)>,
    tenant: Arc<str>,
    _place: Place,
}

/// Where a request was counted, given back when it ends: at the gate (then nothing here), as a call, as a bulk item.
#[derive(Default)]
struct Place {
    _call: Option<TenantPermit>,
    _item: Option<ItemPermit>,
}

/// A generation that is ready to be submitted.
pub(super) struct Plan {
    pub(super) held: Held,
    pub(super) prompt: Vec<u32>,
    pub(super) settings: Settings,
    pub(super) constraint: Option<Constraint>,
    pub(super) tools: Option<ToolUse>,
    pub(super) id: Arc<str>,
}

/// A classification that is ready to be submitted.
pub(super) struct Labelling {
    pub(super) held: Held,
    pub(super) id: Arc<str>,
    pub(super) kind: RequestKind,
    pub(super) method: v1::ClassifyMethod,
}

impl Plan {
    /// A plan without tools and constraint, which come when they are known.
    pub(super) fn new(held: Held, prompt: Vec<u32>, settings: Settings, id: Arc<str>) -> Self {
        Plan {
            held,
            prompt,
            settings,
            constraint: None,
            tools: None,
            id,
        }
    }

    /// What the engine is asked for.
    pub(super) fn kind(&self) -> RequestKind {
        RequestKind::Generate(Generate {
            prompt: self.prompt.clone(),
            sampling: self.settings.sampling.clone(),
            stop: self.settings.stop.clone(),
            logprobs: self.settings.logprobs,
            constraint: self.constraint.clone(),
        })
    }
}

impl Held {
    /// The version that leads a mixture: its serving profile holds. The base has none.
    fn first(&self) -> Option<&ResolvedVersion> {
        self.versions.first().map(|(version, _)| version.as_ref())
    }

    /// The first version's serving profile; the base has none.
    pub(super) fn profile(&self) -> ServingProfile {
        self.first()
            .map(|version| version.profile.clone())
            .unwrap_or_default()
    }

    /// The labels of the one head among the versions; empty without any.
    ///
    /// # Errors
    /// Two heads answer nothing together.
    fn labels(&self) -> Result<&[String], Refusal> {
        let mut heads = self
            .versions
            .iter()
            .filter(|(version, _)| !version.labels.is_empty());
        let Some((first, _)) = heads.next() else {
            return Ok(&[]);
        };
        if let Some((second, _)) = heads.next() {
            let why = format!(
                "{} and {} both have a classification head; a mixture answers with one, so name one adapter that has a head",
                first.name, second.name
            );
            return Err(Refusal::invalid_field("target.adapters", why));
        }
        Ok(&first.labels)
    }
}

impl Call {
    /// The call's name in reply and engine: the message's own, else the header's or the drawn one.
    pub(super) fn named(&self, given: &str) -> Arc<str> {
        if given.is_empty() {
            self.id.clone()
        } else {
            Arc::from(given)
        }
    }
}

impl Asker {
    pub(super) fn new(shell: Shell) -> Self {
        Asker { shell }
    }

    /// Tokens that one sequence may have, prompt and output.
    pub(super) fn context(&self) -> usize {
        self.shell.engine.model().max_sequence_tokens
    }

    fn tokenizer(&self) -> Arc<Tokenizer> {
        Arc::clone(&self.shell.engine.model().tokenizer)
    }

    pub(super) fn effective(&self, held: &Held) -> v1::EffectiveTarget {
        reply::effective(&self.shell.base, &held.versions)
    }

    /// Checks the caller's right, takes its tenant's place and fixes the version for the call's life.
    ///
    /// # Errors
    /// An unknown adapter is NOT_FOUND, one made for another base is ADAPTER_INCOMPATIBLE; never the base instead.
    pub(super) async fn resolve(
        &self,
        call: &Call,
        message: Option<v1::InferenceTarget>,
    ) -> Result<Held, Refusal> {
        let Target { adapters, tenant } = target(message, &call.principal)?;
        let tenant = tenant.map_or_else(|| Arc::from(NOBODY), |tenant| Arc::from(tenant.as_str()));
        let place = self.place(call, &tenant).await?;
        let mut versions: Vec<(Arc<ResolvedVersion>, f32)> = Vec::with_capacity(adapters.len());
        for (index, (reference, weight)) in adapters.iter().enumerate() {
            let registry = &self.shell.registry;
            let version = registry.resolve(&call.principal, reference).await?;
            self.fits_base(&version)?;
            if versions
                .iter()
                .any(|(named, _)| named.digest == version.digest)
            {
                let why = format!(
                    "is {} again, by another name or the same; add its weights",
                    version.name
                );
                let field = format!("target.adapters[{index}].adapter");
                return Err(Refusal::invalid_field(field, why));
            }
            versions.push((version, *weight));
        }
        for (version, _) in &versions {
            let engine = &self.shell.engine;
            engine.set_merge_policy(version.digest, version.merge_policy);
        }
        Ok(Held {
            versions,
            tenant,
            _place: place,
        })
    }

    fn fits_base(&self, version: &ResolvedVersion) -> Result<(), Refusal> {
        if version.base_digest == self.shell.base.digest {
            return Ok(());
        }
        let message = format!(
            "{} was made for another base model than the one served here",
            version.name
        );
        Err(
            Refusal::new(Code::FailedPrecondition, "ADAPTER_INCOMPATIBLE", message)
                .with("adapter_version", &version.name)
                .with("expected", &self.shell.base.digest)
                .with("found", &version.base_digest),
        )
    }

    /// A tenant's own key was counted at the gate; a service's call is counted here, where its tenant is known, and a
    /// bulk item whoever sent it. Callers without a tenant are not counted by tenant.
    async fn place(&self, call: &Call, tenant: &str) -> Result<Place, Refusal> {
        let gate = &self.shell.gate;
        let mut place = Place::default();
        match call.priority {
            _ if !call.counted => {}
            Priority::Bulk => place._item = Some(gate.enter_item(tenant).await),
            Priority::Interactive if call.principal.tenant().is_some() || tenant == NOBODY => {}
            Priority::Interactive => place._call = Some(gate.enter_tenant(tenant)?),
        }
        Ok(place)
    }

    /// A request as the engine takes it.
    fn request(&self, call: &Call, held: &Held, id: &str, kind: RequestKind) -> Request {
        Request {
            id: id.to_owned(),
            tenant: Arc::clone(&held.tenant),
            priority: call.priority,
            target: held
                .versions
                .iter()
                .map(|(version, weight)| TargetVersion {
                    digest: version.digest,
                    weight: *weight,
                })
                .collect(),
            require_resident: false,
            kind,
            deadline: call.deadline,
            received: call.received,
        }
    }

    /// Asks the engine whether it would take a request.
    pub(super) fn check(
        &self,
        call: &Call,
        held: &Held,
        id: &str,
        kind: RequestKind,
    ) -> Result<(), Refusal> {
        let request = self.request(call, held, id, kind);
        let checked = self.shell.engine.check(&request);
        checked.map_err(|error| refused(error, held))
    }

    /// Hands a request over to the engine.
    pub(super) fn submit(
        &self,
        call: &Call,
        held: &Held,
        id: &str,
        kind: RequestKind,
        operation: Operation,
    ) -> Result<Events, Refusal> {
        let request = self.request(call, held, id, kind);
        match self.shell.engine.submit(request) {
            Ok(events) => {
                let (model, wait) = (
                    &self.shell.base.name,
                    self.shell.config.engine.max_queue_wait,
                );
                Ok(Events::new(events, call, operation, model, wait))
            }
            Err(error) => Err(refused(error, held)),
        }
    }

    /// What the output must match, compiled; waits for it no longer than the call's deadline.
    pub(super) async fn compile(
        &self,
        call: &Call,
        held: &Held,
        source: Option<ConstraintSource>,
    ) -> Result<Option<Constraint>, Refusal> {
        let Some(source) = source else {
            return Ok(None);
        };
        let compiled = self.shell.engine.compile_constraint(&held.tenant, source);
        let result = match call.deadline {
            None => compiled.await,
            Some(deadline) => match tokio::time::timeout_at(deadline.into(), compiled).await {
                Ok(result) => result,
                Err(_) => Err(EngineError::DeadlineInQueue {
                    waited_ms: u64::try_from(call.received.elapsed().as_millis())
                        .unwrap_or(u64::MAX),
                }),
            },
        };
        Ok(Some(result?))
    }

    /// A prompt's ids, with BOS only if the tokenizer adds it.
    pub(super) async fn encode(
        &self,
        field: &'static str,
        prompt: Prompt,
    ) -> Result<Vec<u32>, Refusal> {
        let ids = match prompt {
            Prompt::Ids(ids) => ids,
            Prompt::Text(text) => self.encode_raw(text, true).await?,
        };
        if ids.is_empty() {
            return Err(Refusal::invalid_field(
                field,
                "is empty; at least one token is needed",
            ));
        }
        self.prompt_limit(field, ids.len())?;
        Ok(ids)
    }

    fn prompt_limit(&self, field: &str, tokens: usize) -> Result<(), Refusal> {
        let limit = self.shell.config.limits.max_prompt_tokens;
        if limit > 0 && tokens > limit {
            return Err(Refusal::over_limit(
                field,
                format!("{tokens} tokens"),
                format!("{limit} tokens"),
            ));
        }
        fits(tokens, self.context())
    }

    /// Raw text; with `parse` control tokens written in it become control tokens.
    pub(super) async fn encode_raw(&self, text: String, parse: bool) -> Result<Vec<u32>, Refusal> {
        let tokenizer = self.tokenizer();
        off_thread(text.len(), move || {
            if parse {
                tokenizer.encode(&text)
            } else {
                tokenizer.encode_plain(&text)
            }
        })
        .await?
        .map_err(|error| text_refusal("text", &error))
    }

    /// The texts of Classify and Embed; each must fit a sequence, nothing is cut.
    pub(super) async fn encode_texts(&self, texts: Vec<String>) -> Result<Vec<Vec<u32>>, Refusal> {
        let tokenizer = self.tokenizer();
        let bytes = texts.iter().map(String::len).sum();
        let encoded = off_thread(bytes, move || {
            texts
                .iter()
                .map(|text| tokenizer.encode(text))
                .collect::<Vec<_>>()
        })
        .await?;
        let mut all = Vec::with_capacity(encoded.len());
        for (index, ids) in encoded.into_iter().enumerate() {
            let field = format!("texts[{index}]");
            let ids = ids.map_err(|error| text_refusal(&field, &error))?;
            self.prompt_limit(&field, ids.len())?;
            all.push(ids);
        }
        Ok(all)
    }

    /// A conversation's ids, with the tools that it offers, by the model's template.
    ///
    /// # Errors
    /// UNIMPLEMENTED when there is none.
    pub(super) async fn encode_chat(
        &self,
        messages: Vec<Message>,
        tools: Vec<Tool>,
        open: bool,
    ) -> Result<Vec<u32>, Refusal> {
        let template = self.shell.engine.model().template.clone();
        let template = template.ok_or_else(no_template)?;
        let tokenizer = self.tokenizer();
        let described = tools
            .iter()
            .map(|tool| tool.description.len())
            .sum::<usize>();
        let said = messages
            .iter()
            .map(|message| message.content.len())
            .sum::<usize>();
        let ids = off_thread(described + said, move || {
            encode_chat(&tokenizer, &template, &messages, &tools, open)
        })
        .await?
        .map_err(|error| text_refusal("messages", &error))?;
        self.prompt_limit("messages", ids.len())?;
        Ok(ids)
    }

    /// How the model's template has tools used.
    ///
    /// # Errors
    /// UNIMPLEMENTED, naming what the template lacks: what it does not render, the model would never see.
    pub(super) fn tool_use(&self, offer: &Offer) -> Result<ToolUse, Refusal> {
        let model = self.shell.engine.model();
        let template = model.template.as_ref().ok_or_else(no_template)?;
        let format = ToolFormat::of(template.source()).map_err(|lacks| {
            let message = format!("tools: this model cannot be given any: {lacks}");
            Refusal::new(Code::Unimplemented, "UNSUPPORTED_BY_MODEL", message)
                .with("feature", "tools")
        })?;
        Ok(ToolUse::new(format, offer, &model.tokenizer))
    }

    /// How Classify answers: the one head among the versions, else the likelihood of the request's labels, else of the profile's.
    pub(super) async fn classification(
        &self,
        held: &Held,
        texts: Vec<String>,
        asked: Vec<String>,
    ) -> Result<(RequestKind, v1::ClassifyMethod), Refusal> {
        let own = held.labels()?;
        if !own.is_empty() {
            if !asked.is_empty() && !same_set(own, &asked) {
                let why = format!(
                    "are not the labels of the adapter's head ({}); leave them out",
                    own.join(", ")
                );
                return Err(Refusal::invalid_field("labels", why));
            }
            let inputs = self.encode_texts(texts).await?;
            return Ok((RequestKind::Classify { inputs }, v1::ClassifyMethod::Head));
        }
        let profile = held.profile();
        let labels = if asked.is_empty() {
            profile.labels.clone().unwrap_or_default()
        } else {
            asked
        };
        if labels.len() < 2 {
            let why = "the target has no classification head and no labels; name at least 2 labels, or an adapter with a head";
            return Err(Refusal::invalid_field("labels", why));
        }
        let tokenizer = self.tokenizer();
        let mut label_tokens = Vec::with_capacity(labels.len());
        let mut faults = Faults::default();
        for (index, label) in labels.iter().enumerate() {
            match tokenizer.encode_plain(label) {
                Ok(ids) if !ids.is_empty() => label_tokens.push(ids),
                Ok(_) => faults.add(format!("labels[{index}]"), "has no tokens"),
                Err(error) => faults.add(format!("labels[{index}]"), error.to_string()),
            }
        }
        faults.finish()?;
        let texts = texts.iter().map(|text| profile.raw_prompt(text)).collect();
        let prompts = self.encode_texts(texts).await?;
        let longest = label_tokens.iter().map(Vec::len).max().unwrap_or(0);
        for prompt in &prompts {
            fits(prompt.len() + longest, self.context())?;
        }
        Ok((
            RequestKind::LabelLikelihood {
                prompts,
                labels,
                label_tokens,
            },
            v1::ClassifyMethod::Likelihood,
        ))
    }

    /// Score's items as engine requests: one for each run of items with the same context, which is computed once.
    pub(super) async fn scores(
        &self,
        items: Vec<(Option<Prompt>, Prompt)>,
    ) -> Result<Vec<RequestKind>, Refusal> {
        let opening = self.encode_raw(String::new(), true).await?;
        let mut runs: Vec<(Vec<u32>, Vec<Vec<u32>>)> = Vec::new();
        for (index, (context, continuation)) in items.into_iter().enumerate() {
            let context = match context {
                Some(Prompt::Text(text)) => self.encode_raw(text, true).await?,
                Some(Prompt::Ids(ids)) => ids,
                None if opening.is_empty() => {
                    let why = "is empty and this tokenizer adds no BOS; the first token needs something before it";
                    return Err(Refusal::invalid_field(
                        format!("items[{index}].context"),
                        why,
                    ));
                }
                None => opening.clone(),
            };
            let continuation = match continuation {
                Prompt::Ids(ids) => ids,
                // What the tokenizer puts in front of a text belongs to the context, not to its continuation.
                Prompt::Text(text) => {
                    let ids = self.encode_raw(text, true).await?;
                    ids.strip_prefix(opening.as_slice())
                        .map(<[u32]>::to_vec)
                        .unwrap_or(ids)
                }
            };
            if continuation.is_empty() {
                return Err(Refusal::invalid_field(
                    format!("items[{index}].continuation"),
                    "has no tokens",
                ));
            }
            fits(context.len() + continuation.len(), self.context())?;
            match runs.last_mut() {
                Some((last, continuations)) if *last == context => continuations.push(continuation),
                _ => runs.push((context, vec![continuation])),
            }
        }
        Ok(runs
            .into_iter()
            .map(|(prompt, continuations)| RequestKind::Score {
                prompt,
                continuations,
            })
            .collect())
    }

    /// Ids to text.
    pub(super) async fn decode(
        &self,
        ids: Vec<u32>,
        skip_control: bool,
    ) -> Result<String, Refusal> {
        let tokenizer = self.tokenizer();
        off_thread(ids.len() * 4, move || tokenizer.decode(&ids, skip_control))
            .await?
            .map_err(|error| text_refusal("token_ids", &error))
    }
}

fn same_set(own: &[String], asked: &[String]) -> bool {
    own.len() == asked.len() && own.iter().all(|label| asked.contains(label))
}

/// Runs work whose cost grows with `bytes` where it does not stop other calls.
async fn off_thread<T: Send + 'static>(
    bytes: usize,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Refusal> {
    if bytes <= LONG_TEXT_BYTES {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Refusal::internal(format!("a tokenising thread failed: {error}")))
}

fn text_refusal(field: &str, error: &TextError) -> Refusal {
    Refusal::invalid_field(field, error.to_string())
}

fn no_template() -> Refusal {
    let message = "the base model has no chat template; use Generate";
    Refusal::new(Code::Unimplemented, "UNSUPPORTED_BY_MODEL", message).with("feature", "chat")
}

/// The engine knows a version by its digest; a reply names it as the client knows it.
fn refused(error: EngineError, held: &Held) -> Refusal {
    let refusal = Refusal::from(error);
    let names = held
        .versions
        .iter()
        .map(|(version, _)| version.name.to_string());
    match names.collect::<Vec<_>>().join(", ") {
        names if names.is_empty() => refusal,
        names => refusal.with("adapter_version", names),
    }
}
