//! Training maths: pure functions of tensors, ids and rows.
//!
//! Nothing here knows a model, a thread or a job: the engine's trainer calls these in its own order and time.

pub mod calibration;
pub mod checkpoint;
pub mod dataset;
pub mod examples;
pub mod head_loss;
pub mod loss;
pub mod optimizer;
pub mod quality;
pub mod schedule;
pub mod statistics;
