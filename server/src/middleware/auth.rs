//! Who calls: the bearer key becomes a `Principal` before anything else looks at the call. It stands outside the router
//! and denies by default, so that a method that is added later cannot be forgotten; only health is open, because probes
//! carry no keys. This file must not know how keys are stored or what a principal may do.

use http::{HeaderMap, Request, Response};
use tonic::Status;
use tonic::body::Body;

use super::{Around, Inner, answer};
use crate::method::{Kind, Method};
use crate::status::Refusal;
use crate::telemetry::metric;
use crate::tenants::TenantStore;

/// The layer.
#[derive(Clone)]
pub(crate) struct Authenticate {
    keys: TenantStore,
}

impl Authenticate {
    pub(crate) fn new(keys: TenantStore) -> Self {
        Authenticate { keys }
    }
}

impl Around for Authenticate {
    async fn around<S: Inner>(self, mut request: Request<Body>, inner: S) -> Response<Body> {
        let method = request
            .extensions()
            .get::<Method>()
            .copied()
            .unwrap_or_default();
        if method.kind == Kind::Health {
            return answer(inner, request).await;
        }
        match self.keys.authenticate(credential(request.headers())).await {
            Ok(principal) => {
                if let Some(tenant) = principal.tenant() {
                    tracing::Span::current().record("tenant", tenant.as_str());
                }
                request.extensions_mut().insert(principal);
                answer(inner, request).await
            }
            Err(error) => {
                let refusal = Refusal::from(error);
                metrics::counter!(metric::AUTH_FAILURES, "reason" => refusal.reason()).increment(1);
                Status::from(refusal).into_http()
            }
        }
    }
}

/// The key of `authorization: Bearer KEY`. Another scheme is a credential too, and a wrong one: it must not pass as none.
fn credential(headers: &HeaderMap) -> Option<&str> {
    let text = headers
        .get(http::header::AUTHORIZATION)?
        .to_str()
        .unwrap_or("");
    match text.split_once(' ') {
        Some((scheme, key)) if scheme.eq_ignore_ascii_case("bearer") => Some(key.trim()),
        _ => Some(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;

    #[test]
    fn only_a_bearer_key_is_read_and_nothing_passes_as_none() {
        let read = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("authorization", HeaderValue::from_static(text));
            credential(&headers).map(str::to_owned)
        };
        assert_eq!(read("Bearer esp_a_b").as_deref(), Some("esp_a_b"));
        assert_eq!(read("bearer  esp_a_b").as_deref(), Some("esp_a_b"));
        assert_eq!(read("Basic eDp5").as_deref(), Some("Basic eDp5"));
        assert_eq!(read("").as_deref(), Some(""));
        assert_eq!(credential(&HeaderMap::new()), None);
    }
}
