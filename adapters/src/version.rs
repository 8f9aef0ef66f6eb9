//! Version digests (its owner publishes it next).
