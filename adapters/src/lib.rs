//! LoRA as a library: `y = W x + s * B(A x)` on a frozen base, its files, its data and its training maths.
//!
//! Knows tensors, ids, rows and bytes. It must not know a runtime, a request, a tenant or how a whole model is put
//! together: those live above it, in the engine and the server.

pub mod checksum;
pub mod combine;
pub mod config;
pub mod error;
pub mod head;
pub mod peft;
pub mod profile;
pub mod report;
pub mod version;
pub mod weights;

pub mod strict_json;

pub mod gguf;
pub mod text;

pub mod batch;
pub mod linear;
pub mod ops;
pub mod pace;
pub mod train;
