//! Errors of this crate (its owner publishes it next).
