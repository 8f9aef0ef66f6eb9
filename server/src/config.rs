//! One validated `Config` out of flags, environment and a TOML file: the only place that reads any of them.
//!
//! A setting has one name everywhere: `--max-inputs`, `ESPALIER_MAX_INPUTS`, `max_inputs = 32` in the file. The table
//! below is the whole list; everything else here (flags, help, parsing, printing) follows from it, so a setting cannot
//! exist in one source and not in another. A flag beats the environment, that beats the file, that beats the default.
//! This module must not know what the settings are used for: it checks ranges, owners use the values.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::LazyLock;
use std::time::Duration;

use clap::{Args, FromArgMatches};
use clap_complete::Shell;

mod hub;
mod source;

use espalier_engine::device::DeviceChoice;

pub use self::hub::Hub;
use self::source::{Raw, find, unknown};
use crate::check::Part;
use crate::merge::Merge;
use crate::setting::{ByteSize, LogFormat, MaybeAddr, MaybeDtype, MaybePath, Secret, Value};

/// Declares sections of settings. One entry: name, type, default, and (for numbers) smallest and largest value, all
/// written as a user would write them, so that defaults pass through the same parser as anything else.
macro_rules! settings {
    ($(
        $(#[doc = $section_doc:literal])+
        $section:ident: $Section:ident {
            $( $(#[doc = $help:literal])+ $key:ident: $ty:ty = $default:literal $(in $min:literal .. $max:literal)?; )+
        }
    )+) => {
        $(
            $(#[doc = $section_doc])+
            #[derive(Debug, Clone)]
            pub struct $Section { $( $(#[doc = $help])+ pub $key: $ty, )+ }
        )+

        /// Everything that can be configured, validated.
        #[derive(Debug, Clone)]
        pub struct Config {
            $( $(#[doc = $section_doc])+ pub $section: $Section, )+
            /// Where models of the Hugging Face hub come from; no setting of ours.
            pub hub: Hub,
            sources: BTreeMap<&'static str, Source>,
        }

        /// The sections and what they are about, in the order of the printed file.
        const SECTIONS: &[(&str, &str)] = &[ $( (stringify!($section), concat!($($section_doc),+)), )+ ];

        /// Every setting, in the order of the printed file.
        pub(crate) const SETTINGS: &[Setting] = &[
            $($(
                Setting {
                    section: stringify!($section),
                    key: stringify!($key),
                    help: concat!($($help),+),
                    default: $default,
                    secret: <$ty as Value>::SECRET,
                    switch: <$ty as Value>::SWITCH,
                },
            )+)+
        ];

        impl Config {
            fn from_raw(raw: &Raw) -> Result<Config, ConfigError> {
                let mut faults = Vec::new();
                $(
                    let $section = $Section {
                        $( $key: raw.read(stringify!($key), $default, settings!(@range $($min, $max)?), &mut faults), )+
                    };
                )+
                let hub = Hub::from_environment(&BTreeMap::new());
                let config = Config { $($section,)+ hub, sources: raw.sources() };
                config.cross_check(&mut faults);
                if faults.is_empty() { Ok(config) } else { Err(ConfigError { faults }) }
            }

            fn shown(&self, key: &str) -> String {
                match key {
                    $($( stringify!($key) => self.$section.$key.show(), )+)+
                    _ => String::new(),
                }
            }
        }
    };
    (@range) => { None };
    (@range $min:literal, $max:literal) => { Some(($min, $max)) };
}

settings! {
    /// What is served, where it listens and where it keeps its state.
    server: Server {
        /// The base model: a .gguf file, a Hugging Face directory, ORG/NAME[@REVISION][:FILE.gguf] of its hub, or tiny:SEED (a built-in random model).
        model: String = "";
        /// Instead of a model, random weights in the shape of one, to measure speed and memory: llama-3.1-8b, llama-3.2-3b, llama-3.2-1b or smollm2-135m.
        synthetic: String = "";
        /// Where the base lives: cpu, cuda (cuda:1 is the second GPU), or auto, which takes a GPU where there is one.
        device: DeviceChoice = "auto";
        /// Format of the base's weights in memory: f32, bf16, f16, q8 (8 bits, a scale for each 32 inputs), stored (GGUF blocks as they are), or auto (f32 on a processor, bf16 on a GPU).
        dtype: MaybeDtype = "auto";
        /// On a GPU, the same bits whatever else runs in a step, at some cost in speed; a processor's are always the same.
        deterministic: bool = "false";
        /// Where the database and all artifacts lie; created when absent.
        data_dir: PathBuf = "espalier-data";
        /// Address of the gRPC server; port 0 takes a free one.
        listen: SocketAddr = "127.0.0.1:7411";
        /// Address of the Prometheus page, or off.
        metrics_listen: MaybeAddr = "127.0.0.1:7412";
        /// A file that gets the bound gRPC address (one line) once the server is ready; removed on exit.
        ready_file: MaybePath = "";
        /// The credential that may act for every tenant and manage tenants; needed to listen beyond loopback.
        service_key: Secret = "";
        /// A file that holds the service key, instead of service_key.
        service_key_file: MaybePath = "";
        /// Serve gRPC reflection.
        reflection: bool = "true";
        /// What is logged, as a tracing filter: info, debug, espalier_engine=debug,info.
        log: String = "info";
        /// How log lines look: pretty or json.
        log_format: LogFormat = "pretty";
        /// How long health says NOT_SERVING before the server stops accepting; set it to the balancer's probe period.
        lame_duck: Duration = "0s" in "0s" .. "5min";
        /// How long running requests may take to end after that; then they end with SERVER_DRAINING.
        drain_timeout: Duration = "60s" in "0s" .. "1h";
    }
    /// HTTP/2 limits of one connection.
    http: Http {
        /// Calls that one connection may have open.
        max_concurrent_streams: u32 = "256" in "1" .. "100000";
        /// Bytes of one request's headers.
        max_header_list_bytes: ByteSize = "16KiB" in "4KiB" .. "1MiB";
        /// Resets of streams not yet accepted before a connection is closed (rapid reset).
        max_pending_resets: usize = "20" in "1" .. "10000";
        /// How often an idle connection is pinged.
        keepalive_interval: Duration = "60s" in "1s" .. "2h";
        /// How long a ping may stay unanswered.
        keepalive_timeout: Duration = "20s" in "1s" .. "5min";
        /// Age at which a connection is asked to leave, so that clients balance again; 0s is never.
        max_connection_age: Duration = "0s" in "0s" .. "24h";
        /// How long an aged connection may finish its calls.
        connection_age_grace: Duration = "10min" in "1s" .. "24h";
    }
    /// Who may enter: beyond these, calls are turned away at once instead of waiting.
    admission: Admission {
        /// Calls in flight on this server.
        max_in_flight: usize = "256" in "1" .. "100000";
        /// Calls in flight of one tenant.
        max_in_flight_per_tenant: usize = "64" in "1" .. "100000";
        /// Event streams (WatchTrainingJob) open at once; they wait rather than work, so they are counted apart.
        max_watchers: usize = "256" in "1" .. "100000";
        /// What a client that was turned away is told to wait.
        retry_after: Duration = "500ms" in "1ms" .. "1min";
        /// Deadline of a Generate or Chat call that brings none.
        generate_deadline: Duration = "120s" in "1ms" .. "24h";
        /// Deadline of a Classify, Embed, Score or Tokenize call that brings none.
        classify_deadline: Duration = "30s" in "1ms" .. "24h";
        /// Deadline of a control call (names, uploads, jobs) that brings none; streams of bytes or events have none.
        control_deadline: Duration = "30s" in "1ms" .. "24h";
        /// The longest deadline a client may ask of an inference call; longer ones are cut to it.
        max_deadline: Duration = "1h" in "1ms" .. "24h";
    }
    /// Batch streams and bulk jobs: many requests at a lower priority than single calls.
    bulk: Bulk {
        /// Items of one batch stream or bulk job that are open at once; the server reads on when one is answered.
        max_batch_window: usize = "64" in "1" .. "100000";
        /// Items of one batch stream.
        max_batch_items: usize = "100000" in "1" .. "10000000";
        /// Items of all batch streams and bulk jobs in the engine at once; the rest waits. Stay below max_queue.
        max_bulk_in_flight: usize = "128" in "1" .. "100000";
        /// Bulk jobs that run at once.
        max_active_bulk_jobs: usize = "2" in "1" .. "1024";
        /// Bulk jobs of one tenant, ended ones included until they are removed.
        max_bulk_jobs_per_tenant: usize = "100" in "1" .. "100000";
        /// Bytes of a bulk job's input.
        max_bulk_input_bytes: ByteSize = "64MiB" in "1KiB" .. "16GiB";
        /// Lines of a bulk job's input.
        max_bulk_rows: usize = "100000" in "1" .. "100000000";
        /// How long an ended bulk job and its output are kept.
        bulk_retention: Duration = "168h" in "1s" .. "8760h";
        /// How long a batch stream may have no open item and send none.
        batch_idle_timeout: Duration = "5min" in "10ms" .. "24h";
    }
    /// How large one inference request may be.
    limits: Limits {
        /// Bytes of one request message.
        max_message_bytes: ByteSize = "4MiB" in "64KiB" .. "64MiB";
        /// Bytes of one prompt or text before it is tokenised.
        max_prompt_bytes: ByteSize = "1MiB" in "1KiB" .. "64MiB";
        /// Tokens of one prompt; 0 is the model's context length.
        max_prompt_tokens: usize = "0" in "0" .. "10000000";
        /// Tokens that one request may generate; 0 is what the context leaves.
        max_output_tokens: usize = "0" in "0" .. "10000000";
        /// Tokens generated when neither request nor serving profile names a number.
        default_max_tokens: usize = "512" in "1" .. "10000000";
        /// Candidates of one Generate call (n).
        max_candidates: u32 = "16" in "1" .. "128";
        /// Stop strings of one request.
        max_stop_strings: usize = "4" in "0" .. "64";
        /// Bytes of one stop string.
        max_stop_string_bytes: usize = "256" in "1" .. "4096";
        /// Stop token ids of one request.
        max_stop_token_ids: usize = "16" in "0" .. "1024";
        /// Alternatives whose log-probabilities are returned for each token.
        max_logprobs: u32 = "5" in "0" .. "64";
        /// Entries of a logit bias.
        max_logit_bias: usize = "256" in "0" .. "100000";
        /// Texts of one Classify or Embed call, items of one Score call.
        max_inputs: usize = "32" in "1" .. "4096";
        /// Labels that one Classify call may name.
        max_labels: usize = "64" in "2" .. "4096";
        /// Bytes of one label.
        max_label_bytes: usize = "256" in "1" .. "4096";
        /// Messages of one chat.
        max_messages: usize = "256" in "1" .. "100000";
        /// Tools that one chat may offer.
        max_tools: usize = "64" in "0" .. "4096";
        /// Bytes of a request id, and of other free identifiers that a client sends.
        max_request_id_bytes: usize = "128" in "16" .. "1024";
        /// Events that wait in a response stream before its sequence pauses for the reader.
        stream_buffer: usize = "64" in "8" .. "65536";
        /// How long a stream's reader may take no event before the stream is cut.
        slow_reader_timeout: Duration = "30s" in "10ms" .. "1h";
    }
    /// Constrained output: what a JSON schema, regex, list of choices or grammar may cost.
    constraints: Constraints {
        /// Bytes of one constraint.
        max_constraint_bytes: ByteSize = "64KiB" in "16" .. "4MiB";
        /// How long a request may wait for its constraint to be compiled.
        constraint_compile_timeout: Duration = "5s" in "1ms" .. "5min";
        /// Constraints that may wait for the compiler.
        max_constraint_queue: usize = "64" in "1" .. "100000";
        /// Work of compiling one constraint; about 50000 steps take a millisecond.
        constraint_compile_fuel: u64 = "1000000" in "1000" .. "1000000000";
        /// Symbols of one compiled grammar.
        max_grammar_symbols: usize = "200000" in "100" .. "100000000";
        /// Work of finding one token's choices in the text; about 14000 steps take a millisecond.
        constraint_token_fuel: u64 = "100000" in "1000" .. "1000000000";
        /// Items that the parser may make for one token; about 20000 take a millisecond.
        constraint_token_items: usize = "50000" in "100" .. "100000000";
        /// States that one request's lexer may grow to, about 2 KB each.
        max_lexer_states: usize = "20000" in "100" .. "10000000";
        /// Compiled constraints kept for the next request that brings the same; 0 keeps none.
        constraint_cache_entries: usize = "256" in "0" .. "100000";
        /// Bytes of compiled constraints kept.
        constraint_cache_bytes: ByteSize = "64MiB" in "0" .. "16GiB";
    }
    /// Names, lists and what a tenant may keep.
    catalog: Catalog {
        /// Characters of one id in a resource name.
        max_id_length: usize = "63" in "8" .. "63";
        /// Items of a page when the request names no page size.
        default_page_size: usize = "50" in "1" .. "1000";
        /// Items of a page at most; a larger page size is cut to it.
        max_page_size: usize = "1000" in "1" .. "10000";
        /// Tenants on this server.
        max_tenants: usize = "10000" in "1" .. "10000000";
        /// API keys of one tenant.
        max_keys_per_tenant: usize = "32" in "1" .. "10000";
        /// Adapters of one tenant.
        max_adapters_per_tenant: usize = "10000" in "1" .. "10000000";
        /// Versions of one adapter.
        max_versions_per_adapter: usize = "1000" in "1" .. "1000000";
        /// Aliases of one adapter.
        max_aliases_per_adapter: usize = "32" in "1" .. "1000";
        /// Datasets of one tenant.
        max_datasets_per_tenant: usize = "1000" in "1" .. "1000000";
        /// Bytes of a display name or description.
        max_description_bytes: usize = "1024" in "16" .. "65536";
        /// Resolved names kept in memory.
        name_cache_entries: usize = "65536" in "16" .. "10000000";
    }
    /// Adapter files.
    adapters: Adapters {
        /// Bytes of one uploaded version.
        max_adapter_bytes: ByteSize = "1GiB" in "1KiB" .. "64GiB";
        /// Bytes of one upload chunk.
        max_chunk_bytes: ByteSize = "1MiB" in "1KiB" .. "16MiB";
        /// Bytes of adapter_config.json and of labels.json.
        max_config_bytes: ByteSize = "1MiB" in "1KiB" .. "16MiB";
        /// Rank of an adapter.
        max_rank: usize = "256" in "1" .. "4096";
        /// Labels of a classification head.
        max_head_labels: usize = "1024" in "2" .. "65536";
        /// Uploads that one tenant may have open.
        max_uploads_per_tenant: usize = "4" in "1" .. "1024";
        /// How long an upload may send nothing.
        upload_idle_timeout: Duration = "30s" in "10ms" .. "1h";
    }
    /// The machine: memory and batches.
    engine: Engine {
        /// Bytes of the KV cache; 0 is 512MiB on a processor, and on a GPU what all others leave.
        kv_cache_bytes: ByteSize = "0" in "0" .. "16TiB";
        /// Bytes of adapters held in memory; the least recently used leave.
        adapter_cache_bytes: ByteSize = "1GiB" in "1MiB" .. "16TiB";
        /// Share of adapter_cache_bytes that pinned adapters may take; the rest always goes round.
        max_pinned_share: f64 = "0.5" in "0" .. "1";
        /// Bytes of merged copies of the base, one for an adapter that dominates traffic, beside adapter_cache_bytes; 0 makes none.
        merged_bytes: ByteSize = "0" in "0" .. "16TiB";
        /// Share of all computed tokens from which an adapter may be merged; below half of it the copy is given up.
        merge_share: f64 = "0.5" in "0.01" .. "1";
        /// Time over which traffic is judged: what is older counts half, then a quarter, and so on.
        merge_window: Duration = "30s" in "10ms" .. "1h";
        /// Sequences that run at once.
        max_sequences: usize = "64" in "1" .. "65536";
        /// Rows of one engine step.
        max_batched_tokens: usize = "512" in "16" .. "1048576";
        /// Requests that wait for the engine.
        max_queue: usize = "256" in "1" .. "1000000";
        /// How long a request may wait for its first step, its adapter's loading included, before it is turned away.
        max_queue_wait: Duration = "30s" in "1ms" .. "1h";
        /// Adapters that may be loading or waiting for the loader.
        max_adapter_loads: usize = "256" in "1" .. "100000";
        /// Prompt rows at most in a step that also generates for others; prefill_max_step_impact usually allows fewer.
        prefill_chunk_tokens: usize = "128" in "1" .. "1048576";
        /// What prompts may add to the time of a step that also generates, as a share of its time without them; 1.25 is 125 %.
        prefill_max_step_impact: f64 = "1.25" in "0" .. "1000";
        /// Keep the keys and values of prompts and outputs for requests of the same tenant and version that begin alike.
        prefix_cache: bool = "true";
        /// Threads for tensor work; 0 is one for each core.
        threads: usize = "0" in "0" .. "1024";
    }
    /// Training beside serving, and what a job may ask.
    training: Training {
        /// The longest piece of training between two engine steps.
        training_quantum: Duration = "10ms" in "1ms" .. "10s";
        /// What training may add to a running request's mean time per output token; 0.25 is 25 %.
        training_max_tpot_impact: f64 = "0.25" in "0" .. "100";
        /// Bytes of saved activations of one micro-batch; 0 is 512MiB on a processor, a tenth of its memory on a GPU.
        training_activation_bytes: ByteSize = "0" in "0" .. "16TiB";
        /// Bytes that one job may hold beside the base while it trains, its activations included; one that would hold more is refused.
        training_job_bytes: ByteSize = "8GiB" in "1MiB" .. "16TiB";
        /// Jobs that train at the same time.
        max_active_jobs: usize = "4" in "1" .. "1024";
        /// Jobs of one tenant that are not finished.
        max_jobs_per_tenant: usize = "64" in "1" .. "100000";
        /// Optimizer steps between two checkpoints.
        checkpoint_steps: usize = "50" in "1" .. "1000000";
        /// Bytes of one dataset.
        max_dataset_bytes: ByteSize = "64MiB" in "1KiB" .. "16GiB";
        /// Rows of one dataset.
        max_dataset_rows: usize = "100000" in "1" .. "100000000";
        /// Rows that a job may bring inline.
        max_inline_rows: usize = "1000" in "1" .. "1000000";
        /// Bytes of one field of a row.
        max_row_bytes: ByteSize = "256KiB" in "1KiB" .. "64MiB";
        /// Bytes of one document of raw text.
        max_document_bytes: ByteSize = "4MiB" in "1KiB" .. "64MiB";
        /// Findings that a data report lists; the rest is counted.
        max_report_findings: usize = "1000" in "1" .. "100000";
        /// Tokens of one example; 0 is the model's context length.
        max_example_tokens: usize = "2048" in "0" .. "10000000";
        /// Epochs of one job.
        max_epochs: u32 = "100" in "1" .. "100000";
        /// Optimizer steps of one job.
        max_steps: u64 = "100000" in "1" .. "1000000000";
        /// Rows or sequences of one optimizer step.
        max_batch_size: u32 = "1024" in "1" .. "1048576";
        /// How often a silent watch says that it is alive.
        watch_heartbeat: Duration = "15s" in "10ms" .. "10min";
    }
}

/// Where a value came from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    /// A command-line flag.
    Flag(String),
    /// An environment variable.
    Environment(String),
    /// A line of the configuration file.
    File(PathBuf),
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Source::Flag(flag) => write!(f, "flag {flag}"),
            Source::Environment(name) => write!(f, "environment {name}"),
            Source::File(path) => write!(f, "file {}", path.display()),
        }
    }
}

/// One row of the table, as data.
#[derive(Debug)]
pub(crate) struct Setting {
    section: &'static str,
    /// The name in the file; the flag is the same with hyphens, the variable in capitals behind `ESPALIER_`.
    pub(crate) key: &'static str,
    help: &'static str,
    default: &'static str,
    secret: bool,
    switch: bool,
}

impl Setting {
    fn section_help(&self) -> &'static str {
        SECTIONS
            .iter()
            .find(|(name, _)| *name == self.section)
            .map_or("", |(_, help)| help.trim())
    }

    /// The command line library wants names that live as long as the process.
    fn flag(&self) -> &'static str {
        static FLAGS: LazyLock<BTreeMap<&'static str, String>> = LazyLock::new(|| {
            SETTINGS
                .iter()
                .map(|setting| (setting.key, setting.key.replace('_', "-")))
                .collect()
        });
        FLAGS.get(self.key).map_or(self.key, String::as_str)
    }

    fn variable(&self) -> String {
        format!("ESPALIER_{}", self.key.to_uppercase())
    }
}

/// The configuration cannot be used; lists every fault, not only the first.
#[derive(Debug, thiserror::Error)]
#[error("the configuration has {} fault(s):\n  - {}", faults.len(), faults.join("\n  - "))]
pub struct ConfigError {
    /// One line each: setting, source, value, limit, next step.
    pub faults: Vec<String>,
}

impl ConfigError {
    fn one(fault: impl Into<String>) -> Self {
        ConfigError {
            faults: vec![fault.into()],
        }
    }
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Invocation {
    /// Serve with this configuration.
    Serve(Box<Config>),
    /// Print this configuration and leave.
    Print(Box<Config>),
    /// Print this script for a shell and leave.
    Completions(String),
    /// Check this part on what the configuration names and leave.
    Check(Part, Box<Config>),
    /// Write a base with an adapter merged into it and leave.
    Merge(Merge, Hub),
}

// === impl Config ===

impl Config {
    /// Reads flags (`args` with the program's name first), the process's environment and the file that `--config` or
    /// `ESPALIER_CONFIG` names.
    ///
    /// Asking for help or the version prints it and ends the process, as clap does.
    pub fn from_command_line(
        args: impl IntoIterator<Item = std::ffi::OsString>,
    ) -> Result<Invocation, ConfigError> {
        let matches = command().get_matches_from(args);
        if let Some(shell) = matches.subcommand_matches("completions") {
            let shell = shell.get_one::<Shell>("shell").copied();
            return Ok(Invocation::Completions(completions(
                shell.unwrap_or(Shell::Bash),
            )));
        }
        let env: BTreeMap<String, String> = std::env::vars_os()
            .filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)))
            .collect();
        if let Some(merge) = matches.subcommand_matches("merge") {
            let hub = Hub::from_environment(&env);
            let merge = Merge::from_arg_matches(merge)
                .map_err(|error| ConfigError::one(error.to_string()))?;
            return Ok(Invocation::Merge(merge, hub));
        }
        let print = matches.subcommand_matches("config");
        let check = matches.subcommand_matches("check");
        let flags = print.or(check).unwrap_or(&matches);
        let path = flags
            .get_one::<String>("config")
            .cloned()
            .or_else(|| env.get("ESPALIER_CONFIG").cloned())
            .filter(|path| !path.is_empty());
        let mut raw = Raw::default();
        if let Some(path) = path {
            let text = std::fs::read_to_string(&path).map_err(|error| {
                ConfigError::one(format!(
                    "cannot read the configuration file {path}: {error}"
                ))
            })?;
            raw.add_file(&text, PathBuf::from(path))?;
        }
        raw.add_environment(&env)?;
        for setting in SETTINGS {
            if let Some(value) = flags.get_one::<String>(setting.key) {
                raw.0.insert(
                    setting.key,
                    (value.clone(), Source::Flag(format!("--{}", setting.flag()))),
                );
            }
        }
        let mut config = Config::from_raw(&raw)?;
        config.hub = Hub::from_environment(&env);
        if print.is_some() {
            return Ok(Invocation::Print(Box::new(config)));
        }
        if let Some(part) = check.and_then(|check| check.get_one::<Part>("part")) {
            return Ok(Invocation::Check(*part, Box::new(config)));
        }
        if config.server.model.is_empty() && config.server.synthetic.is_empty() {
            return Err(ConfigError::one(
                "model: no base model is named; say --model FILE.gguf, --model DIRECTORY, --model ORG/NAME (of the Hugging Face hub), --model tiny:1, or --synthetic llama-3.1-8b to measure speed alone",
            ));
        }
        Ok(Invocation::Serve(Box::new(config)))
    }

    /// A configuration from pairs of setting and text, the rest defaults: for tests and for embedding the server.
    ///
    /// # Errors
    /// As for any other source; an unknown setting is an error.
    pub fn from_pairs(pairs: &[(&str, &str)]) -> Result<Config, ConfigError> {
        let mut raw = Raw::default();
        for (key, value) in pairs {
            let setting = find(key).ok_or_else(|| ConfigError::one(unknown(key, "the caller")))?;
            raw.0.insert(
                setting.key,
                (
                    (*value).to_owned(),
                    Source::Flag(format!("--{}", setting.flag())),
                ),
            );
        }
        Config::from_raw(&raw)
    }

    /// The effective configuration as a TOML file, each line with its source; secrets are redacted.
    pub fn to_toml(&self) -> String {
        let mut out = String::from(
            "# The effective configuration of espalierd: what flags, environment, file and defaults add up to.\n",
        );
        let mut section = "";
        for setting in SETTINGS {
            if setting.section != section {
                section = setting.section;
                out.push_str(&format!("\n# {}\n", setting.section_help()));
            }
            let source = self
                .sources
                .get(setting.key)
                .map_or("default".to_owned(), Source::to_string);
            out.push_str(&format!(
                "{} = {}  # {source}\n",
                setting.key,
                self.shown(setting.key)
            ));
        }
        out
    }

    /// The settings that shape how requests are served, for whoever may ask: everything but the section that names
    /// addresses, paths and keys.
    pub fn of_serving(&self) -> BTreeMap<String, String> {
        let open = SETTINGS
            .iter()
            .filter(|setting| setting.section != "server" && !setting.secret);
        open.map(|setting| {
            let value = self.shown(setting.key);
            (setting.key.to_owned(), value.trim_matches('"').to_owned())
        })
        .collect()
    }

    /// The service key, from the setting or from its file.
    ///
    /// # Errors
    /// When the file cannot be read or is empty.
    pub fn service_key(&self) -> Result<Option<String>, ConfigError> {
        if let Some(path) = &self.server.service_key_file.0 {
            let key = std::fs::read_to_string(path).map_err(|error| {
                ConfigError::one(format!(
                    "service_key_file: cannot read {}: {error}",
                    path.display()
                ))
            })?;
            let key = key.trim().to_owned();
            check_key(&key).map_err(|why| {
                ConfigError::one(format!("service_key_file: {}: {why}", path.display()))
            })?;
            return Ok(Some(key));
        }
        Ok(self.server.service_key.reveal().map(str::to_owned))
    }

    fn cross_check(&self, faults: &mut Vec<String>) {
        if let Some(key) = self.server.service_key.reveal() {
            if let Err(why) = check_key(key) {
                faults.push(format!("service_key: {why}"));
            }
            if self.server.service_key_file.0.is_some() {
                faults.push(
                    "service_key: service_key_file is set as well; keep one of them".to_owned(),
                );
            }
        }
        if !self.server.synthetic.is_empty() && !self.server.model.is_empty() {
            faults.push("synthetic: model is set as well; keep one of them".to_owned());
        }
        let (default, max) = (self.catalog.default_page_size, self.catalog.max_page_size);
        if default > max {
            faults.push(format!("default_page_size: {default} is above max_page_size {max}; lower one or raise the other"));
        }
        let (tenant, all) = (
            self.admission.max_in_flight_per_tenant,
            self.admission.max_in_flight,
        );
        if tenant > all && self.sources.contains_key("max_in_flight_per_tenant") {
            faults.push(format!("max_in_flight_per_tenant: {tenant} is above max_in_flight {all}; lower one or raise the other"));
        }
        let (bulk, queue) = (self.bulk.max_bulk_in_flight, self.engine.max_queue);
        if bulk > queue {
            let advice = "bulk work would leave single calls no place in the queue; lower one or raise the other";
            faults.push(format!(
                "max_bulk_in_flight: {bulk} is above max_queue {queue}; {advice}"
            ));
        }
        let (rows, sequences) = (self.engine.max_batched_tokens, self.engine.max_sequences);
        if rows < sequences {
            faults.push(format!(
                "max_batched_tokens: {rows} is below max_sequences {sequences}; a step holds one row of every \
                 sequence, so raise one or lower the other"
            ));
        }
        if self
            .server
            .metrics_listen
            .0
            .is_some_and(|addr| addr == self.server.listen && addr.port() != 0)
        {
            faults.push(format!(
                "metrics_listen: {} is also listen; give it another port or turn it off",
                self.server.listen
            ));
        }
    }
}

