//! What came back, kept for the figures: a row for each request, histograms of all of them, and
//! how many tokens came in each tenth of a second. Warm-up requests are counted and left out.

use std::{
    collections::BTreeMap,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use hdrhistogram::Histogram;

use crate::bench::{
    quantity::micros,
    schedule::Due,
    statistics,
    target::{Refusal, Reply, ServerTimes},
    workload::Operation,
};

/// Tokens are counted by spans of this length.
pub(crate) const TICK: Duration = Duration::from_millis(100);

/// What is measured in a histogram, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Metric {
    /// From the moment that the request was due to its first token.
    Ttft,
    /// Mean time of each token after the first.
    Tpot,
    /// Between messages with tokens.
    Itl,
    /// From the moment that the request was due to the end of its answer.
    E2e,
    /// From the moment that the request was due until it was sent.
    Lag,
    /// As the server reports it.
    Queue,
    /// As the server reports it.
    AdapterLoad,
    /// Arrival to first token, as the server reports it.
    ServerTtft,
    /// From sending to the first token.
    SentTtft,
    /// From sending to the end.
    SentE2e,
}

impl Metric {
    pub(crate) const ALL: [Self; 10] = [
        Self::Ttft,
        Self::Tpot,
        Self::Itl,
        Self::E2e,
        Self::Lag,
        Self::Queue,
        Self::AdapterLoad,
        Self::ServerTtft,
        Self::SentTtft,
        Self::SentE2e,
    ];

    /// Its tag in histogram files.
    pub(crate) fn tag(self) -> &'static str {
        match self {
            Self::Ttft => "ttft",
            Self::Tpot => "tpot",
            Self::Itl => "itl",
            Self::E2e => "e2el",
            Self::Lag => "send_lag",
            Self::Queue => "queue",
            Self::AdapterLoad => "adapter_load",
            Self::ServerTtft => "server_ttft",
            Self::SentTtft => "ttft_from_send",
            Self::SentE2e => "e2el_from_send",
        }
    }
}

/// One histogram a metric.
#[derive(Clone, Debug)]
pub(crate) struct Histograms(Vec<Histogram<u64>>);

impl Default for Histograms {
    fn default() -> Self {
        Self(Metric::ALL.map(|_| statistics::histogram()).to_vec())
    }
}

// === impl Histograms ===

impl Histograms {
    pub(crate) fn get(&self, metric: Metric) -> &Histogram<u64> {
        &self.0[metric as usize]
    }

    pub(crate) fn get_mut(&mut self, metric: Metric) -> &mut Histogram<u64> {
        &mut self.0[metric as usize]
    }

    fn record(&mut self, metric: Metric, micros: u64) {
        statistics::record(self.get_mut(metric), micros);
    }
}

/// One request. Moments are microseconds since the start of the test.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Row {
    pub(crate) index: u64,
    pub(crate) operation: Operation,
    pub(crate) tenant: u32,
    pub(crate) adapter: Option<u32>,
    pub(crate) due: u64,
    pub(crate) sent: u64,
    pub(crate) first: Option<u64>,
    pub(crate) last: Option<u64>,
    pub(crate) end: u64,
    pub(crate) input: u32,
    pub(crate) output: u32,
    pub(crate) cached: u32,
    pub(crate) server: ServerTimes,
    /// Place in the list of reasons; `None`: it succeeded.
    pub(crate) error: Option<u16>,
}

// === impl Row ===

impl Row {
    pub(crate) fn ttft(&self) -> Option<u64> {
        Some(self.first?.saturating_sub(self.due))
    }

    pub(crate) fn e2e(&self) -> u64 {
        self.end.saturating_sub(self.due)
    }

    /// Mean time of each token after the first; needs two.
    pub(crate) fn tpot(&self) -> Option<u64> {
        let span = self.last?.saturating_sub(self.first?);
        let tokens = u64::from(self.output.checked_sub(1)?);
        (tokens > 0).then(|| span / tokens)
    }

    pub(crate) fn is_ok(&self) -> bool {
        self.error.is_none()
    }
}

/// Errors of one reason.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Failures {
    pub(crate) count: u64,
    /// The first message.
    pub(crate) example: String,
}

