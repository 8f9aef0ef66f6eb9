//! One binary of all tests that cross crates: over real sockets, with the seeded tiny model or the real one.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod golden_inference;
mod golden_training;
mod inference_api;
mod server_life;
mod server_limits;
mod state_api;
