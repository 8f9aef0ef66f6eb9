//! What the control services share: idempotency keys, pages, and byte streams that arrive in checked pieces.

use std::time::Duration;

use espalier_proto::v1;
use sha2::{Digest, Sha256};
use tonic::{Code, Streaming};

use crate::config::{Catalog, Limits};
use crate::database::RequestKey;
use crate::paging::PageRequest;
use crate::status::Refusal;

/// The idempotency key of a request; `None` when it carries no request id. `payload` is everything but the id.
pub(super) fn request_key(
    method: &'static str,
    tenant: &str,
    request_id: &str,
    payload: &[u8],
    limits: &Limits,
) -> Result<Option<RequestKey>, Refusal> {
    if request_id.is_empty() {
        return Ok(None);
    }
    crate::convert::request::request_id(request_id, limits)?;
    Ok(Some(RequestKey {
        tenant: tenant.to_owned(),
        method,
        request_id: request_id.to_owned(),
        payload: Sha256::digest(payload).into(),
    }))
}

/// The page that a list request asks for. `scope` is method and parent.
pub(super) fn page(
    scope: &str,
    size: i32,
    token: &str,
    catalog: &Catalog,
) -> Result<PageRequest, Refusal> {
    Ok(PageRequest::parse(
        scope,
        size,
        token,
        catalog.default_page_size,
        catalog.max_page_size,
    )?)
}

/// The next message of an upload; a sender that is silent for too long is cut off.
pub(super) async fn next_message<T>(
    stream: &mut Streaming<T>,
    idle: Duration,
) -> Result<Option<T>, Refusal> {
    match tokio::time::timeout(idle, stream.message()).await {
        Ok(Ok(message)) => Ok(message),
        // The sender went away or sent no message; what it gets does not matter any more.
        Ok(Err(status)) => Err(Refusal::new(
            status.code(),
            "UPLOAD_BROKEN",
            format!("the upload ended early: {}", status.message()),
        )),
        Err(_) => Err(Refusal::new(
            Code::DeadlineExceeded,
            "UPLOAD_IDLE",
            format!("the upload sent nothing for {} ms", idle.as_millis()),
        )
        .with("limit", idle.as_millis())),
    }
}

/// A file on its way in: its size and digest were announced and are checked, and memory grows only with what arrives.
pub(super) struct Incoming {
    name: &'static str,
    size: usize,
    sha256: String,
    bytes: Vec<u8>,
}

impl Incoming {
    /// Expects `size` bytes with this digest. `field` is where the metadata says so.
    pub(super) fn expect(
        name: &'static str,
        field: &str,
        size: u64,
        sha256: &str,
        limit: u64,
    ) -> Result<Self, Refusal> {
        if size == 0 {
            return Err(Refusal::invalid_field(
                format!("{field}.size_bytes"),
                format!("{name} is empty"),
            ));
        }
        if size > limit {
            return Err(Refusal::new(
                Code::InvalidArgument,
                "ARTIFACT_TOO_LARGE",
                format!("{field}.size_bytes: {name} has {size} bytes, the limit is {limit}"),
            )
            .with("value", size)
            .with("limit", limit));
        }
        let hex = sha256.len() == 64
            && sha256
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
        if !hex {
            return Err(Refusal::invalid_field(
                format!("{field}.sha256"),
                "it must be 64 lower-case hexadecimal digits",
            ));
        }
        Ok(Self {
            name,
            size: usize::try_from(size).unwrap_or(usize::MAX),
            sha256: sha256.to_owned(),
            bytes: Vec::new(),
        })
    }

