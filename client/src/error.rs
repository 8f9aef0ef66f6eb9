//! One error for everything that can go wrong in a call: what the server's status and its
//! details say, in fields, with a next step for people. Knows no transport beyond tonic's status.

use std::{
    collections::BTreeMap,
    fmt,
    ops::{Deref, DerefMut},
    time::Duration,
};

use tonic::{Code, Status};
use tonic_types::StatusExt;

/// Metadata by which a server says how long to wait, or (negative) not to come again.
const PUSHBACK: &str = "grpc-retry-pushback-ms";

/// A field that the server refused.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FieldViolation {
    /// The field's path.
    pub field: String,
    /// Why it was refused.
    pub description: String,
}

/// A failed call. Its fields are those of [`Fault`], which lies behind a pointer so that
/// results stay small.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Error(Box<Fault>);

impl Deref for Error {
    type Target = Fault;

    fn deref(&self) -> &Fault {
        &self.0
    }
}

impl DerefMut for Error {
    fn deref_mut(&mut self) -> &mut Fault {
        &mut self.0
    }
}

/// What is known of a failed call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The gRPC code.
    pub code: Code,
    /// The stable reason, UPPER_SNAKE; for example `ADAPTER_NOT_FOUND`. Reasons that begin
    /// with `CLIENT_` were found on this side.
    pub reason: String,
    /// For people.
    pub message: String,
    /// Values that the message names, by key.
    pub metadata: BTreeMap<String, String>,
    /// The refused fields.
    pub field_violations: Vec<FieldViolation>,
    /// The resource that is missing, there already, or in the way.
    pub resource: Option<String>,
    /// How long the server asks to wait.
    pub retry_after: Option<Duration>,
    /// The server asks not to try again.
    pub retry_forbidden: bool,
    /// Finds the call in the server's log.
    pub request_id: Option<String>,
    /// How many attempts were made.
    pub attempts: u32,
}

impl Error {
    /// An error found on this side, before or without the server.
    #[must_use]
    pub fn local(code: Code, reason: &str, message: impl Into<String>) -> Self {
        Self(Box::new(Fault {
            code,
            reason: format!("CLIENT_{reason}"),
            message: message.into(),
            metadata: BTreeMap::new(),
            field_violations: Vec::new(),
            resource: None,
            retry_after: None,
            retry_forbidden: false,
            request_id: None,
            attempts: 0,
        }))
    }

    /// An argument that cannot be sent.
    #[must_use]
    pub fn argument(message: impl Into<String>) -> Self {
        Self::local(Code::InvalidArgument, "ARGUMENT", message)
    }

    /// A local file that cannot be read or written.
    #[must_use]
    pub fn file(path: &std::path::Path, error: &std::io::Error) -> Self {
        Self::local(
            Code::InvalidArgument,
            "FILE",
            format!("{}: {error}", path.display()),
        )
    }

    /// The deadline has passed on this side.
    #[must_use]
    pub fn deadline(after: Duration) -> Self {
        Self::local(
            Code::DeadlineExceeded,
            "DEADLINE",
            format!("no answer within {} s", after.as_secs_f64()),
        )
    }

    /// Whether the same call may be made again without asking anybody (AIP-194: UNAVAILABLE only).
    #[must_use]
    pub fn is_retryable(&self) -> bool {
        self.code == Code::Unavailable && !self.retry_forbidden
    }

