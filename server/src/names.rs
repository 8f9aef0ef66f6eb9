//! Resource names, parsed once: the text of a name becomes a type here and never travels on as a string.
//!
//! The grammar is `tenants/{t}/adapters/{a}/versions/{n}`, `tenants/{t}/trainingJobs/{j}`, `tenants/{t}/datasets/{d}`,
//! `tenants/{t}/apiKeys/{k}` and `tenants/{t}`. A request may also write `tenants/{t}/adapters/{a}` (alias `default`) or
//! `tenants/{t}/adapters/{a}@{alias}`. This file must not know what exists: whether a name resolves is the registry's business.

use std::fmt;
use std::num::NonZeroU32;
use std::str::FromStr;
use std::sync::Arc;

/// Longest id of a tenant, adapter, dataset, job or key, in bytes (a DNS label).
pub const MAX_ID_LENGTH: usize = 63;
/// Longest alias, in bytes.
pub const MAX_ALIAS_LENGTH: usize = 128;
/// Longest whole resource name that is looked at; anything longer is refused before it is parsed.
pub const MAX_NAME_LENGTH: usize = 512;
/// The alias that a bare adapter name stands for.
pub const DEFAULT_ALIAS: &str = "default";

const ID_RULE: &str = "1 to 63 characters a-z, 0-9 and '-', with no '-' at either end";
const ALIAS_RULE: &str =
    "2 to 128 characters: a-z first, then a-z, A-Z, 0-9 and '-', and a-z or 0-9 last";
const VERSION_RULE: &str = "a positive decimal number below 2^31 without sign or leading zero";

/// Why a text is not a resource name. The value shown is cut and escaped, so that a log line stays one line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {value:?} is not valid: it must be {rule}")]
pub struct NameError {
    /// What was being parsed: `adapter id`, `alias`, `resource name`.
    pub what: &'static str,
    /// At most 80 characters of the offending text.
    pub value: String,
    /// What the text must look like.
    pub rule: &'static str,
}

impl NameError {
    fn new(what: &'static str, value: &str, rule: &'static str) -> Self {
        let value = if value.chars().count() > 80 {
            let mut cut: String = value.chars().take(77).collect();
            cut.push_str("...");
            cut
        } else {
            value.to_owned()
        };
        Self { what, value, rule }
    }
}

fn is_id(text: &str) -> bool {
    let bytes = text.as_bytes();
    let plain = |b: &u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    (1..=MAX_ID_LENGTH).contains(&bytes.len())
        && bytes.iter().all(|b| plain(b) || *b == b'-')
        && bytes.first().is_some_and(plain)
        && bytes.last().is_some_and(plain)
}

fn is_alias(text: &str) -> bool {
    let bytes = text.as_bytes();
    (2..=MAX_ALIAS_LENGTH).contains(&bytes.len())
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || *b == b'-')
        && bytes.first().is_some_and(u8::is_ascii_lowercase)
        && bytes
            .last()
            .is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit())
}

