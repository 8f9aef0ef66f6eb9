//! Benchmarks, each a binary that measures two things in one run and prints their ratio: `kernels` (operations beside
//! their ceilings), `peers` (Espalier beside transformers + PEFT).

pub mod random_adapters;