    /// Takes the next piece, which must begin where the last one ended.
    pub(super) fn take(&mut self, offset: u64, data: &[u8], max_chunk: u64) -> Result<(), Refusal> {
        let have = self.bytes.len();
        if data.len() as u64 > max_chunk {
            return Err(Refusal::over_limit("chunk.data", data.len(), max_chunk));
        }
        if data.is_empty() {
            return Err(Refusal::invalid_field("chunk.data", "a chunk is empty"));
        }
        if offset != have as u64 {
            return Err(Refusal::new(
                Code::Aborted,
                "UPLOAD_OFFSET_MISMATCH",
                format!(
                    "chunk.offset: {} continues at {have}, the chunk begins at {offset}",
                    self.name
                ),
            )
            .with("committed_offset", have)
            .with("given", offset));
        }
        if data.len() > self.size - have {
            return Err(Refusal::new(
                Code::Aborted,
                "CHECKSUM_MISMATCH",
                format!(
                    "{} is longer than the {} bytes that were announced",
                    self.name, self.size
                ),
            )
            .with("expected", self.size));
        }
        self.bytes.extend_from_slice(data);
        Ok(())
    }

    /// Whether all bytes are there.
    pub(super) fn is_complete(&self) -> bool {
        self.bytes.len() == self.size
    }

    /// The bytes, checked against the announced size and digest.
    pub(super) fn finish(self) -> Result<Vec<u8>, Refusal> {
        if !self.is_complete() {
            return Err(Refusal::new(
                Code::Aborted,
                "CHECKSUM_MISMATCH",
                format!(
                    "{} ended after {} of {} bytes",
                    self.name,
                    self.bytes.len(),
                    self.size
                ),
            )
            .with("committed_offset", self.bytes.len())
            .with("expected", self.size));
        }
        let found = hex::encode(Sha256::digest(&self.bytes));
        if found != self.sha256 {
            return Err(Refusal::new(
                Code::Aborted,
                "CHECKSUM_MISMATCH",
                format!(
                    "{} has SHA-256 {found}, {} was announced",
                    self.name, self.sha256
                ),
            )
            .with("expected", self.sha256)
            .with("found", found));
        }
        Ok(self.bytes)
    }
}

/// Where a chunk lies in its file.
pub(super) fn chunk(part: v1::ArtifactPart, offset: usize, data: &[u8]) -> v1::ArtifactChunk {
    v1::ArtifactChunk {
        part: part.into(),
        offset: offset as u64,
        data: data.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]
    use super::*;

    fn incoming(bytes: &[u8], limit: u64) -> Result<Incoming, Refusal> {
        let sha256 = hex::encode(Sha256::digest(bytes));
        Incoming::expect("file", "parts", bytes.len() as u64, &sha256, limit)
    }

    #[test]
    fn pieces_come_in_order_and_whole() {
        let mut file = incoming(b"hello world", 11).unwrap();
        file.take(0, b"hello ", 6).unwrap();
        assert_eq!(
            file.take(0, b"again", 6).unwrap_err().reason(),
            "UPLOAD_OFFSET_MISMATCH"
        );
        assert_eq!(
            file.take(7, b"orld", 6).unwrap_err().reason(),
            "UPLOAD_OFFSET_MISMATCH"
        );
        assert_eq!(
            file.take(6, b"1234567", 6).unwrap_err().reason(),
            "INVALID_FIELD"
        );
        assert_eq!(
            file.take(6, b"world!", 6).unwrap_err().reason(),
            "CHECKSUM_MISMATCH"
        );
        assert_eq!(file.take(6, b"", 6).unwrap_err().reason(), "INVALID_FIELD");
        file.take(6, b"world", 6).unwrap();
        assert_eq!(file.finish().unwrap(), b"hello world");
    }

    #[test]
    fn what_was_announced_must_come() {
        assert_eq!(
            incoming(b"1234", 3).err().unwrap().reason(),
            "ARTIFACT_TOO_LARGE"
        );
        assert!(incoming(b"1234", 4).is_ok());
        assert!(incoming(b"", 4).is_err());
        assert!(Incoming::expect("f", "parts", 1, "AB", 9).is_err());
        let mut short = incoming(b"1234", 9).unwrap();
        short.take(0, b"123", 9).unwrap();
        assert_eq!(short.finish().unwrap_err().reason(), "CHECKSUM_MISMATCH");
        let mut other = incoming(b"1234", 9).unwrap();
        other.take(0, b"1235", 9).unwrap();
        assert_eq!(other.finish().unwrap_err().reason(), "CHECKSUM_MISMATCH");
    }
}
