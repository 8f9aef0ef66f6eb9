//! Which method a call is for, recognised once from its path: by what it costs and how it ends. The list comes from the
//! contract's own descriptor set, so a method that is added there is known here; metrics and limits go by it.

use std::collections::HashMap;
use std::sync::LazyLock;

use prost::Message;
use prost_types::FileDescriptorSet;

/// How a method behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Kind {
    /// Generates tokens: long.
    Generate,
    /// Classify, Embed, Score, Tokenize, Detokenize: one answer from the engine or the tokenizer.
    Infer,
    /// Names, jobs, tenants, the model: an answer from the database.
    Control,
    /// A stream of many items, each an inference request of its own.
    Batch,
    /// A stream of bytes: uploads and downloads.
    Transfer,
    /// A stream of events that mostly waits.
    Watch,
    /// Health: open to everybody and never turned away.
    Health,
    /// Not a method of this server.
    #[default]
    Unknown,
}

/// A method of this server; carried in the request's extensions.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Method {
    /// `espalier.v1.InferenceService/Generate`, or `other`: a bounded set, fit for a metric's label.
    pub name: &'static str,
    /// How it behaves.
    pub kind: Kind,
}

impl Default for Method {
    fn default() -> Self {
        Method {
            name: "other",
            kind: Kind::Unknown,
        }
    }
}

/// Health and reflection are not part of the contract's descriptor set.
const STANDARD: &[(&str, Kind)] = &[
    ("grpc.health.v1.Health/Check", Kind::Health),
    ("grpc.health.v1.Health/Watch", Kind::Health),
    (
        "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        Kind::Watch,
    ),
    (
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        Kind::Watch,
    ),
];

static METHODS: LazyLock<HashMap<String, Kind>> = LazyLock::new(|| {
    let mut methods: HashMap<String, Kind> = STANDARD
        .iter()
        .map(|(name, kind)| ((*name).to_owned(), *kind))
        .collect();
    methods.extend(contract().into_iter().map(|(service, method)| {
        let kind = kind_of(&service, &method);
        (format!("{service}/{method}"), kind)
    }));
    methods
});

/// The services and methods of the contract.
///
/// The descriptor set is compiled in; if it could not be read the server would have no methods at all, which tests see.
pub fn contract() -> Vec<(String, String)> {
    let set = FileDescriptorSet::decode(espalier_proto::FILE_DESCRIPTOR_SET).unwrap_or_default();
    let mut methods = Vec::new();
    for file in set.file {
        for service in &file.service {
            for method in &service.method {
                methods.push((
                    format!("{}.{}", file.package(), service.name()),
                    method.name().to_owned(),
                ));
            }
        }
    }
    methods
}

fn kind_of(service: &str, method: &str) -> Kind {
    match (service.rsplit('.').next().unwrap_or_default(), method) {
        ("InferenceService", "Generate" | "StreamGenerate" | "Chat" | "StreamChat") => {
            Kind::Generate
        }
        ("InferenceService", "BatchGenerate" | "BatchClassify") => Kind::Batch,
        ("InferenceService", _) => Kind::Infer,
        ("BulkService", "CreateBulkJob") => Kind::Transfer,
        (_, method) if method.starts_with("Watch") => Kind::Watch,
        (_, method) if method.starts_with("Upload") || method.starts_with("Download") => {
            Kind::Transfer
        }
        _ => Kind::Control,
    }
}

impl Method {
    /// From a request's path, `/package.Service/Method`.
    pub fn of_path(path: &str) -> Method {
        path.strip_prefix('/')
            .and_then(|name| METHODS.get_key_value(name))
            .map_or(Method::default(), |(name, kind)| Method {
                name: name.as_str(),
                kind: *kind,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_contract_is_known_and_nothing_else() {
        assert!(contract().len() > 20, "the descriptor set was not read");
        assert_eq!(
            Method::of_path("/espalier.v1.InferenceService/StreamChat").kind,
            Kind::Generate
        );
        assert_eq!(
            Method::of_path("/espalier.v1.InferenceService/BatchClassify").kind,
            Kind::Batch
        );
        assert_eq!(
            Method::of_path("/espalier.v1.InferenceService/Embed").kind,
            Kind::Infer
        );
        assert_eq!(
            Method::of_path("/espalier.v1.TrainingService/WatchTrainingJob").kind,
            Kind::Watch
        );
        assert_eq!(
            Method::of_path("/espalier.v1.AdapterService/UploadAdapterVersion").kind,
            Kind::Transfer
        );
        assert_eq!(
            Method::of_path("/grpc.health.v1.Health/Check").kind,
            Kind::Health
        );
        for path in ["", "/", "/x/y", "espalier.v1.InferenceService/Generate"] {
            assert_eq!(Method::of_path(path), Method::default());
        }
    }
}
