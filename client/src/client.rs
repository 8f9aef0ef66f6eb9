//! The connection and the one way in which every call is made: key, deadline, attempts.
//! Knows no service; those are beside it, one file each.

use std::{future::Future, pin::Pin, sync::Arc, time::Duration};

use futures::{Stream, StreamExt, stream};
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tonic::{
    Code, Request, Response, Status, Streaming,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

use crate::{
    error::Error,
    names::Names,
    retry::{Retry, RetryPolicy},
    v1::{AdapterWeight, InferenceTarget},
};

/// Replies larger than this are refused; the largest are lists and embeddings.
pub(crate) const MAX_REPLY_BYTES: usize = 16 << 20;

/// A stream of replies.
pub type Replies<T> = Pin<Box<dyn Stream<Item = Result<T, Error>> + Send>>;

/// How a client connects and how long it waits.
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// `http://host:port`; `host:port` alone is taken as http.
    pub endpoint: String,
    /// Sent as `authorization: Bearer KEY`.
    pub api_key: Option<String>,
    /// The tenant that short names belong to.
    pub tenant: Option<String>,
    /// Deadlines by kind of call.
    pub timeouts: Timeouts,
    /// When calls are made again.
    pub retry: RetryPolicy,
}

impl ClientConfig {
    /// A configuration with defaults for everything but the address.
    #[must_use]
    pub fn new(endpoint: impl Into<String>) -> Self {
        Self {
            endpoint: endpoint.into(),
            api_key: None,
            tenant: None,
            timeouts: Timeouts::default(),
            retry: RetryPolicy::default(),
        }
    }
}

/// Deadlines, over all attempts of a call; they reach the server as `grpc-timeout`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Making a connection.
    pub connect: Duration,
    /// Calls about names and state.
    pub control: Duration,
    /// Classify, Embed, Score, Tokenize, Detokenize.
    pub inference: Duration,
    /// Generate and Chat, streamed or not.
    pub generate: Duration,
    /// Uploads, downloads, and jobs with inline data.
    pub transfer: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            control: Duration::from_secs(30),
            inference: Duration::from_secs(60),
            generate: Duration::from_secs(120),
            transfer: Duration::from_secs(600),
        }
    }
}

impl Timeouts {
    /// One deadline for every call; connecting keeps its own, shorter one.
    #[must_use]
    pub fn all(limit: Duration) -> Self {
        Self {
            connect: limit.min(Self::default().connect),
            control: limit,
            inference: limit,
            generate: limit,
            transfer: limit,
        }
    }
}

/// Whether a call may be made again after UNAVAILABLE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Repeat {
    /// It reads, is named by a request id, or ends in the same state.
    Safe,
    /// It might happen twice.
    Never,
}

/// A connected client. Cheap to clone; clones share connection and retry budget.
#[derive(Clone)]
pub struct Client {
    channel: Channel,
    authorization: Option<MetadataValue<Ascii>>,
    names: Names,
    timeouts: Timeouts,
    retry: Arc<Retry>,
}

impl std::fmt::Debug for Client {
    /// Without the key.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("names", &self.names)
            .field("timeouts", &self.timeouts)
            .finish_non_exhaustive()
    }
}

// === impl Client ===

impl Client {
    /// Connects; an address at which nobody listens is an error here and not at the first call.
    pub async fn connect(config: ClientConfig) -> Result<Self, Error> {
        let endpoint = endpoint(&config)?;
        let channel = endpoint.connect().await.map_err(|error| {
            let mut text = error.to_string();
            let mut source = std::error::Error::source(&error);
            while let Some(cause) = source {
                text = cause.to_string();
                source = cause.source();
            }
            let message = format!("cannot connect to {}: {text}", config.endpoint);
            Error::local(Code::Unavailable, "CONNECT", message)
        })?;
        Self::with_channel(channel, config)
    }

    /// A client over a channel that the caller has made (TLS, balancing, a test's pipe).
    pub fn with_channel(channel: Channel, config: ClientConfig) -> Result<Self, Error> {
        let authorization = match &config.api_key {
            Some(key) => {
                let mut value: MetadataValue<Ascii> =
                    format!("Bearer {key}").parse().map_err(|_| {
                        Error::argument("the API key holds characters that no header may")
                    })?;
                value.set_sensitive(true);
                Some(value)
            }
            None => None,
        };
        Ok(Self {
            channel,
            authorization,
            names: Names::new(config.tenant.as_deref()),
            timeouts: config.timeouts,
            retry: Arc::new(Retry::new(config.retry)),
        })
    }

    /// The channel, for stubs of one's own.
    #[must_use]
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Expands short names.
    #[must_use]
    pub fn names(&self) -> &Names {
        &self.names
    }

    /// The same client for another tenant's short names.
    #[must_use]
    pub fn for_tenant(&self, tenant: &str) -> Self {
        let mut client = self.clone();
        client.names = Names::new(Some(tenant));
        client
    }

    pub(crate) fn timeouts(&self) -> &Timeouts {
        &self.timeouts
    }

    /// The target of an inference call: an adapter by short or whole name, or the base.
    pub fn target(&self, adapter: Option<&str>) -> Result<InferenceTarget, Error> {
        self.mixture(adapter.map(|name| (name, None)))
    }

