//! A typed client of Espalier: connect once, call every service, stream, upload and download.
//!
//! What it adds to the generated stubs: the API key and deadlines on every call, retries where
//! they are safe (UNAVAILABLE only, within a budget, after the wait that the server asks for),
//! errors as one struct that says what to do next, chunked uploads with checksums, short names.
//! It knows nothing of how a server works.
//!
//! ```no_run
//! # async fn run() -> Result<(), espalier_client::Error> {
//! use espalier_client::{Client, ClientConfig, v1};
//!
//! let mut config = ClientConfig::new("http://127.0.0.1:7411");
//! config.tenant = Some("acme".to_owned());
//! let client = Client::connect(config).await?;
//! let target = client.target(Some("tickets"))?;
//! let reply = client
//!     .classify(v1::ClassifyRequest {
//!         target: Some(target),
//!         texts: vec!["my card was swallowed".to_owned()],
//!         ..Default::default()
//!     })
//!     .await?;
//! println!("{}", reply.results[0].label);
//! # Ok(()) }
//! ```

pub mod client;
pub mod error;
pub mod names;
pub mod retry;

mod adapters;
mod bench;
pub mod bulk;
mod inference;
mod models;
mod residency;
mod tenants;
pub mod training;
pub mod transfer;

pub mod cli;

pub use client::{Client, ClientConfig, Timeouts};
pub use error::{Error, Fault, FieldViolation};
pub use espalier_proto::v1;
pub use names::Names;
pub use retry::RetryPolicy;
pub use transfer::{AdapterUpload, DatasetUpload};
