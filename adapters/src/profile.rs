//! Serving profiles (its owner publishes it next).
