//! Short names for people: `tickets` becomes `tenants/acme/adapters/tickets`. Only the shape
//! is looked at; whether a name is well formed and exists is the server's business.

use tonic::Code;

use crate::error::Error;

/// Expands short names for one tenant.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Names {
    tenant: Option<String>,
}

impl Names {
    /// Names of a tenant, given as `acme` or `tenants/acme`; without one, only whole names can be used.
    #[must_use]
    pub fn new(tenant: Option<&str>) -> Self {
        let strip = |t: &str| t.trim_start_matches("tenants/").to_owned();
        let tenant = tenant.map(strip).filter(|t| !t.is_empty());
        Self { tenant }
    }

    /// `tenants/{t}` of this client.
    pub fn parent(&self) -> Result<String, Error> {
        match &self.tenant {
            Some(tenant) => Ok(format!("tenants/{tenant}")),
            None => Err(Error::local(
                Code::InvalidArgument,
                "TENANT",
                "this needs a tenant, and neither a whole resource name nor --tenant names one",
            )),
        }
    }

    /// Whether a tenant is known.
    #[must_use]
    pub fn has_tenant(&self) -> bool {
        self.tenant.is_some()
    }

    /// `acme` or `tenants/acme`.
    #[must_use]
    pub fn tenant(&self, name: &str) -> String {
        if name.starts_with("tenants/") {
            name.to_owned()
        } else {
            format!("tenants/{name}")
        }
    }

    /// An adapter or a version of it: `tickets`, `tickets@canary`, `tickets/7`,
    /// `tickets/versions/7`, or any of them with `tenants/{t}/adapters/` in front.
    pub fn adapter(&self, name: &str) -> Result<String, Error> {
        let (prefix, rest) = match name.split_once("/adapters/") {
            Some((tenant, rest)) if name.starts_with("tenants/") => (tenant.to_owned(), rest),
            _ => (self.parent()?, name),
        };
        let rest = match rest.split_once('/') {
            Some((adapter, number)) if number.bytes().all(|b| b.is_ascii_digit()) => {
                format!("{adapter}/versions/{number}")
            }
            _ => rest.to_owned(),
        };
        Ok(format!("{prefix}/adapters/{rest}"))
    }

    /// `refunds` or `tenants/{t}/datasets/refunds`.
    pub fn dataset(&self, name: &str) -> Result<String, Error> {
        self.child("datasets", name)
    }

    /// A job's id or whole name.
    pub fn job(&self, name: &str) -> Result<String, Error> {
        self.child("trainingJobs", name)
    }

    /// A bulk job's id or whole name.
    pub fn bulk_job(&self, name: &str) -> Result<String, Error> {
        self.child("bulkJobs", name)
    }

    /// A key's id or whole name.
    pub fn api_key(&self, name: &str) -> Result<String, Error> {
        self.child("apiKeys", name)
    }

    fn child(&self, collection: &str, name: &str) -> Result<String, Error> {
        if name.starts_with("tenants/") {
            return Ok(name.to_owned());
        }
        Ok(format!("{}/{collection}/{name}", self.parent()?))
    }
}

/// The last part of a resource name, for tables.
#[must_use]
pub fn short(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// Splits `tenants/{t}/adapters/{a}[/versions/{n}|@alias]` into its adapter and the rest.
#[must_use]
pub fn adapter_of(name: &str) -> &str {
    let end = name.find("/versions/").or_else(|| name.find('@'));
    &name[..end.unwrap_or(name.len())]
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;

    #[test]
    fn short_names_expand_and_whole_ones_stay() {
        let names = Names::new(Some("acme"));
        let cases = [
            ("tickets", "tenants/acme/adapters/tickets"),
            ("tickets@canary", "tenants/acme/adapters/tickets@canary"),
            ("tickets/7", "tenants/acme/adapters/tickets/versions/7"),
            (
                "tickets/versions/7",
                "tenants/acme/adapters/tickets/versions/7",
            ),
            ("tenants/globex/adapters/x", "tenants/globex/adapters/x"),
            (
                "tenants/globex/adapters/x/3",
                "tenants/globex/adapters/x/versions/3",
            ),
            (
                "tenants/globex/adapters/x@old",
                "tenants/globex/adapters/x@old",
            ),
        ];
        for (given, expected) in cases {
            assert_eq!(names.adapter(given).unwrap(), expected);
        }
        assert_eq!(names.dataset("d").unwrap(), "tenants/acme/datasets/d");
        assert_eq!(names.job("j").unwrap(), "tenants/acme/trainingJobs/j");
        assert_eq!(names.api_key("k").unwrap(), "tenants/acme/apiKeys/k");
        assert_eq!(names.tenant("b"), "tenants/b");
        assert_eq!(Names::new(Some("tenants/acme")), names);
    }

    #[test]
    fn without_a_tenant_only_whole_names_work() {
        let names = Names::new(None);
        let error = names.adapter("tickets").unwrap_err();
        assert_eq!(error.reason, "CLIENT_TENANT");
        assert!(error.next_step().unwrap().contains("--tenant"));
        assert!(names.adapter("tenants/a/adapters/b").is_ok());
        assert_eq!(Names::new(Some("")), names);
    }

    #[test]
    fn parts_of_names() {
        assert_eq!(
            adapter_of("tenants/a/adapters/b/versions/3"),
            "tenants/a/adapters/b"
        );
        assert_eq!(adapter_of("tenants/a/adapters/b@c"), "tenants/a/adapters/b");
        assert_eq!(adapter_of("tenants/a/adapters/b"), "tenants/a/adapters/b");
        assert_eq!(short("tenants/a/adapters/b"), "b");
    }
}
