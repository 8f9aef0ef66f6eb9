//! Why a base model cannot be loaded: every variant names the file, the tensor or field, and the rule that it breaks.
//! Knows nothing of requests or statuses; whoever starts the engine shows the message as it stands.

use std::path::{Path, PathBuf};

use espalier_adapters::gguf::GgufError;
use espalier_adapters::text::TextError;

/// A model that cannot be loaded, and why.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The operating system refused a file.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },
    /// The `--model` value has none of the known forms.
    #[error(
        "model {spec:?}: {rule}; give tiny:SEED, a .gguf file, or a Hugging Face directory that holds config.json"
    )]
    Spec {
        /// The value as given.
        spec: String,
        /// What is wrong with it.
        rule: String,
    },
    /// A GGUF file breaks a rule of its format.
    #[error(transparent)]
    Gguf(#[from] GgufError),
    /// The tokenizer or the chat template cannot be built.
    #[error("{file}: {source}")]
    Text {
        /// The file that holds the tokenizer or the template.
        file: String,
        /// What is wrong in it.
        source: TextError,
    },
    /// A configuration field is missing, malformed or not supported.
    #[error("{file}: {field} {found}: {rule}")]
    Field {
        /// The file.
        file: String,
        /// The field, as the file spells it.
        field: String,
        /// What stands there.
        found: String,
        /// The rule that it breaks.
        rule: String,
    },
    /// A file is not what its name says (JSON that does not parse, a safetensors header that lies, ...).
    #[error("{file}: {rule}")]
    File {
        /// The file.
        file: String,
        /// The rule that it breaks.
        rule: String,
    },
    /// The weights do not fit the configuration: every finding, one a line.
    #[error("{file}: {} finding(s) in the weights:\n  {}", findings.len(), findings.join("\n  "))]
    Weights {
        /// The file or directory.
        file: String,
        /// One sentence for each tensor and rule.
        findings: Vec<String>,
    },
}

impl ModelError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io {
            path: path.to_path_buf(),
            source,
        }
    }

    pub(crate) fn file(file: &Path, rule: impl Into<String>) -> Self {
        Self::File {
            file: file.display().to_string(),
            rule: rule.into(),
        }
    }

    pub(crate) fn field(
        file: &str,
        field: &str,
        found: impl std::fmt::Display,
        rule: impl Into<String>,
    ) -> Self {
        Self::Field {
            file: file.to_owned(),
            field: field.to_owned(),
            found: found.to_string(),
            rule: rule.into(),
        }
    }
}
