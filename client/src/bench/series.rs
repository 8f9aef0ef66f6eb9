//! The course of a test over time: arrivals, answers, tokens, requests in flight and latencies,
//! in spans of equal length. A latency belongs to the span in which its request was due.

use std::time::Duration;

use serde_json::{Value, json};

use crate::bench::{
    quantity::micros,
    record::{Measured, TICK},
    statistics::{Figures, rounded},
};

/// No chart shows more points than this well.
const MOST: u64 = 240;

/// One span.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Span {
    /// Seconds from the start of the test to the start of the span.
    pub(crate) at: f64,
    pub(crate) arrivals: u64,
    pub(crate) completed: u64,
    pub(crate) failed: u64,
    pub(crate) tokens: u64,
    /// Requests that were due and not answered, at the end of the span.
    pub(crate) in_flight: u64,
    pub(crate) ttft: Option<Figures>,
    pub(crate) e2e: Option<Figures>,
}

/// Spans of one length.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Series {
    /// Seconds.
    pub(crate) width: f64,
    pub(crate) spans: Vec<Span>,
}

// === impl Series ===

impl Series {
    pub(crate) fn of(measured: &Measured) -> Self {
        let tick = micros(TICK);
        let last = measured.rows.iter().map(|row| row.end).max().unwrap_or(0);
        let ticks = last / tick + 1;
        // A whole number of ticks, so that tokens fall into one span each.
        let ticks_a_span = ticks.div_ceil(MOST).max(if ticks > 100 { 10 } else { 2 });
        let width = ticks_a_span * tick;
        let count = (last / width + 1) as usize;
        let mut spans = vec![Span::default(); count];
        let mut ttft: Vec<Vec<u64>> = vec![Vec::new(); count];
        let mut e2e = ttft.clone();
        for row in &measured.rows {
            let due = ((row.due / width) as usize).min(count - 1);
            let end = ((row.end / width) as usize).min(count - 1);
            spans[due].arrivals += 1;
            if row.is_ok() {
                spans[end].completed += 1;
                ttft[due].extend(row.ttft());
                e2e[due].push(row.e2e());
            } else {
                spans[end].failed += 1;
            }
        }
        for (place, tokens) in measured.tokens.iter().enumerate() {
            let place = place / ticks_a_span as usize;
            if let Some(span) = spans.get_mut(place) {
                span.tokens += u64::from(*tokens);
            }
        }
        let mut in_flight = 0;
        let seconds = Duration::from_micros(width).as_secs_f64();
        for (place, span) in spans.iter_mut().enumerate() {
            in_flight = in_flight + span.arrivals - span.completed - span.failed;
            span.in_flight = in_flight;
            span.at = place as f64 * seconds;
            span.ttft = Figures::of_values(&mut ttft[place]);
            span.e2e = Figures::of_values(&mut e2e[place]);
        }
        Self {
            width: seconds,
            spans,
        }
    }

    pub(crate) fn to_json(&self) -> Value {
        let figure = |figures: &Option<Figures>, name| {
            let found = figures
                .as_ref()
                .and_then(|figures| figures.percentile(name));
            found.map(rounded)
        };
        let spans = self.spans.iter().map(|span| {
            json!({
                "at": rounded(span.at),
                "arrivals": span.arrivals,
                "completed": span.completed,
                "failed": span.failed,
                "output_tokens": span.tokens,
                "in_flight": span.in_flight,
                "p50_ttft_ms": figure(&span.ttft, "p50"),
                "p99_ttft_ms": figure(&span.ttft, "p99"),
                "p50_e2el_ms": figure(&span.e2e, "p50"),
                "p99_e2el_ms": figure(&span.e2e, "p99"),
            })
        });
        json!({"width": self.width, "spans": spans.collect::<Vec<_>>()})
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::record::tests::row;

    #[test]
    fn spans_add_up_to_the_whole() {
        let mut measured = Measured::default();
        for i in 0..60 {
            let due = i * 50_000;
            measured
                .rows
                .push(row(i, due, due + 10_000, due + 90_000, 4));
        }
        measured.rows[5].error = Some(0);
        measured.tokens = vec![8; 31];
        let series = Series::of(&measured);
        let sum = |f: fn(&Span) -> u64| series.spans.iter().map(f).sum::<u64>();
        assert_eq!(
            (sum(|s| s.arrivals), sum(|s| s.completed), sum(|s| s.failed)),
            (60, 59, 1)
        );
        assert_eq!(sum(|s| s.tokens), 31 * 8);
        assert_eq!(series.spans.last().unwrap().in_flight, 0);
        let first = series.spans[0].ttft.as_ref().unwrap();
        assert!((first.percentiles[0] - 10.0).abs() < 1e-9);
    }

    #[test]
    fn a_long_test_keeps_few_points() {
        let mut measured = Measured::default();
        measured.rows.push(row(0, 0, 1, 3_600_000_000, 2));
        assert!(Series::of(&measured).spans.len() <= MOST as usize + 1);
        assert_eq!(Series::of(&Measured::default()).spans.len(), 1);
    }
}