/// Declares an id type: a checked, cheaply cloned string.
macro_rules! id_type {
    ($(#[$doc:meta])* $name:ident, $what:literal, $check:ident, $rule:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// Checks `text` against the rule of this kind of id.
            pub fn parse(text: &str) -> Result<Self, NameError> {
                if $check(text) {
                    Ok(Self(Arc::from(text)))
                } else {
                    Err(NameError::new($what, text, $rule))
                }
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::parse(text)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

id_type!(
    /// A tenant: the `t` of `tenants/t`.
    TenantId, "tenant id", is_id, ID_RULE
);
id_type!(
    /// An adapter within a tenant.
    AdapterId, "adapter id", is_id, ID_RULE
);
id_type!(
    /// A dataset within a tenant.
    DatasetId, "dataset id", is_id, ID_RULE
);
id_type!(
    /// A training job within a tenant.
    JobId, "training job id", is_id, ID_RULE
);
id_type!(
    /// A bulk job within a tenant.
    BulkJobId, "bulk job id", is_id, ID_RULE
);
id_type!(
    /// An API key; unique over the whole server because it is the part of a key by which its row is found.
    ApiKeyId, "api key id", is_id, ID_RULE
);
id_type!(
    /// A mutable pointer to a version. It can never look like a version number.
    Alias, "alias", is_alias, ALIAS_RULE
);

impl Alias {
    /// The alias `default`.
    pub fn default_alias() -> Self {
        Self(Arc::from(DEFAULT_ALIAS))
    }

    /// Whether this is `default`.
    pub fn is_default(&self) -> bool {
        self.as_str() == DEFAULT_ALIAS
    }
}

/// Number of a version within its adapter: 1, 2, 3, never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VersionNumber(NonZeroU32);

impl VersionNumber {
    /// The number of an adapter's first version.
    pub const FIRST: Self = Self(NonZeroU32::MIN);

    /// `None` for zero and for what does not fit in 31 bits.
    pub fn new(number: u32) -> Option<Self> {
        NonZeroU32::new(number)
            .filter(|n| n.get() <= i32::MAX as u32)
            .map(Self)
    }

    /// The number itself.
    pub fn get(self) -> u32 {
        self.0.get()
    }

    /// Parses the canonical decimal form.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let canonical = !text.is_empty()
            && text.len() <= 10
            && text.bytes().all(|b| b.is_ascii_digit())
            && !text.starts_with('0');
        canonical
            .then(|| text.parse::<u32>().ok().and_then(Self::new))
            .flatten()
            .ok_or_else(|| NameError::new("version number", text, VERSION_RULE))
    }
}

impl fmt::Display for VersionNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Splits `tenants/{t}/{collection}/{id}` and returns the two ids.
fn split<'a>(
    text: &'a str,
    collection: &str,
    rule: &'static str,
) -> Result<(&'a str, &'a str), NameError> {
    let wrong = || NameError::new("resource name", text, rule);
    if text.len() > MAX_NAME_LENGTH {
        return Err(wrong());
    }
    let mut parts = text.split('/');
    match (
        parts.next(),
        parts.next(),
        parts.next(),
        parts.next(),
        parts.next(),
    ) {
        (Some("tenants"), Some(tenant), Some(found), Some(id), None) if found == collection => {
            Ok((tenant, id))
        }
        _ => Err(wrong()),
    }
}

/// Declares the name of a child resource of a tenant.
macro_rules! child_name {
    ($(#[$doc:meta])* $name:ident, $id:ident, $field:ident, $collection:literal, $rule:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name {
            /// The tenant that owns the resource.
            pub tenant: TenantId,
            /// The id within the tenant.
            pub $field: $id,
        }

        impl $name {
            /// Puts a name together from its checked parts.
            pub fn new(tenant: TenantId, $field: $id) -> Self {
                Self { tenant, $field }
            }

            /// Parses the full resource name.
            pub fn parse(text: &str) -> Result<Self, NameError> {
                let (tenant, id) = split(text, $collection, $rule)?;
                Ok(Self {
                    tenant: TenantId::parse(tenant)?,
                    $field: $id::parse(id)?,
                })
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                Self::parse(text)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!("tenants/{}/", $collection, "/{}"), self.tenant, self.$field)
            }
        }
    };
}

child_name!(
    /// `tenants/{t}/adapters/{a}`
    AdapterName, AdapterId, adapter, "adapters", "tenants/{tenant}/adapters/{adapter}"
);
child_name!(
    /// `tenants/{t}/datasets/{d}`
    DatasetName, DatasetId, dataset, "datasets", "tenants/{tenant}/datasets/{dataset}"
);
child_name!(
    /// `tenants/{t}/trainingJobs/{j}`
    JobName, JobId, job, "trainingJobs", "tenants/{tenant}/trainingJobs/{job}"
);
child_name!(
    /// `tenants/{t}/bulkJobs/{j}`
    BulkJobName, BulkJobId, job, "bulkJobs", "tenants/{tenant}/bulkJobs/{job}"
);
/// Whose keys: a tenant's, or the server's own (service and admin keys), written `tenants/-`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeyParent {
    /// `tenants/-`
    Server,
    /// `tenants/{t}`
    Tenant(TenantId),
}

impl KeyParent {
    /// Parses `tenants/{t}` or `tenants/-`.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        match text {
            "tenants/-" => Ok(Self::Server),
            _ => Ok(Self::Tenant(TenantName::parse(text)?.0)),
        }
    }

    /// The tenant, if it is one's.
    pub fn tenant(&self) -> Option<&TenantId> {
        match self {
            Self::Server => None,
            Self::Tenant(tenant) => Some(tenant),
        }
    }
}

impl fmt::Display for KeyParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tenants/{}", self.tenant().map_or("-", TenantId::as_str))
    }
}

/// `tenants/{t}/apiKeys/{k}` or `tenants/-/apiKeys/{k}`
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ApiKeyName {
    /// Whose key it is.
    pub parent: KeyParent,
    /// The id.
    pub key: ApiKeyId,
}

