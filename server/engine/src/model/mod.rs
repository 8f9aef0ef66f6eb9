//! The base model: its files, and the decoder that runs it.

pub mod config;
pub mod error;
pub mod weights;
