//! `ModelService`: what is served here, what it can do, where its limits are, and how the server is doing.

use std::time::{SystemTime, UNIX_EPOCH};

use espalier_adapters::config::Site;
use espalier_proto::v1;
use sha2::{Digest, Sha256};
use tonic::{Request, Response, Status};

use super::{Call, Shell};
use crate::build;
use crate::convert::count;
use crate::shutdown::Phase;
use crate::status::Refusal;

/// The service.
#[derive(Clone)]
pub(crate) struct ModelService {
    shell: Shell,
    started: SystemTime,
    keys_needed: std::sync::Arc<dyn Fn() -> bool + Send + Sync>,
}

impl ModelService {
    /// `keys_needed` tells whether calls need a key at this moment; the first key that is made changes it.
    pub(crate) fn new(
        shell: Shell,
        keys_needed: impl Fn() -> bool + Send + Sync + 'static,
    ) -> Self {
        ModelService {
            shell,
            started: SystemTime::now(),
            keys_needed: std::sync::Arc::new(keys_needed),
        }
    }

    fn model(&self) -> v1::Model {
        let info = self.shell.engine.model();
        let shape = &info.config;
        let mut capabilities = vec![
            v1::Capability::Generate,
            v1::Capability::Classify,
            v1::Capability::Embed,
            v1::Capability::Score,
            v1::Capability::Train,
        ];
        if info.template.is_some() {
            capabilities.push(v1::Capability::Chat);
        }
        v1::Model {
            name: self.shell.base.name.clone(),
            digest: info.digest.clone(),
            family: shape.family.as_str().to_owned(),
            dtype: info.dtype.to_string(),
            weight_bytes: info.formats.bytes() as u64,
            device: "cpu".to_owned(),
            parameters: parameters(shape),
            shape: Some(v1::ModelShape {
                layers: count(shape.layers),
                hidden: count(shape.hidden),
                intermediate: count(shape.intermediate),
                heads: count(shape.heads),
                kv_heads: count(shape.kv_heads),
                head_dim: count(shape.head_dim),
                vocab: count(shape.vocab),
                tied_embeddings: shape.tie_embeddings,
            }),
            capabilities: capabilities.into_iter().map(i32::from).collect(),
            limits: Some(self.limits()),
            target_modules: Site::ALL
                .iter()
                .map(|site| site.module().to_owned())
                .collect(),
            chat_template_digest: info
                .template
                .as_ref()
                .map(|template| hex::encode(Sha256::digest(template.source().as_bytes())))
                .unwrap_or_default(),
        }
    }

    fn limits(&self) -> v1::ModelLimits {
        let config = &self.shell.config;
        v1::ModelLimits {
            context_length: count(self.shell.engine.model().max_sequence_tokens),
            default_max_tokens: count(config.limits.default_max_tokens),
            max_candidates: config.limits.max_candidates,
            max_stop_strings: count(config.limits.max_stop_strings),
            max_top_logprobs: config.limits.max_logprobs,
            max_inputs: count(config.limits.max_inputs),
            max_labels: count(config.limits.max_labels),
            max_rank: count(config.adapters.max_rank),
            max_adapter_bytes: config.adapters.max_adapter_bytes.0,
            max_dataset_bytes: config.training.max_dataset_bytes.0,
            max_inline_data_bytes: config.limits.max_message_bytes.0,
            max_chunk_bytes: u32::try_from(config.adapters.max_chunk_bytes.0).unwrap_or(u32::MAX),
        }
    }
}

/// Parameters of the decoder: embedding, blocks, final norm, and the head where it is not the embedding again.
fn parameters(shape: &espalier_engine::model::config::ModelConfig) -> u64 {
    let (hidden, heads, kv) = (
        shape.hidden,
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
    );
    let attention = hidden * heads + 2 * hidden * kv + heads * hidden;
    let biases = if shape.qkv_bias { heads + 2 * kv } else { 0 };
    let qk_norms = if shape.qk_norm { 2 * shape.head_dim } else { 0 };
    let block = attention + biases + qk_norms + 3 * hidden * shape.intermediate + 2 * hidden;
    let tables = if shape.tie_embeddings { 1 } else { 2 };
    (tables * shape.vocab * hidden + shape.layers * block + hidden) as u64
}

#[tonic::async_trait]
impl v1::model_service_server::ModelService for ModelService {
    async fn get_model(
        &self,
        request: Request<v1::GetModelRequest>,
    ) -> Result<Response<v1::Model>, Status> {
        let (call, message) = Call::of(request)?;
        call.principal.authorize_base().map_err(Refusal::from)?;
        if !message.name.starts_with("models/") {
            let why = format!(
                "\"{}\" is not a model's name; expected models/{{m}}",
                message.name.escape_default()
            );
            return Err(Refusal::invalid_field("name", why).into());
        }
        if message.name != self.shell.base.name {
            return Err(Refusal::not_found("MODEL_NOT_FOUND", "model", message.name).into());
        }
        Ok(Response::new(self.model()))
    }

    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        let (call, message) = Call::of(request)?;
        call.principal.authorize_base().map_err(Refusal::from)?;
        if message.page_size < 0 {
            return Err(Refusal::invalid_field(
                "page_size",
                format!("{} is below 0", message.page_size),
            )
            .into());
        }
        if !message.page_token.is_empty() {
            return Err(Refusal::invalid_field(
                "page_token",
                "is not from this list, which has one page",
            )
            .into());
        }
        Ok(Response::new(v1::ListModelsResponse {
            models: vec![self.model()],
            next_page_token: String::new(),
        }))
    }

    async fn get_server_info(
        &self,
        request: Request<v1::GetServerInfoRequest>,
    ) -> Result<Response<v1::ServerInfo>, Status> {
        let (call, _) = Call::of(request)?;
        call.principal.authorize_base().map_err(Refusal::from)?;
        let stats = self.shell.engine.stats();
        let state = match self.shell.lifecycle.phase() {
            Phase::Starting => v1::ServerState::Starting,
            Phase::Serving => v1::ServerState::Serving,
            Phase::LameDuck | Phase::Draining | Phase::Cut => v1::ServerState::Draining,
        };
        // The first call reads the program's file.
        let build = tokio::task::spawn_blocking(build::describe).await;
        let started = self.started.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Response::new(v1::ServerInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            state: state.into(),
            start_time: Some(prost_types::Timestamp {
                seconds: i64::try_from(started.as_secs()).unwrap_or(i64::MAX),
                nanos: started.subsec_nanos() as i32,
            }),
            base_model: self.shell.base.name.clone(),
            dtype: self.shell.engine.model().dtype.to_string(),
            weight_bytes: self.shell.engine.model().formats.bytes() as u64,
            authentication_required: (self.keys_needed)(),
            requests_running: count(stats.running),
            requests_waiting: count(stats.waiting.max(stats.queued_requests)),
            kv_cache_usage: stats.kv_blocks_used as f64 / stats.kv_blocks.max(1) as f64,
            adapters_resident: count(stats.adapters_resident),
            adapter_bytes_used: stats.adapter_bytes_used as u64,
            adapter_bytes_budget: stats.adapter_bytes as u64,
            jobs_running: count(stats.training_jobs),
            jobs_queued: 0,
            build: build.unwrap_or_default().to_owned(),
            configuration: self.shell.config.of_serving(),
        }))
    }
}
