//! Whose keys and values are whose: what must be equal before two sequences may read one block.
//!
//! Keys and values depend on the tokens before them and on the weights that answered. Tokens are the prefix cache's
//! business; this names the weights, by content, and the tenant, who must not learn what others ask.

use std::sync::Arc;

use espalier_adapters::version::VersionDigest;

use crate::request::TargetVersion;

/// Two sequences may share a block only when all of this is equal. Compared in full, never by a hash of it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct CacheKey {
    tenant: Arc<str>,
    weights: Weights,
}

/// The weights that answer. Ordered so that a step's rows can stand by weights; the base model comes first.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Weights {
    /// A copy of the base into which the versions were merged: its sums round otherwise than base and adapter apart.
    merged: bool,
    /// Digests of the versions with the bits of their factors, in the order of the request: sums are taken in it.
    versions: Vec<(VersionDigest, u32)>,
}

impl CacheKey {
    /// `target` is empty for the base model. A version that was trained again has another digest, so it can never meet
    /// what its predecessor left.
    pub(crate) fn new(tenant: Arc<str>, target: &[TargetVersion], merged: bool) -> Self {
        let versions = target
            .iter()
            .map(|version| (version.digest, version.weight.to_bits()))
            .collect();
        CacheKey {
            tenant,
            weights: Weights { merged, versions },
        }
    }

    pub(crate) fn tenant(&self) -> &Arc<str> {
        &self.tenant
    }

    pub(crate) fn weights(&self) -> &Weights {
        &self.weights
    }
}

/// Keys for tests; version 0 is the base model.
#[cfg(test)]
pub(crate) fn test_key(tenant: u8, version: u8) -> Arc<CacheKey> {
    let target = TargetVersion {
        digest: VersionDigest::from_bytes([version; 32]),
        weight: 1.0,
    };
    let target = (version > 0).then_some(target);
    let tenant = format!("t{tenant}").into();
    Arc::new(CacheKey::new(tenant, target.as_slice(), false))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenant_order_weight_and_merging_count() {
        let version = |byte, weight| TargetVersion {
            digest: VersionDigest::from_bytes([byte; 32]),
            weight,
        };
        let key = |tenant: &str, target: &[TargetVersion], merged| {
            CacheKey::new(tenant.into(), target, merged)
        };
        let target = [version(1, 0.5), version(2, 0.25)];
        let this = key("a", &target, false);
        assert_eq!(this, key("a", &target.clone(), false));
        let others = [
            key("b", &target, false),
            key("a", &target, true),
            key("a", &[version(2, 0.25), version(1, 0.5)], false),
            key("a", &[version(1, 0.5), version(2, 0.125)], false),
            key("a", &target[..1], false),
            key("a", &[], false),
        ];
        for other in others {
            assert_ne!(this, other);
        }
    }
}
