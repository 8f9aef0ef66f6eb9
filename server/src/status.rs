//! The only exit of errors to the wire: what went wrong becomes a `tonic::Status` with exactly one `ErrorInfo`.
//!
//! `Refusal` is the vocabulary (code, reason, metadata and the one detail that the contract's table asks for); the
//! `From` impls below map every domain error onto it, exhaustively, so that a new variant does not compile until it has
//! a place in the table. The request id is added by the outermost layer (`middleware::trace`), because it alone knows it.
//! This file must not decide what is an error, only how one looks.

mod domain;
mod training;

use std::collections::HashMap;
use std::time::Duration;

use tonic::metadata::MetadataValue;
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// The domain of every `ErrorInfo`.
pub const DOMAIN: &str = "espalier.v1";

/// Tells clients how long to wait (gRFC A6); RetryInfo says the same to people.
const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// One refused or failed call, before it becomes bytes.
///
/// ```
/// use espalier_server::status::Refusal;
/// let status: tonic::Status = Refusal::invalid_field("sampling.n", "17 is outside 1 to 16").into();
/// assert_eq!(status.code(), tonic::Code::InvalidArgument);
/// ```
#[derive(Debug, Clone)]
pub struct Refusal(Box<Parts>);

/// Boxed, because every function that may refuse carries room for it.
#[derive(Debug, Clone)]
struct Parts {
    code: Code,
    reason: &'static str,
    message: String,
    metadata: HashMap<String, String>,
    detail: Detail,
}

/// The details beside `ErrorInfo`; at most one of each kind, and no case needs two.
#[derive(Debug, Clone)]
enum Detail {
    None,
    Fields(Vec<(String, String)>),
    Resource {
        kind: &'static str,
        name: String,
    },
    Quota {
        subject: String,
        description: String,
        retry: Option<Duration>,
    },
    Precondition {
        kind: &'static str,
        subject: String,
        description: String,
    },
    Retry(Duration),
}

// === impl Refusal ===

impl Refusal {
    /// Any refusal; `reason` is the UPPER_SNAKE constant of the error table.
    pub fn new(code: Code, reason: &'static str, message: impl Into<String>) -> Self {
        Refusal(Box::new(Parts {
            code,
            reason,
            message: message.into(),
            metadata: HashMap::new(),
            detail: Detail::None,
        }))
    }

    /// A field that cannot be accepted. `why` names the value and the limit.
    pub fn invalid_field(field: impl Into<String>, why: impl Into<String>) -> Self {
        Self::invalid_fields(vec![(field.into(), why.into())])
    }

    /// Several fields, all of them in one answer.
    pub fn invalid_fields(fields: Vec<(String, String)>) -> Self {
        let message = fields
            .iter()
            .map(|(field, why)| format!("{field}: {why}"))
            .collect::<Vec<_>>()
            .join("; ");
        let mut refusal = Self::new(Code::InvalidArgument, "INVALID_FIELD", message);
        if let Some((field, _)) = fields.first() {
            refusal.0.metadata.insert("field".to_owned(), field.clone());
        }
        refusal.0.detail = Detail::Fields(fields);
        refusal
    }

    /// The same refusal under another reason of the table.
    #[must_use]
    pub fn because(mut self, reason: &'static str) -> Self {
        self.0.reason = reason;
        self
    }

    /// The same refusal of another field; one that is about no field stays as it is.
    #[must_use]
    pub fn blaming(mut self, field: &str) -> Self {
        if let Detail::Fields(fields) = &mut self.0.detail {
            for (name, _) in fields {
                self.0.message = self.0.message.replace(name.as_str(), field);
                field.clone_into(name);
            }
            self.0.metadata.insert("field".to_owned(), field.to_owned());
        }
        self
    }

    /// A number above (or below) what the configuration allows.
    pub fn over_limit(
        field: impl Into<String>,
        value: impl std::fmt::Display,
        limit: impl std::fmt::Display,
    ) -> Self {
        Self::invalid_field(field, format!("{value} is over the limit of {limit}"))
            .with("value", value)
            .with("limit", limit)
    }

    /// A resource that is not there, for a caller that may know. `kind` is `adapter`, `adapter version`, ...
    pub fn not_found(reason: &'static str, kind: &'static str, name: impl Into<String>) -> Self {
        let name = name.into();
        Self::new(
            Code::NotFound,
            reason,
            format!("{kind} {name} does not exist"),
        )
        .with("resource", &name)
        .about(kind, name)
    }

