//! Calls of an Espalier server: generated stubs over several connections, one attempt each, the
//! messages of a stream counted as they come.

use std::{collections::BTreeMap, time::Duration};

use serde_json::{Value, json};

use crate::{
    bench::{
        prompt::{WORDS, Words},
        target::{Clock, Refusal, Reply, ServerTimes, Tokens},
        workload::{Call, Input, Operation, Tenant},
    },
    client::{Client, ClientConfig, MAX_REPLY_BYTES},
    error::Error,
    retry::RetryPolicy,
    v1::{
        self, chat_chunk, generate_chunk, inference_service_client::InferenceServiceClient,
        tokenize_request,
    },
};

/// How the server is reached, and on whose behalf.
#[derive(Clone, Debug)]
pub(crate) struct Access {
    pub(crate) endpoint: String,
    /// The key of tenants that have none of their own.
    pub(crate) key: Option<String>,
    /// Keys by tenant.
    pub(crate) keys: BTreeMap<String, String>,
    pub(crate) connections: usize,
    /// Of one call.
    pub(crate) timeout: Duration,
}

/// How requests are sampled.
#[derive(Clone, Debug, Default)]
pub(crate) struct Sampling {
    pub(crate) temperature: Option<f32>,
    pub(crate) ignore_eos: bool,
}

/// The server and everything about requests that does not change from one to the next.
#[derive(Debug)]
pub(crate) struct Espalier {
    pub(crate) tokens: Tokens,
    endpoint: String,
    /// By connection, then by tenant.
    lanes: Vec<Vec<Client>>,
    /// By tenant: the base, then its adapters.
    targets: Vec<Vec<v1::InferenceTarget>>,
    labels: Vec<String>,
    sampling: Sampling,
    timeout: Duration,
}

/// A client that makes every call once: a load tester that tries again hides what it measures.
fn config(access: &Access, tenant: &str) -> ClientConfig {
    let mut config = ClientConfig::new(&access.endpoint);
    config.api_key = access.keys.get(tenant).or(access.key.as_ref()).cloned();
    config.tenant = (!tenant.is_empty()).then(|| tenant.to_owned());
    config.timeouts.generate = access.timeout;
    config.timeouts.inference = access.timeout;
    config.retry = RetryPolicy {
        max_attempts: 1,
        ..RetryPolicy::default()
    };
    config
}

// === impl Espalier ===

impl Espalier {
    /// Opens the connections; all of them are up before the first request.
    pub(crate) async fn connect(
        access: &Access,
        tenants: &[Tenant],
        labels: Vec<String>,
        sampling: Sampling,
    ) -> Result<Self, Error> {
        let mut lanes = Vec::new();
        for _ in 0..access.connections {
            let first = Client::connect(config(access, &tenants[0].name)).await?;
            let mut lane = Vec::new();
            for tenant in tenants {
                let config = config(access, &tenant.name);
                lane.push(Client::with_channel(first.channel(), config)?);
            }
            lanes.push(lane);
        }
        let targets_of = |(client, tenant): (&Client, &Tenant)| {
            let names = tenant.adapters.iter().map(|name| Some(name.as_str()));
            let all = std::iter::once(None).chain(names);
            all.map(|name| client.target(name))
                .collect::<Result<Vec<_>, _>>()
        };
        let targets = lanes[0].iter().zip(tenants).map(targets_of);
        Ok(Self {
            tokens: Tokens::default(),
            endpoint: access.endpoint.clone(),
            targets: targets.collect::<Result<_, _>>()?,
            lanes,
            labels,
            sampling,
            timeout: access.timeout,
        })
    }

    pub(crate) fn connections(&self) -> usize {
        self.lanes.len()
    }

    /// The client of a tenant, for what is not part of the measured load.
    pub(crate) fn client(&self, tenant: usize) -> &Client {
        &self.lanes[0][tenant]
    }

