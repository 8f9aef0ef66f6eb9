//! PEFT directories in and out (its owner publishes it next).
