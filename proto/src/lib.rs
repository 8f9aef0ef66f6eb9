//! The contract: message types, clients and servers of `espalier.v1`, generated from
//! the protos beside this crate. No logic lives here, and nothing here knows how a
//! request is carried out.

/// The packages as the protos nest them; generated code refers to itself through these paths.
#[allow(
    missing_docs,
    clippy::all,
    clippy::allow_attributes_without_reason,
    rustdoc::all,
    reason = "generated code; its comments are those of the protos"
)]
pub mod espalier {
    pub mod v1 {
        tonic::include_proto!("espalier.v1");
    }
}

/// The vendored part of `google.rpc`.
#[allow(
    missing_docs,
    clippy::all,
    clippy::allow_attributes_without_reason,
    rustdoc::all,
    reason = "generated code; its comments are those of the protos"
)]
pub mod google {
    pub mod rpc {
        tonic::include_proto!("google.rpc");
    }
}

/// All services and messages.
pub use espalier::v1;
/// The status and the details that every error carries.
pub use google::rpc;

/// The domain of every `ErrorInfo` that a server sends.
pub const ERROR_DOMAIN: &str = "espalier.v1";

/// The encoded `FileDescriptorSet` of the contract and all that it imports, for
/// gRPC reflection and for the check of breaking changes.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/espalier.bin"));
