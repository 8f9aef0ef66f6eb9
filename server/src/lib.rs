//! The shell of Espalier: tonic, tower, tenants, names, durable state. It moves requests to the engine and answers
//! back; it touches no tensor.

// How the process is set up.
pub mod config;
mod setting;

// The wire.
pub mod status;

// Who may do what to what, and where it is kept.
pub mod database;
pub mod names;
pub mod principal;

pub use setting::{ByteSize, LogFormat, MaybeAddr, MaybePath, Secret};