impl ApiKeyName {
    /// Parses the full resource name.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let rule = "tenants/{tenant}/apiKeys/{key}";
        let (tenant, key) = split(text, "apiKeys", rule)?;
        let parent = match tenant {
            "-" => KeyParent::Server,
            tenant => KeyParent::Tenant(TenantId::parse(tenant)?),
        };
        Ok(Self {
            parent,
            key: ApiKeyId::parse(key)?,
        })
    }
}

impl fmt::Display for ApiKeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/apiKeys/{}", self.parent, self.key)
    }
}

/// `tenants/{t}`
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TenantName(pub TenantId);

impl TenantName {
    /// Parses the full resource name.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        match text.strip_prefix("tenants/") {
            Some(id) if text.len() <= MAX_NAME_LENGTH => Ok(Self(TenantId::parse(id)?)),
            _ => Err(NameError::new("resource name", text, "tenants/{tenant}")),
        }
    }
}

impl fmt::Display for TenantName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "tenants/{}", self.0)
    }
}

/// `tenants/{t}/adapters/{a}/versions/{n}`: the canonical name that every reply carries.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VersionName {
    /// The adapter that the version belongs to.
    pub adapter: AdapterName,
    /// Its number within the adapter.
    pub number: VersionNumber,
}

impl VersionName {
    /// Puts a name together from its checked parts.
    pub fn new(adapter: AdapterName, number: VersionNumber) -> Self {
        Self { adapter, number }
    }

    /// Parses the full resource name; an alias is refused.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let rule = "tenants/{tenant}/adapters/{adapter}/versions/{number}";
        let wrong = || NameError::new("resource name", text, rule);
        if text.len() > MAX_NAME_LENGTH {
            return Err(wrong());
        }
        let (adapter, number) = text.rsplit_once("/versions/").ok_or_else(wrong)?;
        Ok(Self {
            adapter: AdapterName::parse(adapter)?,
            number: VersionNumber::parse(number)?,
        })
    }
}

impl FromStr for VersionName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::parse(text)
    }
}

impl fmt::Display for VersionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/versions/{}", self.adapter, self.number)
    }
}

/// Which of an adapter's versions a reference means.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Selector {
    /// Whatever the alias points to when the request is resolved.
    Alias(Alias),
    /// This version for good.
    Version(VersionNumber),
}

/// What a request writes to name an adapter: bare, `@alias` or `/versions/n`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AdapterRef {
    /// The adapter.
    pub adapter: AdapterName,
    /// The version asked for.
    pub selector: Selector,
}

impl AdapterRef {
    /// Parses a reference. The empty text is no reference: it means the base model, which the caller decides.
    pub fn parse(text: &str) -> Result<Self, NameError> {
        let rule =
            "tenants/{tenant}/adapters/{adapter}, with @{alias} or /versions/{number} after it";
        if text.len() > MAX_NAME_LENGTH {
            return Err(NameError::new("adapter reference", text, rule));
        }
        if let Some((adapter, alias)) = text.split_once('@') {
            return Ok(Self {
                adapter: AdapterName::parse(adapter)?,
                selector: Selector::Alias(Alias::parse(alias)?),
            });
        }
        if text.contains("/versions/") {
            let version = VersionName::parse(text)?;
            return Ok(version.into());
        }
        let adapter = AdapterName::parse(text).map_err(|error| match error.what {
            "resource name" => NameError::new("adapter reference", text, rule),
            _ => error,
        })?;
        Ok(adapter.into())
    }
}

impl From<AdapterName> for AdapterRef {
    fn from(adapter: AdapterName) -> Self {
        Self {
            adapter,
            selector: Selector::Alias(Alias::default_alias()),
        }
    }
}

impl From<VersionName> for AdapterRef {
    fn from(version: VersionName) -> Self {
        Self {
            adapter: version.adapter,
            selector: Selector::Version(version.number),
        }
    }
}

impl FromStr for AdapterRef {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        Self::parse(text)
    }
}

