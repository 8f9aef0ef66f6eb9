//! What an adapter version is made of and how it is known: up to four byte strings and the digest over them.
//!
//! Bytes are kept exactly as they came, so that what goes out is what came in. This file must not interpret them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::error::AdapterError;

/// An adapter as files: the bytes that were uploaded or that training wrote.
#[derive(Clone, PartialEq, Eq)]
pub struct AdapterArtifact {
    /// `adapter_config.json`.
    pub config_json: Vec<u8>,
    /// `adapter_model.safetensors`.
    pub safetensors: Vec<u8>,
    /// `labels.json`: an array of strings, index = row of `score`.
    pub labels_json: Option<Vec<u8>>,
    /// `head.json`: what a head's logits mean, where that is not plain softmax over the labels.
    pub head_json: Option<Vec<u8>>,
}

impl AdapterArtifact {
    /// Name of the configuration in a directory.
    pub const CONFIG_FILE: &'static str = "adapter_config.json";
    /// Name of the tensors in a directory.
    pub const WEIGHTS_FILE: &'static str = "adapter_model.safetensors";
    /// Name of the labels in a directory.
    pub const LABELS_FILE: &'static str = "labels.json";
    /// Name of the head's settings in a directory.
    pub const HEAD_FILE: &'static str = "head.json";
    /// Stands for the length of labels that are absent where head settings follow, so that neither is taken for the other.
    pub const NO_LABELS: u64 = u64::MAX;

    /// Bytes of all parts.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.config_json.len()
            + self.safetensors.len()
            + self.labels_json.as_ref().map_or(0, Vec::len)
            + self.head_json.as_ref().map_or(0, Vec::len)
    }

    /// What the digest covers and the store keeps: each part that exists behind its length, in order.
    #[must_use]
    pub fn framed(&self) -> Vec<(u64, &[u8])> {
        let part = |bytes: &'_ [u8]| bytes.len() as u64;
        let mut framed: Vec<(u64, &[u8])> = [&self.config_json, &self.safetensors]
            .into_iter()
            .chain(&self.labels_json)
            .map(|bytes| (part(bytes), bytes.as_slice()))
            .collect();
        if let Some(head) = &self.head_json {
            if self.labels_json.is_none() {
                framed.push((Self::NO_LABELS, &[]));
            }
            framed.push((part(head), head.as_slice()));
        }
        framed
    }

    /// SHA-256 over `espalier-adapter-v1`, a zero byte, and each part that exists, prefixed by its length as a
    /// little-endian u64: configuration, tensors, labels, head settings. Absent labels add nothing, so they differ from
    /// empty ones, which add a length of zero; before head settings they add [`AdapterArtifact::NO_LABELS`].
    #[must_use]
    pub fn digest(&self) -> VersionDigest {
        let mut hash = Sha256::new();
        hash.update(b"espalier-adapter-v1\0");
        for (length, part) in self.framed() {
            hash.update(length.to_le_bytes());
            hash.update(part);
        }
        VersionDigest(hash.finalize().into())
    }
}

impl fmt::Debug for AdapterArtifact {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AdapterArtifact")
            .field("config_json", &self.config_json.len())
            .field("safetensors", &self.safetensors.len())
            .field("labels_json", &self.labels_json.as_ref().map(Vec::len))
            .field("head_json", &self.head_json.as_ref().map(Vec::len))
            .finish()
    }
}

/// The identity of an adapter version: the SHA-256 of its content.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct VersionDigest([u8; 32]);

impl VersionDigest {
    /// From the 32 bytes of the hash.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The 32 bytes of the hash.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl fmt::Display for VersionDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for VersionDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VersionDigest({self})")
    }
}

impl FromStr for VersionDigest {
    type Err = AdapterError;

    /// 64 lower-case hexadecimal digits: one spelling for one version.
    fn from_str(text: &str) -> Result<Self, AdapterError> {
        let bad = || AdapterError::Digest {
            found: text.chars().take(80).collect(),
        };
        if text.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(bad());
        }
        let mut bytes = [0; 32];
        hex::decode_to_slice(text, &mut bytes).map_err(|_| bad())?;
        Ok(Self(bytes))
    }
}

impl From<VersionDigest> for String {
    fn from(digest: VersionDigest) -> Self {
        digest.to_string()
    }
}

impl TryFrom<String> for VersionDigest {
    type Error = AdapterError;

    fn try_from(text: String) -> Result<Self, AdapterError> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    fn artifact(labels: Option<&[u8]>) -> AdapterArtifact {
        AdapterArtifact {
            config_json: b"{\"r\": 4}".to_vec(),
            safetensors: b"tensors\x00\xff".to_vec(),
            labels_json: labels.map(<[u8]>::to_vec),
            head_json: None,
        }
    }

    /// Computed with Python's hashlib and struct from the definition: other tools must find the same digest.
    #[test]
    fn the_digest_is_the_one_that_is_defined() {
        let digest = |labels| artifact(labels).digest().to_string();
        assert_eq!(
            digest(Some(b"[\"a\"]")),
            "77fffa420ad1a5227ef4122652b304c8bbc7ed17a847514b4ff9ed394d0c45d4"
        );
        assert_eq!(
            digest(None),
            "6a23061a87ed5182f72f552ac0803616a977c6ed5e72f66363933e87604d4eb7"
        );
        assert_eq!(
            digest(Some(b"")),
            "f0f60892d103e91008a07564f86aed38b09a0b04c53b874aac76b80ac88bef0e"
        );
    }

    #[test]
    fn head_settings_are_covered_and_are_no_labels() {
        let mut head = artifact(None);
        head.head_json = Some(b"{}".to_vec());
        let as_labels = artifact(Some(b"{}")).digest();
        assert_ne!(head.digest(), artifact(None).digest());
        assert_ne!(head.digest(), as_labels);
        let mut both = artifact(Some(b""));
        both.head_json = Some(b"{}".to_vec());
        assert_ne!(both.digest(), head.digest());
    }

    #[test]
    fn a_byte_that_moves_between_parts_changes_the_digest() {
        let whole = artifact(None);
        let mut moved = whole.clone();
        let byte = moved.safetensors.remove(0);
        moved.config_json.push(byte);
        assert_eq!(moved.bytes(), whole.bytes());
        assert_ne!(moved.digest(), whole.digest());
    }

    #[test]
    fn a_digest_has_one_spelling() {
        let digest = artifact(None).digest();
        let text = digest.to_string();
        assert_eq!(text.parse::<VersionDigest>().unwrap(), digest);
        let json = serde_json::to_string(&digest).unwrap();
        assert_eq!(
            serde_json::from_str::<VersionDigest>(&json).unwrap(),
            digest
        );
        for bad in [
            "",
            "ab",
            &text[1..],
            &text.to_uppercase(),
            &format!("{text}0"),
            &"é".repeat(64),
        ] {
            let error = bad.parse::<VersionDigest>().unwrap_err().to_string();
            assert!(error.contains("64 lower-case"), "{error}");
        }
    }
}
