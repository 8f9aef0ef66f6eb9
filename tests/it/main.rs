//! One binary of all tests that cross crates: over real sockets, with the seeded tiny model or the real one.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

mod adapter_api;
mod batch_api;
mod bench_cli;
mod bulk_api;
mod churn;
mod classification_api;
mod client_side;
mod combine_api;
mod constrained;
mod golden_inference;
mod golden_training;
mod gpu_check;
mod inference_api;
mod job_life;
mod kernels;
mod kill_resume;
mod mixture_api;
mod python_client;
mod real_model;
mod residency;
mod server_life;
mod server_limits;
mod state_api;
mod tidy;
mod tools;
mod training_api;
mod training_data;
mod training_ways;
