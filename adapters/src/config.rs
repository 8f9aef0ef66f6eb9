//! LoRA configuration as PEFT writes it (its owner publishes it next).
