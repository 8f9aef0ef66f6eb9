//! Streams against a server: one request with the moments of its tokens, clients that ask again as soon as they are
//! answered, and arrivals that do not wait for anybody.

use std::rc::Rc;
use std::time::{Duration, Instant};

use espalier_benches::Fallible;
use espalier_benches::daemon::Tenant;
use espalier_client::v1::generate_chunk::Event;
use futures::StreamExt;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// What one stream showed.
pub(crate) struct Streamed {
    /// When its tokens came; several that came together stand there as often.
    pub(crate) tokens: Vec<Instant>,
}

/// Runs one request to its end and checks that it is whole.
pub(crate) async fn stream(tenant: &Tenant, prompt: &[u32], new: usize) -> Fallible<Streamed> {
    let mut replies = tenant
        .client
        .stream_generate(tenant.request(prompt, new)?)
        .await?;
    let mut tokens = Vec::with_capacity(new);
    while let Some(reply) = replies.next().await {
        if let Some(Event::Delta(delta)) = reply?.event {
            let now = Instant::now();
            tokens.extend(delta.token_ids.iter().map(|_| now));
        }
    }
    if tokens.len() != new {
        return Err(format!("{} tokens instead of {new}", tokens.len()).into());
    }
    Ok(Streamed { tokens })
}

/// Requests of mixed lengths, drawn from a seed: 64 to 192 tokens in, 32 to 96 out.
pub(crate) struct Draw(ChaCha8Rng);

// === impl Draw ===

impl Draw {
    pub(crate) fn new(seed: u64) -> Self {
        Draw(ChaCha8Rng::seed_from_u64(seed))
    }

    pub(crate) fn request(&mut self) -> (Vec<u32>, usize) {
        let tokens = self.0.random_range(64..=192);
        let prompt = (0..tokens)
            .map(|_| self.0.random_range(100..40_000))
            .collect();
        (prompt, self.0.random_range(32..=96))
    }

    /// Time to the next arrival of a Poisson process.
    fn pause(&mut self, rate: f64) -> Duration {
        let uniform: f64 = self.0.random_range(f64::MIN_POSITIVE..1.0);
        Duration::from_secs_f64(-uniform.ln() / rate)
    }
}

/// Requests per second that `clients` get through, each asking again at once, for `seconds`; the first quarter warms up.
pub(crate) async fn closed(
    tenants: &[Tenant],
    clients: usize,
    seconds: u64,
    seed: u64,
) -> Fallible<f64> {
    let begin = Instant::now();
    let (warm, end) = (
        begin + Duration::from_secs(seconds) / 4,
        begin + Duration::from_secs(seconds),
    );
    let mut running = Vec::new();
    for client in 0..clients {
        let tenant = tenants[client % tenants.len()].clone();
        let mut draw = Draw::new(seed * 10_000 + client as u64);
        running.push(tokio::task::spawn_local(async move {
            let mut share = 0.0;
            loop {
                let began = Instant::now();
                if began >= end {
                    return Ok::<f64, espalier_benches::Error>(share);
                }
                let (prompt, new) = draw.request();
                stream(&tenant, &prompt, new).await?;
                // A request counts with the part of it that lies in the measured time.
                let ended = Instant::now();
                let inside = ended.min(end).saturating_duration_since(began.max(warm));
                share += inside.as_secs_f64() / (ended - began).as_secs_f64();
            }
        }));
    }
    let mut requests = 0.0;
    for client in running {
        requests += client.await??;
    }
    Ok(requests / (end - warm).as_secs_f64())
}

/// What the open loop saw.
pub(crate) struct Opened {
    /// Seconds between neighbouring tokens of one stream, of all streams.
    pub(crate) gaps: Vec<f64>,
    /// Seconds from a request's due time to its first token.
    pub(crate) first: Vec<f64>,
    /// The worst delay of an arrival behind its plan: the client's own fault.
    pub(crate) late: f64,
}

/// Requests that arrive at `rate` per second, whatever has become of those before.
pub(crate) async fn open(
    tenants: &[Tenant],
    rate: f64,
    seconds: u64,
    seed: u64,
) -> Fallible<Opened> {
    let begin = Instant::now();
    let tenants: Rc<[Tenant]> = tenants.into();
    let mut draw = Draw::new(seed);
    let (mut due, mut running, mut late) = (begin, Vec::new(), 0.0f64);
    loop {
        due += draw.pause(rate);
        if due >= begin + Duration::from_secs(seconds) {
            break;
        }
        tokio::time::sleep_until(due.into()).await;
        late = late.max(due.elapsed().as_secs_f64());
        let ((prompt, new), tenants) = (draw.request(), Rc::clone(&tenants));
        let number = running.len();
        running.push(tokio::task::spawn_local(async move {
            let tenant = &tenants[number % tenants.len()];
            Ok::<_, espalier_benches::Error>((due, stream(tenant, &prompt, new).await?))
        }));
    }
    let (mut gaps, mut first) = (Vec::new(), Vec::new());
    for request in running {
        let (due, streamed) = request.await??;
        first.extend(streamed.tokens.first().map(|at| (*at - due).as_secs_f64()));
        let pairs = streamed.tokens.windows(2);
        gaps.extend(pairs.map(|pair| (pair[1] - pair[0]).as_secs_f64()));
    }
    Ok(Opened { gaps, first, late })
}
