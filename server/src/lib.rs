//! The shell of Espalier: tonic, tower, tenants, names, durable state. It moves requests to the engine and answers
//! back; it touches no tensor.

// How the process is set up, watched and taken down.
pub mod config;
mod setting;
pub mod shutdown;
pub mod telemetry;

// The wire.
pub mod method;
pub mod middleware;
pub mod status;

// Who may do what to what, and where it is kept.
pub mod artifact_store;
pub mod database;
pub mod names;
pub mod paging;
pub mod principal;
pub mod registry;
pub mod tenants;

pub use setting::{ByteSize, LogFormat, MaybeAddr, MaybePath, Secret};
