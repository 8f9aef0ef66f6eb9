//! The shell of Espalier: tonic, tower, tenants, names, durable state. It moves requests to the engine and answers
//! back; it touches no tensor.

// How the process is set up, watched and taken down.
mod build;
pub mod check;
pub mod config;
mod health;
pub mod hub;
pub mod merge;
mod server;
mod setting;
pub mod shutdown;
pub mod telemetry;

// The wire.
mod convert;
pub mod method;
pub mod middleware;
mod services;
mod stack;
pub mod status;

// Who may do what to what, and where it is kept.
pub mod artifact_store;
pub mod bulk;
pub mod database;
pub mod datasets;
pub mod jobs;
pub mod names;
pub mod paging;
pub mod principal;
pub mod registry;
mod source;
pub mod tenants;

pub use server::{About, ServeError, Server, serve};
pub use setting::{ByteSize, LogFormat, MaybeAddr, MaybePath, Secret};