    /// A resource that is there already.
    pub fn already_exists(
        reason: &'static str,
        kind: &'static str,
        name: impl Into<String>,
    ) -> Self {
        let name = name.into();
        Self::new(
            Code::AlreadyExists,
            reason,
            format!("{kind} {name} exists already"),
        )
        .with("resource", &name)
        .about(kind, name)
    }

    /// A quota of a tenant or key. With `retry` it refills; without, waiting does not help.
    pub fn quota(
        reason: &'static str,
        subject: impl Into<String>,
        message: impl Into<String>,
        retry: Option<Duration>,
    ) -> Self {
        let message = message.into();
        let mut refusal = Self::new(Code::ResourceExhausted, reason, message.clone());
        refusal.0.detail = Detail::Quota {
            subject: subject.into(),
            description: message,
            retry,
        };
        refusal
    }

    /// A state of the system that must change first. `kind` is a short constant such as `IN_USE`.
    pub fn precondition(
        reason: &'static str,
        kind: &'static str,
        subject: impl Into<String>,
        message: impl Into<String>,
    ) -> Self {
        let message = message.into();
        let mut refusal = Self::new(Code::FailedPrecondition, reason, message.clone());
        refusal.0.detail = Detail::Precondition {
            kind,
            subject: subject.into(),
            description: message,
        };
        refusal
    }

    /// Not now; another replica or a moment later will do. The only kind that clients retry by themselves.
    pub fn unavailable(
        reason: &'static str,
        message: impl Into<String>,
        retry_after: Duration,
    ) -> Self {
        let mut refusal = Self::new(Code::Unavailable, reason, message);
        refusal.0.detail = Detail::Retry(retry_after);
        refusal
    }

    /// Something broke here. The cause goes to the log, never to the client.
    pub fn internal(cause: impl std::fmt::Display) -> Self {
        tracing::error!(cause = %cause, "a call failed inside the server");
        Self::new(
            Code::Internal,
            "INTERNAL",
            "the server failed to carry out the call; its log has the cause under this request id",
        )
    }

    /// Adds one metadata entry; every value in the message that changes from call to call belongs here too.
    #[must_use]
    pub fn with(mut self, key: &'static str, value: impl ToString) -> Self {
        self.0.metadata.insert(key.to_owned(), value.to_string());
        self
    }

    /// Names the resource that the error is about.
    #[must_use]
    pub fn about(mut self, kind: &'static str, name: impl Into<String>) -> Self {
        self.0.detail = Detail::Resource {
            kind,
            name: name.into(),
        };
        self
    }

    /// The reason, for metrics and tests.
    pub fn reason(&self) -> &'static str {
        self.0.reason
    }

    /// The gRPC code.
    pub fn code(&self) -> Code {
        self.0.code
    }

    /// The message for people.
    pub fn message(&self) -> &str {
        &self.0.message
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Status {
        let Parts {
            code,
            reason,
            message,
            metadata,
            detail,
        } = *refusal.0;
        let mut details = ErrorDetails::new();
        details.set_error_info(reason, DOMAIN, metadata);
        let mut pushback = None;
        match detail {
            Detail::None => {}
            Detail::Fields(fields) => {
                for (field, why) in fields {
                    details.add_bad_request_violation(field, why);
                }
            }
            Detail::Resource { kind, name } => {
                details.set_resource_info(kind, name, "", message.clone());
            }
            Detail::Quota {
                subject,
                description,
                retry,
            } => {
                details.add_quota_failure_violation(subject, description);
                if let Some(after) = retry {
                    details.set_retry_info(Some(after));
                }
            }
            Detail::Precondition {
                kind,
                subject,
                description,
            } => {
                details.add_precondition_failure_violation(kind, subject, description);
            }
            Detail::Retry(after) => {
                details.set_retry_info(Some(after));
                pushback = Some(after);
            }
        }
        let mut status = Status::with_error_details(code, message, details);
        if let Some(after) = pushback {
            status.metadata_mut().insert(
                PUSHBACK,
                MetadataValue::from(u64::try_from(after.as_millis()).unwrap_or(u64::MAX)),
            );
        }
        status
    }
}