    /// What each word costs by the server's tokenizer.
    pub(crate) async fn words(&self) -> Result<Words, Error> {
        let client = self.client(0);
        let ask = |input| {
            let request = v1::TokenizeRequest {
                target: self.targets[0].first().cloned(),
                input: Some(input),
                parse_control_tokens: None,
            };
            async move { client.tokenize(request).await }
        };
        let text = |text: &str| tokenize_request::Input::Text(text.to_owned());
        let one = ask(text(WORDS[0])).await?.token_ids.len();
        let two = ask(text(&WORDS[0].repeat(2))).await?.token_ids.len();
        let word = two.saturating_sub(one);
        let around = one.saturating_sub(word);
        let all = ask(text(&WORDS.concat())).await?;
        let costs = Words::costs_of(all.pieces.get(around..).unwrap_or_default());
        let chat = tokenize_request::Input::Chat(v1::ChatInput {
            messages: vec![user(WORDS[0].to_owned())],
            ..v1::ChatInput::default()
        });
        // A model without a chat template costs nothing around a chat, for it has none.
        let chat = match ask(chat).await {
            Ok(reply) => reply.token_ids.len().saturating_sub(word),
            Err(_) => 0,
        };
        Ok(Words::new(costs, around as u32, chat as u32))
    }

    pub(crate) async fn describe(&self) -> Value {
        let client = self.client(0);
        let mut described = json!({"kind": "espalier", "address": self.endpoint});
        if let Ok(info) = client.server_info().await {
            described["info"] = crate::cli::json::value(&info);
        }
        if let Ok(page) = client.list_models(v1::ListModelsRequest::default()).await
            && let Some(model) = page.models.first()
        {
            described["model"] = crate::cli::json::value(model);
        }
        described
    }

    pub(crate) async fn send(&self, call: Call) -> Result<Reply, Refusal> {
        let work = async {
            match call.operation {
                Operation::Generate => self.generate(call).await,
                Operation::Chat => self.chat(call).await,
                Operation::Classify => self.classify(call).await,
                Operation::Embed => self.embed(call).await,
            }
        };
        match tokio::time::timeout(self.timeout, work).await {
            Ok(Ok(reply)) => Ok(reply),
            Ok(Err(status)) => Err(Error::from(*status).into()),
            Err(_) => Err(Refusal::deadline(self.timeout)),
        }
    }

    fn lane(&self, call: &Call) -> &Client {
        let lane = &self.lanes[(call.index % self.lanes.len() as u64) as usize];
        &lane[call.tenant]
    }

    fn stub(client: &Client) -> InferenceServiceClient<tonic::transport::Channel> {
        InferenceServiceClient::new(client.channel()).max_decoding_message_size(MAX_REPLY_BYTES)
    }

    fn target(&self, call: &Call) -> Option<v1::InferenceTarget> {
        let place = call.adapter.map_or(0, |adapter| adapter + 1);
        self.targets[call.tenant].get(place).cloned()
    }

    fn sampling(&self) -> Option<v1::SamplingParams> {
        Some(v1::SamplingParams {
            temperature: self.sampling.temperature,
            ..v1::SamplingParams::default()
        })
    }

    fn stop(&self, tokens: u32) -> Option<v1::StopConditions> {
        Some(v1::StopConditions {
            max_tokens: Some(tokens),
            ignore_eos: self.sampling.ignore_eos.then_some(true),
            ..v1::StopConditions::default()
        })
    }

    async fn generate(&self, call: Call) -> Result<Reply, Box<tonic::Status>> {
        use generate_chunk::Event;
        let client = self.lane(&call);
        let request = v1::GenerateRequest {
            target: self.target(&call),
            sampling: self.sampling(),
            stop: self.stop(call.output),
            input: Some(v1::generate_request::Input::Text(text(call.input))),
            ..v1::GenerateRequest::default()
        };
        let request = client.request(request, Some(self.timeout));
        let mut chunks = Self::stub(client)
            .stream_generate(request)
            .await?
            .into_inner();
        let mut clock = Clock::expecting(call.output);
        let mut ended = None;
        while let Some(chunk) = chunks.message().await? {
            match chunk.event {
                Some(Event::Delta(delta)) => self.tick(&mut clock, &delta),
                Some(Event::Ended(end)) => ended = Some(end),
                _ => {}
            }
        }
        reply(clock, ended)
    }

