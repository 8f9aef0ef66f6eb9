//! Logs and numbers: how they leave the process. What is recorded is decided where it happens; the shell's own metric
//! names stand here, the engine's in its `metrics`. Neither may carry a prompt, a text, a key, or (as a label of a
//! histogram) a tenant or an adapter: ten thousand tenants would be a million series.

use std::io::IsTerminal;

use metrics_exporter_prometheus::{BuildError, Matcher, PrometheusBuilder};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

use crate::config::Server;
use crate::setting::LogFormat;

/// The shell's metrics.
pub(crate) mod metric {
    /// Seconds from a call's headers to its last byte, by method and code.
    pub(crate) const RPC_DURATION: &str = "rpc_server_call_duration_seconds";
    /// Calls that came in, by method.
    pub(crate) const GRPC_STARTED: &str = "grpc_server_call_started_total";
    /// Calls at the gate, by outcome.
    pub(crate) const ADMISSION: &str = "espalier_admission_total";
    /// Panics that were caught, by site.
    pub(crate) const PANICS: &str = "espalier_panics_caught_total";
    /// Calls without a valid key, by reason.
    pub(crate) const AUTH_FAILURES: &str = "espalier_auth_failures_total";
    /// Seconds of an inference call, by operation.
    pub(crate) const GEN_AI_DURATION: &str = "gen_ai_server_request_duration_seconds";
    /// Items of batch streams and bulk jobs that were answered, by operation and outcome.
    pub(crate) const BULK_ITEMS: &str = "espalier_bulk_items_total";
    /// One, with the server's version and base model as labels.
    pub(crate) const BUILD_INFO: &str = "espalier_build_info";
}

/// Buckets of the OpenTelemetry conventions.
const CALL_SECONDS: &[f64] = &[
    0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0,
    120.0,
];
const REQUEST_SECONDS: &[f64] = &[
    0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92,
];
const FIRST_TOKEN_SECONDS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
];
const TOKEN_SECONDS: &[f64] = &[
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5,
];
/// For every other `_seconds`: from one engine step to a long adapter load.
const STEP_SECONDS: &[f64] = &[
    0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0,
    60.0,
];
/// For sizes of batches, in rows, sequences or adapters.
const COUNTS: &[f64] = &[
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0, 4096.0, 16384.0,
];

/// The log or the metrics page could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The filter does not parse.
    #[error(
        "log: \"{filter}\" is not a filter: {cause}; write info, debug or espalier_engine=debug,info"
    )]
    Filter {
        /// What was given.
        filter: String,
        /// What is wrong with it.
        cause: tracing_subscriber::filter::ParseError,
    },
    /// Someone installed a log before.
    #[error("the log is set up already: {0}")]
    Log(Box<dyn std::error::Error + Send + Sync>),
    /// The page's address cannot be bound, or metrics are set up already.
    #[error(
        "metrics_listen: cannot serve the metrics page: {0}; choose another address or turn it off"
    )]
    Metrics(#[from] BuildError),
}

/// Sets up the process's log on standard error. Once in a process.
///
/// # Errors
/// A filter that does not parse, or a second call.
pub fn log(server: &Server) -> Result<(), TelemetryError> {
    let filter =
        EnvFilter::builder()
            .parse(&server.log)
            .map_err(|cause| TelemetryError::Filter {
                filter: server.log.clone(),
                cause,
            })?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        // Colours are for people; in a file they are noise.
        .with_ansi(std::io::stderr().is_terminal())
        .with_span_events(FmtSpan::NONE);
    match server.log_format {
        LogFormat::Json => builder
            .json()
            .with_current_span(true)
            .with_span_list(false)
            .flatten_event(true)
            .try_init(),
        LogFormat::Pretty => builder.with_target(false).try_init(),
    }
    .map_err(TelemetryError::Log)?;
    std::panic::set_hook(Box::new(|info| {
        let place = info.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(
            place,
            thread = std::thread::current().name().unwrap_or("unnamed"),
            "panic"
        );
    }));
    Ok(())
}

/// Sets up the process's metrics and serves the Prometheus page when an address is configured. Once in a process, inside
/// a tokio runtime.
///
/// # Errors
/// An address that cannot be bound, or a second call.
pub fn metrics(server: &Server) -> Result<(), TelemetryError> {
    // Without a page nothing is recorded: a histogram keeps every sample until somebody collects them.
    let Some(addr) = server.metrics_listen.0 else {
        return Ok(());
    };
    let mut builder = PrometheusBuilder::new();
    let full = [
        (metric::RPC_DURATION, CALL_SECONDS),
        (metric::GEN_AI_DURATION, REQUEST_SECONDS),
        (
            "gen_ai_server_time_to_first_token_seconds",
            FIRST_TOKEN_SECONDS,
        ),
        ("gen_ai_server_time_per_output_token_seconds", TOKEN_SECONDS),
        ("espalier_inter_token_latency_seconds", TOKEN_SECONDS),
    ];
    for (name, buckets) in full {
        builder = builder.set_buckets_for_metric(Matcher::Full(name.to_owned()), buckets)?;
    }
    builder = builder
        .set_buckets_for_metric(Matcher::Suffix("_seconds".to_owned()), STEP_SECONDS)?
        .set_buckets_for_metric(Matcher::Prefix("espalier_batch_".to_owned()), COUNTS)?;
    builder.with_http_listener(addr).install()?;
    describe();
    Ok(())
}

/// Says once which build serves which base model.
pub(crate) fn build_info(base_model: &str) {
    ::metrics::gauge!(
        metric::BUILD_INFO,
        "version" => env!("CARGO_PKG_VERSION"),
        "base_model" => base_model.to_owned()
    )
    .set(1.0);
}

fn describe() {
    use ::metrics::{Unit, describe_counter, describe_gauge, describe_histogram};
    describe_histogram!(
        metric::RPC_DURATION,
        Unit::Seconds,
        "Duration of a call from its headers to its last byte"
    );
    describe_counter!(metric::GRPC_STARTED, "Calls that came in");
    describe_counter!(
        metric::ADMISSION,
        "Calls and requests by outcome; the engine counts what it admits"
    );
    describe_counter!(metric::PANICS, "Panics that were caught; each one is a bug");
    describe_counter!(metric::AUTH_FAILURES, "Calls without a valid key");
    describe_histogram!(
        metric::GEN_AI_DURATION,
        Unit::Seconds,
        "Duration of an inference call"
    );
    describe_gauge!(
        metric::BUILD_INFO,
        "1; the labels say version and base model"
    );
}