    /// What a person can do about it; `None` where the message says it all.
    #[must_use]
    pub fn next_step(&self) -> Option<String> {
        let step = match self.reason.as_str() {
            "CREDENTIALS_MISSING" => "pass a key with --key or ESPALIER_API_KEY",
            "CREDENTIALS_INVALID" => {
                "check the key, or make a new one with `espalier tenants keys create TENANT`"
            }
            "PERMISSION_DENIED" => "use a key of that tenant, or another --tenant",
            "ADAPTER_NOT_FOUND" | "ADAPTER_VERSION_NOT_FOUND" | "ADAPTER_ALIAS_NOT_FOUND" => {
                "list what is there with `espalier adapters list`"
            }
            "API_KEY_NOT_FOUND" => "list what is there with `espalier tenants keys list TENANT`",
            "DATASET_NOT_FOUND" => "list what is there with `espalier data list`",
            "TRAINING_JOB_NOT_FOUND" => "list what is there with `espalier jobs list`",
            "TENANT_NOT_FOUND" => "make it with `espalier tenants create TENANT`",
            "RESOURCE_IN_USE" => "remove what uses it first, or pass --force where there is one",
            "ETAG_MISMATCH" => "somebody else changed it meanwhile: read it again, then decide",
            "CONTEXT_LENGTH_EXCEEDED" => "shorten the input or lower --max-tokens",
            "ADAPTER_INCOMPATIBLE" | "ARTIFACT_MALFORMED" => {
                "see the whole report with `espalier adapters check DIR`"
            }
            "EXPORT_UNSUPPORTED" => {
                "download it without --format, as PEFT, or have it merged into its base: `espalierd merge`"
            }
            "UNSUPPORTED_BY_MODEL" => "see what the model can do with `espalier status`",
            "SERVER_OVERLOADED" | "SERVER_DRAINING" | "SERVER_STARTING" | "ADAPTER_CAPACITY" => {
                "try again in a moment"
            }
            "CLIENT_CONNECT" => {
                "is the server running there? Start espalierd, or name another with --server"
            }
            "CLIENT_DEADLINE" | "DEADLINE_IN_QUEUE" | "DEADLINE_IN_DECODE" => {
                "give it more time with --timeout"
            }
            "CLIENT_TENANT" => "pass --tenant NAME or set ESPALIER_TENANT",
            _ => return self.step_by_code(),
        };
        Some(step.to_owned())
    }

    fn step_by_code(&self) -> Option<String> {
        let log = |id: &String| format!("the server's log has more under request id {id}");
        match self.code {
            Code::Internal | Code::DataLoss | Code::Unknown => self.request_id.as_ref().map(log),
            Code::Unavailable => Some("try again in a moment".to_owned()),
            Code::ResourceExhausted => self
                .retry_after
                .map(|wait| format!("wait {:.1} s, then try again", wait.as_secs_f64())),
            Code::Unimplemented if self.reason == "METHOD_UNKNOWN" => {
                Some("the server is older than this client, or no Espalier server".to_owned())
            }
            _ => None,
        }
    }

    /// Reads a status and its google.rpc details.
    fn decode(status: &Status) -> Self {
        let details = status.get_error_details();
        let mut error = Self::local(status.code(), "", status.message());
        error.reason = match details.error_info() {
            Some(info) => info.reason.clone(),
            None => String::new(),
        };
        if let Some(info) = details.error_info() {
            error.metadata = info.metadata.clone().into_iter().collect();
        }
        if let Some(bad) = details.bad_request() {
            let read = |v: &tonic_types::FieldViolation| FieldViolation {
                field: v.field.clone(),
                description: v.description.clone(),
            };
            error.field_violations = bad.field_violations.iter().map(read).collect();
        }
        error.resource = details.resource_info().map(|r| r.resource_name.clone());
        error.retry_after = details.retry_info().and_then(|info| info.retry_delay);
        error.request_id = details.request_info().map(|info| info.request_id.clone());
        let pushback = status.metadata().get(PUSHBACK);
        // gRFC A6: a negative or unreadable value forbids another attempt.
        match pushback.map(|value| value.to_str().unwrap_or("-1").parse::<i64>().unwrap_or(-1)) {
            Some(ms) if ms >= 0 => {
                error.retry_after = Some(Duration::from_millis(ms.unsigned_abs()));
            }
            Some(_) => error.retry_forbidden = true,
            None => {}
        }
        error
    }
}

impl From<Status> for Error {
    fn from(status: Status) -> Self {
        let mut error = Self::decode(&status);
        if error.reason.is_empty() {
            classify_transport(&mut error, &status);
        }
        error
    }
}