/// Everything that was measured.
#[derive(Clone, Debug, Default)]
pub(crate) struct Measured {
    pub(crate) rows: Vec<Row>,
    pub(crate) histograms: Histograms,
    pub(crate) reasons: Vec<String>,
    pub(crate) failures: BTreeMap<String, Failures>,
    /// Requests of the warm-up.
    pub(crate) warmup: u64,
    /// Tokens by tick since the start, those of the warm-up too.
    pub(crate) tokens: Vec<u32>,
    /// The most requests in flight at once.
    pub(crate) most_in_flight: u64,
}

/// Gathers what many tasks bring.
#[derive(Debug)]
pub(crate) struct Recorder {
    start: Instant,
    in_flight: AtomicU64,
    measured: Mutex<Measured>,
}

/// A finished call.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) due: Due,
    pub(crate) operation: Operation,
    pub(crate) tenant: usize,
    pub(crate) adapter: Option<usize>,
    pub(crate) sent: Instant,
    pub(crate) end: Instant,
    pub(crate) outcome: Result<Reply, Refusal>,
}

// === impl Recorder ===

impl Recorder {
    /// The test starts at this moment, from which all others are counted.
    pub(crate) fn new(start: Instant) -> Self {
        Self {
            start,
            in_flight: AtomicU64::new(0),
            measured: Mutex::default(),
        }
    }

