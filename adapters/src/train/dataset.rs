//! Rows of training data (its owner publishes it next).
