//! Benchmarks, each a binary that measures two things in one run and prints their ratio: `kernels` (operations beside
//! their ceilings), `peers` (Espalier beside PEFT, a llama.cpp server and their like), `shell` (gRPC beside the engine
//! in process). Here lies what several of them stand on; it must not know what is measured.

pub mod ceilings;
pub mod daemon;
pub mod in_process;
pub mod processor_time;
pub mod random_adapters;
pub mod turns;

/// What a benchmark fails with: whoever reads it is a person at a terminal.
pub type Error = Box<dyn std::error::Error + Send + Sync>;

/// The same, as a result.
pub type Fallible<T> = Result<T, Error>;