/// What every error on the wire must have, whoever made it: `RequestInfo`, and an `ErrorInfo` even when tonic itself or a
/// library below it refused the call.
pub(crate) fn complete(found: Status, request_id: &str) -> Status {
    let mut details = found.get_error_details();
    let mut code = found.code();
    if details.error_info().is_none() {
        let reason = match code {
            Code::OutOfRange => "MESSAGE_TOO_LARGE",
            Code::Unimplemented => "METHOD_UNKNOWN",
            Code::Cancelled => "CANCELLED",
            Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
            // Bytes that are no message are the sender's fault, not ours.
            Code::Internal if found.message().contains("decode") => {
                code = Code::InvalidArgument;
                "MESSAGE_MALFORMED"
            }
            _ => "INTERNAL",
        };
        details.set_error_info(reason, DOMAIN, HashMap::<String, String>::new());
    }
    details.set_request_info(request_id, "");
    let mut metadata = found.metadata().clone();
    metadata.remove("grpc-status-details-bin");
    Status::with_error_details_and_metadata(code, found.message(), details, metadata)
}

/// A status as a field of a message: for items that are refused while the stream that carries them goes on.
pub(crate) fn in_message(status: &Status) -> espalier_proto::rpc::Status {
    use prost::Message;
    // The details of a tonic status are this very message, encoded.
    let details = espalier_proto::rpc::Status::decode(status.details())
        .map(|found| found.details)
        .unwrap_or_default();
    espalier_proto::rpc::Status {
        code: status.code().into(),
        message: status.message().to_owned(),
        details,
    }
}

/// A code as metrics and logs write it.
pub(crate) fn code_name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    #[test]
    fn every_kind_has_one_error_info_and_its_detail() {
        let cases: Vec<(Refusal, Code, &str)> = vec![
            (
                Refusal::over_limit("sampling.n", 17, 16),
                Code::InvalidArgument,
                "INVALID_FIELD",
            ),
            (
                Refusal::not_found("ADAPTER_NOT_FOUND", "adapter", "tenants/a/adapters/b"),
                Code::NotFound,
                "ADAPTER_NOT_FOUND",
            ),
            (
                Refusal::quota("QUOTA_EXCEEDED", "tenants/a", "9 of 9 adapters", None),
                Code::ResourceExhausted,
                "QUOTA_EXCEEDED",
            ),
            (
                Refusal::precondition("RESOURCE_IN_USE", "IN_USE", "tenants/a", "in use"),
                Code::FailedPrecondition,
                "RESOURCE_IN_USE",
            ),
            (
                Refusal::unavailable("SERVER_OVERLOADED", "full", Duration::from_millis(250)),
                Code::Unavailable,
                "SERVER_OVERLOADED",
            ),
            (Refusal::internal("secret path"), Code::Internal, "INTERNAL"),
        ];
        for (refusal, code, reason) in cases {
            let status = Status::from(refusal);
            let details = status.get_error_details();
            let info = details.error_info().unwrap();
            assert_eq!(
                (status.code(), info.reason.as_str(), info.domain.as_str()),
                (code, reason, DOMAIN)
            );
            assert_eq!(
                details.bad_request().is_some(),
                code == Code::InvalidArgument
            );
            assert_eq!(details.resource_info().is_some(), code == Code::NotFound);
            assert_eq!(
                details.quota_failure().is_some(),
                code == Code::ResourceExhausted
            );
            assert_eq!(
                details.precondition_failure().is_some(),
                code == Code::FailedPrecondition
            );
            assert_eq!(details.retry_info().is_some(), code == Code::Unavailable);
            assert_eq!(
                status.metadata().contains_key(PUSHBACK),
                code == Code::Unavailable
            );
            assert!(!status.message().contains("secret path"));
        }
    }

    #[test]
    fn an_over_limit_field_names_value_and_limit() {
        let status = Status::from(Refusal::over_limit("sampling.n", 17, 16));
        assert_eq!(status.message(), "sampling.n: 17 is over the limit of 16");
        let info = status.get_error_details().error_info().unwrap().clone();
        assert_eq!(
            (
                info.metadata["value"].as_str(),
                info.metadata["limit"].as_str()
            ),
            ("17", "16")
        );
    }
}
