//! The machine: one thread owns model, KV cache, adapters and training, and everybody else talks to it.
//!
//! ```text
//! EngineHandle ==commands==> engine: loop { drain commands; schedule; run; postprocess; lend to training }
//!                              |        adapter_pool <== adapter_loader (threads of its own)
//!                              |        scheduler + block_manager (pure)  model_runner -> model   sampler, detokenizer
//!   events <===================+        train/worker <-> train/trainer (threads of their own, one baton)
//! ```
//!
//! Knows no proto, no transport, no layout of files, no names and no authorization: a tenant is a string to be fair to,
//! an adapter version is its digest.

pub mod config;
pub mod device;
pub mod error;
pub mod handle;
pub mod request;

mod command;
mod engine;
mod sequence;
mod validate;

mod block_manager;
mod cache_key;
mod pooling;
mod prefill_pace;
mod prefix_cache;
mod scheduler;
mod traffic;

pub mod adapter_loader;
pub mod adapter_pool;
mod merger;

pub mod kv_cache;
pub mod model;
mod model_runner;

mod classify;
pub mod constraint;
mod detokenizer;
mod exponential;
mod sampler;
mod step_clock;

pub mod train;

pub mod metrics;

pub use adapter_loader::{AdapterSource, SourceError};
pub use config::EngineConfig;
pub use error::EngineError;
pub use handle::{EngineHandle, ModelInfo};
pub use request::{Event, Request, RequestKind};
