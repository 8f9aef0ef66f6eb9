//! The machine: one thread owns model, KV cache, adapters and training, and everybody else talks to it.
//!
//! Knows no proto, no transport, no layout of files, no names and no authorization: a tenant is a string to be fair to,
//! an adapter version is its digest.

pub mod adapter_loader;
pub mod adapter_pool;
pub mod config;
pub mod error;
pub mod metrics;
pub mod kv_cache;
pub mod request;

pub mod model;

mod block_manager;
mod detokenizer;
mod sampler;
mod scheduler;

/// Training; `train/mod.rs` takes this place when the engine thread is there.
pub mod train {
    pub mod trainer;
}