impl fmt::Display for AdapterRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.selector {
            Selector::Alias(alias) if alias.is_default() => self.adapter.fmt(f),
            Selector::Alias(alias) => write!(f, "{}@{alias}", self.adapter),
            Selector::Version(number) => write!(f, "{}/versions/{number}", self.adapter),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    #[test]
    fn ids_at_and_over_the_limit() {
        for good in ["a", "7", "acme", "a-b", &"x".repeat(63), "4f1c-9"] {
            assert_eq!(TenantId::parse(good).unwrap().as_str(), good);
        }
        let over = "x".repeat(64);
        for bad in [
            "",
            "-",
            "-a",
            "a-",
            "A",
            "a_b",
            "a.b",
            "..",
            ".",
            "a/b",
            "a\\b",
            "a\0b",
            "a b",
            "ä",
            "a\u{202e}b",
            "ａ",
            "a\n",
            "a@b",
            "%2e%2e",
            &over,
        ] {
            assert!(TenantId::parse(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn aliases_never_look_like_numbers() {
        let (longest, over) = ("a".repeat(128), "a".repeat(129));
        for good in ["default", "canary", "v2", "blue-2Green3x", &longest] {
            assert!(Alias::parse(good).is_ok(), "{good}");
        }
        for bad in [
            "", "a", "7", "12", "7a", "-a", "a-", "aB", "a/b", "..", "Stable", "é9", &over,
        ] {
            assert!(Alias::parse(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn version_numbers_are_canonical() {
        assert_eq!(VersionNumber::parse("1").unwrap().get(), 1);
        assert_eq!(
            VersionNumber::parse("2147483647").unwrap().get(),
            i32::MAX as u32
        );
        for bad in [
            "",
            "0",
            "01",
            "+1",
            "-1",
            "1 ",
            "2147483648",
            "99999999999",
            "１",
            "1.0",
            "0x1",
        ] {
            assert!(VersionNumber::parse(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn references_round_trip() {
        for text in [
            "tenants/acme/adapters/tickets",
            "tenants/acme/adapters/tickets@canary",
            "tenants/acme/adapters/tickets/versions/7",
        ] {
            assert_eq!(AdapterRef::parse(text).unwrap().to_string(), text);
        }
        let bare = AdapterRef::parse("tenants/acme/adapters/tickets").unwrap();
        assert_eq!(
            bare,
            AdapterRef::parse("tenants/acme/adapters/tickets@default").unwrap()
        );
    }

    #[test]
    fn hostile_references_are_refused() {
        let long = format!("tenants/{}/adapters/a", "x".repeat(MAX_NAME_LENGTH));
        for bad in [
            "",
            "acme",
            "tenants",
            "tenants/",
            "tenants//adapters/a",
            "tenants/a/adapters",
            "tenants/a/adapters/",
            "tenants/a/adapters/b/",
            "/tenants/a/adapters/b",
            "tenants/../adapters/b",
            "tenants/a/adapters/../../b/adapters/c",
            "tenants/a/adapters/b/versions",
            "tenants/a/adapters/b/versions/",
            "tenants/a/adapters/b/versions/0",
            "tenants/a/adapters/b/versions/1/versions/2",
            "tenants/a/adapters/b/versions/default",
            "tenants/a/adapters/b@",
            "tenants/a/adapters/b@7",
            "tenants/a/adapters/b@x@y",
            "tenants/a/adapters/b@canary/versions/1",
            "tenants/a/adapters/b/versions/1@canary",
            "Tenants/a/adapters/b",
            "tenants/a/models/b",
            "tenants/a\0/adapters/b",
            "tenants/а/adapters/b",
            &long,
        ] {
            let error = AdapterRef::parse(bad).expect_err(bad);
            assert!(error.value.chars().count() <= 80, "{error}");
            assert!(!error.to_string().contains(['\n', '\0']), "{error:?}");
        }
    }

    #[test]
    fn children_keep_their_collections_apart() {
        assert!(JobName::parse("tenants/a/trainingJobs/j").is_ok());
        assert!(JobName::parse("tenants/a/datasets/j").is_err());
        assert!(DatasetName::parse("tenants/a/datasets/d").is_ok());
        assert!(ApiKeyName::parse("tenants/a/apiKeys/k").is_ok());
        assert_eq!(
            TenantName::parse("tenants/a").unwrap().to_string(),
            "tenants/a"
        );
        assert!(TenantName::parse("tenants/a/").is_err());
        assert!(VersionName::parse("tenants/a/adapters/b@canary").is_err());
    }

    proptest::proptest! {
        #[test]
        fn parsing_never_panics_and_prints_what_it_read(text in "[a-zA-Z0-9/@._\\-é]{0,80}") {
            if let Ok(parsed) = AdapterRef::parse(&text) {
                let printed = parsed.to_string();
                proptest::prop_assert_eq!(AdapterRef::parse(&printed).unwrap(), parsed);
            }
        }
    }
}
