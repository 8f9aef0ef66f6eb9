//! Adapter weights (its owner publishes it next).