    pub(crate) fn start(&self) -> Instant {
        self.start
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, Measured> {
        self.measured.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn in_flight(&self) -> u64 {
        self.in_flight.load(Ordering::Relaxed)
    }

    pub(crate) fn sending(&self) {
        self.in_flight.fetch_add(1, Ordering::Relaxed);
    }

    /// Since the start.
    fn since(&self, moment: Instant) -> u64 {
        micros(moment.saturating_duration_since(self.start))
    }

    pub(crate) fn add(&self, finished: Finished) {
        let in_flight = self.in_flight.fetch_sub(1, Ordering::Relaxed);
        let (reply, refusal) = match finished.outcome {
            Ok(reply) => (reply, None),
            Err(refusal) => (Reply::default(), Some(refusal)),
        };
        let mut row = Row {
            index: finished.due.index,
            operation: finished.operation,
            tenant: finished.tenant as u32,
            adapter: finished.adapter.map(|adapter| adapter as u32),
            due: micros(finished.due.at),
            sent: self.since(finished.sent),
            first: reply.first.map(|moment| self.since(moment)),
            last: reply.last.map(|moment| self.since(moment)),
            end: self.since(finished.end),
            input: reply.input_tokens,
            output: reply.output_tokens,
            cached: reply.cached_tokens,
            server: reply.server,
            error: None,
        };
        let mut measured = self.lock();
        measured.most_in_flight = measured.most_in_flight.max(in_flight);
        measured.count_tokens(&row, &reply.gaps);
        if finished.due.warmup {
            measured.warmup += 1;
            return;
        }
        match refusal {
            Some(refusal) => row.error = Some(measured.reason(refusal)),
            None => measured.observe(&row, &reply.gaps),
        }
        measured
            .histograms
            .record(Metric::Lag, row.sent.saturating_sub(row.due));
        measured.rows.push(row);
    }

    /// Takes everything; what comes later is lost.
    pub(crate) fn take(&self) -> Measured {
        std::mem::take(&mut *self.lock())
    }
}

// === impl Measured ===

impl Measured {
    fn reason(&mut self, refusal: Refusal) -> u16 {
        let failures = self.failures.entry(refusal.reason.clone()).or_default();
        if failures.count == 0 {
            failures.example = refusal.message;
        }
        failures.count += 1;
        let known = self.reasons.iter().position(|one| *one == refusal.reason);
        let place = known.unwrap_or_else(|| {
            self.reasons.push(refusal.reason);
            self.reasons.len() - 1
        });
        u16::try_from(place).unwrap_or(u16::MAX)
    }

    pub(crate) fn observe(&mut self, row: &Row, gaps: &[u32]) {
        let cells = &mut self.histograms;
        cells.record(Metric::E2e, row.e2e());
        cells.record(Metric::SentE2e, row.end.saturating_sub(row.sent));
        if let (Some(ttft), Some(first)) = (row.ttft(), row.first) {
            cells.record(Metric::Ttft, ttft);
            cells.record(Metric::SentTtft, first.saturating_sub(row.sent));
        }
        if let Some(tpot) = row.tpot() {
            cells.record(Metric::Tpot, tpot);
        }
        for gap in gaps {
            cells.record(Metric::Itl, u64::from(*gap));
        }
        let server = [
            (Metric::Queue, row.server.queue),
            (Metric::AdapterLoad, row.server.adapter_load),
            (Metric::ServerTtft, row.server.first_token),
        ];
        for (metric, found) in server {
            if let Some(found) = found {
                cells.record(metric, u64::from(found));
            }
        }
    }

    /// Spreads a request's tokens over the ticks in which they came.
    fn count_tokens(&mut self, row: &Row, gaps: &[u32]) {
        let Some(first) = row.first else { return };
        let tick = micros(TICK);
        let messages = gaps.len() as u32 + 1;
        // Where a message brings several tokens, they are spread evenly over the messages.
        let each = row.output / messages;
        let mut rest = row.output % messages;
        let mut at = first;
        for gap in std::iter::once(&0).chain(gaps) {
            at += u64::from(*gap);
            let place = (at / tick) as usize;
            if self.tokens.len() <= place {
                self.tokens.resize(place + 1, 0);
            }
            self.tokens[place] += each + u32::from(rest > 0);
            rest = rest.saturating_sub(1);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn row(index: u64, due: u64, first: u64, last: u64, output: u32) -> Row {
        Row {
            index,
            operation: Operation::Generate,
            tenant: 0,
            adapter: None,
            due,
            sent: due,
            first: Some(first),
            last: Some(last),
            end: last,
            input: 10,
            output,
            cached: 0,
            server: ServerTimes::default(),
            error: None,
        }
    }

    #[test]
    fn latency_counts_from_the_moment_that_was_planned() {
        let start = Instant::now();
        let recorder = Recorder::new(start);
        let at = |ms| start + Duration::from_millis(ms);
        let due = Due {
            index: 3,
            at: Duration::from_millis(100),
            warmup: false,
            tenant: None,
            row: None,
        };
        let finished = |outcome, due| Finished {
            due,
            operation: Operation::Generate,
            tenant: 0,
            adapter: Some(2),
            sent: at(400),
            end: at(900),
            outcome,
        };
        let reply = Reply {
            first: Some(at(500)),
            last: Some(at(800)),
            gaps: vec![100_000, 200_000],
            output_tokens: 3,
            ..Reply::default()
        };
        for _ in 0..3 {
            recorder.sending();
        }
        recorder.add(finished(Ok(reply.clone()), due));
        recorder.add(finished(
            Ok(reply),
            Due {
                warmup: true,
                ..due
            },
        ));
        let refusal = Refusal {
            reason: "SERVER_OVERLOADED".to_owned(),
            message: "full".to_owned(),
        };
        recorder.add(finished(Err(refusal), due));
        let measured = recorder.take();
        assert_eq!((measured.rows.len(), measured.warmup), (2, 1));
        let row = &measured.rows[0];
        assert_eq!(
            (row.ttft(), row.e2e(), row.tpot()),
            (Some(400_000), 800_000, Some(150_000))
        );
        let max = |metric| measured.histograms.get(metric).max() / 1000;
        assert_eq!(
            measured.histograms.get(Metric::Ttft).len(),
            1,
            "no warm-up, no failure"
        );
        assert!((399..=401).contains(&max(Metric::Ttft)));
        assert!((99..=101).contains(&max(Metric::SentTtft)));
        assert_eq!(measured.histograms.get(Metric::Lag).len(), 2);
        assert!((299..=301).contains(&max(Metric::Lag)));
        assert_eq!(measured.failures["SERVER_OVERLOADED"].count, 1);
        assert_eq!(measured.rows[1].error, Some(0));
        // Both streams count here: 3 tokens at 500, 600 and 800 ms, twice.
        assert_eq!(measured.tokens[5..], [2, 2, 0, 2]);
        assert_eq!(measured.most_in_flight, 3);
    }
}
