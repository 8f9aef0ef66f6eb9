//! GGUF files (its owner publishes it next).
