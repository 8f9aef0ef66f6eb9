//! Text to ids and back (its owner publishes it next).