/// Short keys can be guessed; a space or a control character would not survive a header.
fn check_key(key: &str) -> Result<(), String> {
    if key.len() < 24 || key.len() > 512 {
        return Err(format!(
            "has {} characters, allowed are 24 to 512; make one with: openssl rand -hex 32",
            key.len()
        ));
    }
    if !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(
            "has characters other than printable ASCII; make one with: openssl rand -hex 32"
                .to_owned(),
        );
    }
    Ok(())
}

fn command() -> clap::Command {
    let with_flags = |mut command: clap::Command| {
        command = command.arg(
            clap::Arg::new("config")
                .long("config")
                .value_name("FILE")
                .help("A TOML file with settings [environment ESPALIER_CONFIG]"),
        );
        for setting in SETTINGS {
            let default = if setting.default.is_empty() {
                String::new()
            } else {
                format!(" [default {}]", setting.default)
            };
            let mut arg = clap::Arg::new(setting.key)
                .long(setting.flag())
                .value_name("VALUE")
                .help(format!("{}{default}", setting.help.trim()))
                .help_heading(setting.section_help().trim_end_matches('.'));
            if setting.switch {
                arg = arg
                    .num_args(0..=1)
                    .default_missing_value("true")
                    .require_equals(true);
            }
            command = command.arg(arg.hide(setting.secret));
        }
        command
    };
    let root = clap::Command::new("espalierd")
        .version(env!("CARGO_PKG_VERSION"))
        .about("Serves and trains LoRA adapters on one base model, over gRPC")
        .after_help("Every flag is also a variable (--max-inputs, ESPALIER_MAX_INPUTS) and a line of the file (max_inputs = 32).")
        .args_conflicts_with_subcommands(true);
    with_flags(root)
        .subcommand(with_flags(clap::Command::new("config").about(
            "Print the effective configuration as TOML, with the source of every value",
        )))
        .subcommand(with_flags(
            clap::Command::new("check")
                .about("Prove and measure what this program does on this machine: a table, and a line of JSON at the end")
                .arg(
                    clap::Arg::new("part")
                        .required(true)
                        .value_parser(clap::value_parser!(Part)),
                ),
        ))
        .subcommand(Merge::augment_args(clap::Command::new("merge").about(
            "Write the base with an adapter merged into it, as a Hugging Face directory",
        )))
        .subcommand(
            clap::Command::new("completions")
                .about("Print a script that completes flags in a shell")
                .arg(
                    clap::Arg::new("shell")
                        .required(true)
                        .value_parser(clap::value_parser!(Shell)),
                ),
        )
}

fn completions(shell: Shell) -> String {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command(), "espalierd", &mut script);
    String::from_utf8_lossy(&script).into_owned()
}

#[cfg(test)]
mod tests;
