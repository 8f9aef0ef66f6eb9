//! `espalier status`: what the server is, has and does.

use clap::Args;
use serde_json::{Value, json};

use crate::{
    cli::{
        Session, json,
        output::{Failure, Out, age, bytes},
    },
    v1,
};

/// What the server is, has and does.
#[derive(Debug, Args)]
pub(crate) struct Status {}

impl Status {
    pub(crate) async fn run(self, session: &Session) -> Result<(), Failure> {
        let Session { client, out } = session;
        let info = client.server_info().await?;
        let models = client
            .list_models(v1::ListModelsRequest::default())
            .await?
            .models;
        if out.is_json() {
            let models: Vec<Value> = models.iter().map(json::value).collect();
            return out.json_document(&json!({"server": json::value(&info), "models": models}));
        }
        print_server(*out, &info)?;
        for model in &models {
            print_model(*out, model)?;
        }
        Ok(())
    }
}

fn print_server(out: Out, info: &v1::ServerInfo) -> Result<(), Failure> {
    let state = info
        .state()
        .as_str_name()
        .trim_start_matches("SERVER_STATE_")
        .to_lowercase();
    let keys = if info.authentication_required {
        "keys needed"
    } else {
        "no keys needed"
    };
    out.line(format_args!(
        "server    espalierd {} {state}, started {}, {keys}",
        info.version,
        age(info.start_time.as_ref())
    ))?;
    out.line(format_args!(
        "requests  {} running, {} waiting, KV cache {:.0} % used",
        info.requests_running,
        info.requests_waiting,
        info.kv_cache_usage * 100.0
    ))?;
    out.line(format_args!(
        "adapters  {} in memory, {} of {}",
        info.adapters_resident,
        bytes(info.adapter_bytes_used),
        bytes(info.adapter_bytes_budget)
    ))?;
    out.line(format_args!(
        "jobs      {} training, {} queued",
        info.jobs_running, info.jobs_queued
    ))
}

fn print_model(out: Out, model: &v1::Model) -> Result<(), Failure> {
    let shape = model.shape.unwrap_or_default();
    #[allow(clippy::cast_precision_loss, reason = "millions are shown")]
    let millions = model.parameters as f64 / 1e6;
    out.line(format_args!(
        "model     {} ({}, {millions:.0}M parameters, {} layers x {}) in {} on {}",
        model.name, model.family, shape.layers, shape.hidden, model.dtype, model.device
    ))?;
    out.line(format_args!("          digest {}", model.digest))?;
    let capabilities = model.capabilities();
    let names = capabilities.map(|c| {
        c.as_str_name()
            .trim_start_matches("CAPABILITY_")
            .to_lowercase()
    });
    out.line(format_args!(
        "          can {}",
        names.collect::<Vec<_>>().join(", ")
    ))?;
    let limits = model.limits.unwrap_or_default();
    out.line(format_args!(
        "          context {} tokens, rank up to {}, n up to {}",
        limits.context_length, limits.max_rank, limits.max_candidates
    ))
}
