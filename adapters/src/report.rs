//! Reports of every finding in a file (its owner publishes it next).
