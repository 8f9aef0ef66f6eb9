//! Training examples (its owner publishes it next).