/// Names what tonic itself reports without details: a connection that could not be made, a
/// deadline on this side, a reply over the size limit.
fn classify_transport(error: &mut Error, status: &Status) {
    let mut causes = Vec::new();
    let mut source = std::error::Error::source(status);
    while let Some(cause) = source {
        causes.push(cause.to_string());
        source = cause.source();
    }
    if status.code() == Code::Cancelled && status.message() == "Timeout expired" {
        error.code = Code::DeadlineExceeded;
        error.reason = "CLIENT_DEADLINE".to_owned();
        error.message = "no answer within the deadline".to_owned();
        return;
    }
    if causes.is_empty() {
        return;
    }
    // The innermost cause says what happened; those around it say "transport error".
    if let Some(cause) = causes.last() {
        error.message = format!("{}: {cause}", status.message());
    }
    if status.code() == Code::Unavailable {
        error.reason = "CLIENT_CONNECT".to_owned();
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if !self.reason.is_empty() {
            write!(f, " [{}]", self.reason)?;
        }
        // A message usually names its fields; those that it does not are added.
        for violation in &self.field_violations {
            if !self.message.contains(&violation.description) {
                write!(f, "\n  {}: {}", violation.field, violation.description)?;
            }
        }
        if self.attempts > 1 {
            write!(f, " (after {} attempts)", self.attempts)?;
        }
        Ok(())
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use std::collections::HashMap;

    use tonic_types::ErrorDetails;

    use super::*;

    #[test]
    fn details_become_fields() {
        let mut details = ErrorDetails::new();
        let metadata = HashMap::from([("limit".to_owned(), "16".to_owned())]);
        details.set_error_info("INVALID_FIELD", "espalier.v1", metadata);
        details.add_bad_request_violation("sampling.n", "17 is over the limit of 16");
        details.set_request_info("req-1", "");
        details.set_resource_info("adapter", "tenants/a/adapters/b", "", "");
        details.set_retry_info(Some(Duration::from_millis(250)));
        let status = Status::with_error_details(Code::InvalidArgument, "bad request", details);
        let error = Error::from(status);
        assert_eq!(error.code, Code::InvalidArgument);
        assert_eq!(error.reason, "INVALID_FIELD");
        assert_eq!(error.metadata["limit"], "16");
        assert_eq!(error.field_violations[0].field, "sampling.n");
        assert_eq!(error.resource.as_deref(), Some("tenants/a/adapters/b"));
        assert_eq!(error.retry_after, Some(Duration::from_millis(250)));
        assert_eq!(error.request_id.as_deref(), Some("req-1"));
        let text = error.to_string();
        assert!(
            text.contains("sampling.n: 17 is over the limit of 16"),
            "{text}"
        );
        assert!(!error.is_retryable());
    }

    #[test]
    fn pushback_sets_the_wait_or_forbids() {
        let with = |value: &str| {
            let mut status = Status::unavailable("full");
            status
                .metadata_mut()
                .insert(PUSHBACK, value.parse().unwrap());
            Error::from(status)
        };
        let wait = with("1500");
        assert_eq!(wait.retry_after, Some(Duration::from_millis(1500)));
        assert!(wait.is_retryable());
        assert!(!with("-1").is_retryable());
        assert!(!with("soon").is_retryable());
    }

    #[test]
    fn a_quota_is_not_retried_and_says_how_long_to_wait() {
        let mut details = ErrorDetails::new();
        details.set_error_info("RATE_LIMIT_EXCEEDED", "espalier.v1", HashMap::new());
        details.set_retry_info(Some(Duration::from_secs(3)));
        let status = Status::with_error_details(Code::ResourceExhausted, "too fast", details);
        let error = Error::from(status);
        assert!(!error.is_retryable());
        assert_eq!(error.next_step().unwrap(), "wait 3.0 s, then try again");
    }

    #[test]
    fn a_timeout_of_the_transport_is_a_deadline() {
        let error = Error::from(Status::cancelled("Timeout expired"));
        assert_eq!(error.code, Code::DeadlineExceeded);
        assert_eq!(error.reason, "CLIENT_DEADLINE");
    }

    #[test]
    fn an_error_without_details_keeps_code_and_message() {
        let error = Error::from(Status::internal("boom"));
        assert_eq!(
            (error.code, error.message.as_str()),
            (Code::Internal, "boom")
        );
        assert_eq!(error.reason, "");
        assert_eq!(error.next_step(), None);
    }
}