    async fn chat(&self, call: Call) -> Result<Reply, Box<tonic::Status>> {
        use chat_chunk::Event;
        let client = self.lane(&call);
        let request = v1::ChatRequest {
            target: self.target(&call),
            sampling: self.sampling(),
            stop: self.stop(call.output),
            messages: match call.input {
                Input::Messages(messages) => messages,
                Input::Text(text) => vec![user(text)],
            },
            ..v1::ChatRequest::default()
        };
        let request = client.request(request, Some(self.timeout));
        let mut chunks = Self::stub(client).stream_chat(request).await?.into_inner();
        let mut clock = Clock::expecting(call.output);
        let mut ended = None;
        while let Some(chunk) = chunks.message().await? {
            match chunk.event {
                Some(Event::Delta(delta)) => self.tick(&mut clock, &delta),
                Some(Event::Ended(end)) => ended = Some(end),
                _ => {}
            }
        }
        reply(clock, ended)
    }

    fn tick(&self, clock: &mut Clock, delta: &v1::TokenDelta) {
        if !delta.token_ids.is_empty() {
            clock.tick();
            self.tokens.add(delta.token_ids.len() as u64);
        }
    }

    async fn classify(&self, call: Call) -> Result<Reply, Box<tonic::Status>> {
        let client = self.lane(&call);
        let request = v1::ClassifyRequest {
            target: self.target(&call),
            texts: vec![text(call.input)],
            labels: self.labels.clone(),
            ..v1::ClassifyRequest::default()
        };
        let request = client.request(request, Some(self.timeout));
        let found = Self::stub(client).classify(request).await?.into_inner();
        Ok(answered(found.usage, found.timings))
    }

    async fn embed(&self, call: Call) -> Result<Reply, Box<tonic::Status>> {
        let client = self.lane(&call);
        let request = v1::EmbedRequest {
            target: self.target(&call),
            texts: vec![text(call.input)],
            ..v1::EmbedRequest::default()
        };
        let request = client.request(request, Some(self.timeout));
        let found = Self::stub(client).embed(request).await?.into_inner();
        Ok(answered(found.usage, found.timings))
    }
}

fn user(content: String) -> v1::ChatMessage {
    v1::ChatMessage {
        role: v1::Role::User.into(),
        content,
        ..v1::ChatMessage::default()
    }
}

fn text(input: Input) -> String {
    match input {
        Input::Text(text) => text,
        Input::Messages(messages) => {
            let contents: Vec<String> = messages.into_iter().map(|m| m.content).collect();
            contents.join("\n")
        }
    }
}

fn micros(duration: Option<prost_types::Duration>) -> Option<u32> {
    let duration = duration?;
    let whole = duration.seconds.checked_mul(1_000_000)?;
    u32::try_from(whole + i64::from(duration.nanos) / 1000).ok()
}

fn times(timings: Option<v1::Timings>) -> ServerTimes {
    let timings = timings.unwrap_or_default();
    ServerTimes {
        queue: micros(timings.queue),
        adapter_load: micros(timings.adapter_load),
        first_token: micros(timings.time_to_first_token),
        total: micros(timings.total),
    }
}

/// A reply in one message.
fn answered(usage: Option<v1::Usage>, timings: Option<v1::Timings>) -> Reply {
    let usage = usage.unwrap_or_default();
    Reply {
        input_tokens: usage.input_tokens,
        output_tokens: usage.output_tokens,
        cached_tokens: usage.cached_input_tokens,
        server: times(timings),
        ..Reply::default()
    }
}

/// A stream that has ended. Without its last message it is cut, whatever the status says.
fn reply(clock: Clock, ended: Option<v1::StreamEnded>) -> Result<Reply, Box<tonic::Status>> {
    let Some(ended) = ended else {
        let status = tonic::Status::data_loss("the stream ended before its last message");
        return Err(Box::new(status));
    };
    Ok(Reply {
        first: clock.first,
        last: clock.last,
        gaps: clock.gaps,
        ..answered(ended.usage, ended.timings)
    })
}