    /// As [`Client::target`], of several adapters with their weights (1 where none is given); none is the base.
    pub fn mixture<'a>(
        &self,
        adapters: impl IntoIterator<Item = (&'a str, Option<f32>)>,
    ) -> Result<InferenceTarget, Error> {
        let mut target = InferenceTarget::default();
        for (name, weight) in adapters {
            target.adapters.push(AdapterWeight {
                adapter: self.names.adapter(name)?,
                weight,
            });
        }
        if target.adapters.is_empty() && self.names.has_tenant() {
            target.tenant = self.names.parent()?;
        }
        Ok(target)
    }

    /// A request with key and deadline.
    pub(crate) fn request<Q>(&self, message: Q, remaining: Option<Duration>) -> Request<Q> {
        let mut request = Request::new(message);
        if let Some(value) = &self.authorization {
            request
                .metadata_mut()
                .insert("authorization", value.clone());
        }
        if let Some(limit) = remaining {
            request.set_timeout(limit);
        }
        request
    }

    /// Makes a call until it succeeds, must not be repeated, or is out of time.
    pub(crate) async fn attempts<R, F, Fut>(
        &self,
        limit: Option<Duration>,
        repeat: Repeat,
        mut call: F,
    ) -> Result<R, Error>
    where
        F: FnMut(Option<Duration>) -> Fut,
        Fut: Future<Output = Result<R, Status>>,
    {
        let deadline = limit.map(|limit| Instant::now() + limit);
        let left = || deadline.map(|at| at.saturating_duration_since(Instant::now()));
        let mut attempt = 1;
        loop {
            let outcome = match left() {
                Some(remaining) => match timeout(remaining, call(Some(remaining))).await {
                    Ok(outcome) => outcome.map_err(Error::from),
                    Err(_) => Err(Error::deadline(limit.unwrap_or_default())),
                },
                None => call(None).await.map_err(Error::from),
            };
            let mut error = match outcome {
                Ok(reply) => {
                    self.retry.succeeded();
                    return Ok(reply);
                }
                Err(error) => error,
            };
            error.attempts = attempt;
            let again = self.retry.failed(&error, attempt, left(), rand::random());
            match again {
                Some(wait) if repeat == Repeat::Safe => sleep(wait).await,
                _ => return Err(error),
            }
            attempt += 1;
        }
    }

    /// A call with one request and one reply.
    pub(crate) async fn unary<Q, R, F, Fut>(
        &self,
        limit: Duration,
        repeat: Repeat,
        message: Q,
        call: F,
    ) -> Result<R, Error>
    where
        Q: Clone,
        F: Fn(Channel, Request<Q>) -> Fut,
        Fut: Future<Output = Result<Response<R>, Status>>,
    {
        let once = |remaining| {
            let request = self.request(message.clone(), remaining);
            call(self.channel.clone(), request)
        };
        let reply = self.attempts(Some(limit), repeat, once).await?;
        Ok(reply.into_inner())
    }

    /// A call with one request and a stream of replies. It is made again only while no reply
    /// has begun: after that a repetition would say things twice.
    pub(crate) async fn streaming<Q, R, F, Fut>(
        &self,
        limit: Option<Duration>,
        message: Q,
        call: F,
    ) -> Result<Replies<R>, Error>
    where
        Q: Clone,
        R: Send + 'static,
        F: Fn(Channel, Request<Q>) -> Fut,
        Fut: Future<Output = Result<Response<Streaming<R>>, Status>>,
    {
        let deadline = limit.map(|limit| (Instant::now() + limit, limit));
        let once = |remaining| {
            let request = self.request(message.clone(), remaining);
            call(self.channel.clone(), request)
        };
        let reply = self.attempts(limit, Repeat::Safe, once).await?;
        Ok(until(reply.into_inner(), deadline))
    }
}

/// Ends a stream at its deadline; the transport's own timer stops at the headers.
pub(crate) fn until<R: Send + 'static>(
    replies: Streaming<R>,
    deadline: Option<(Instant, Duration)>,
) -> Replies<R> {
    let next = move |state: Option<Streaming<R>>| async move {
        let mut replies = state?;
        let item = match deadline {
            Some((at, limit)) => match timeout_at(at, replies.next()).await {
                Ok(item) => item,
                Err(_) => return Some((Err(Error::deadline(limit)), None)),
            },
            None => replies.next().await,
        };
        match item? {
            Ok(reply) => Some((Ok(reply), Some(replies))),
            Err(status) => Some((Err(Error::from(status)), None)),
        }
    };
    stream::unfold(Some(replies), next).boxed()
}

fn endpoint(config: &ClientConfig) -> Result<Endpoint, Error> {
    let address = if config.endpoint.contains("://") {
        config.endpoint.clone()
    } else {
        format!("http://{}", config.endpoint)
    };
    if address.starts_with("https://") {
        return Err(Error::argument(
            "this build has no TLS: put a TLS proxy in front, or give a channel of your own to Client::with_channel",
        ));
    }
    let wrong = |_| {
        Error::argument(format!(
            "{:?} is no address like http://host:port",
            config.endpoint
        ))
    };
    let endpoint = Endpoint::from_shared(address).map_err(wrong)?;
    Ok(endpoint
        .user_agent(concat!("espalier-client/", env!("CARGO_PKG_VERSION")))
        .map_err(|error| Error::argument(error.to_string()))?
        .connect_timeout(config.timeouts.connect)
        .tcp_nodelay(true)
        // Below the servers' shortest allowed interval a ping is answered with GOAWAY.
        .http2_keep_alive_interval(Duration::from_secs(60))
        .keep_alive_timeout(Duration::from_secs(20)))
}
