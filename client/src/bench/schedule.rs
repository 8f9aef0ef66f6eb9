//! When requests are due, and how long a test goes on. An open loop and a trace are sequences of
//! moments; a closed loop has none, its clients send as soon as they have their answers.

use std::{sync::Arc, time::Duration};

use crate::bench::{
    arrival::{Arrivals, Rate, Spread},
    random::{Purpose, Random},
    trace,
};

/// How requests come.
#[derive(Clone, Debug)]
pub(crate) enum Pattern {
    /// At moments of their own, whatever the server does.
    Open {
        spread: Spread,
        sources: Vec<Source>,
    },
    /// So many clients, each with one request at a time; from the first number to the second
    /// over the test.
    Closed { from: usize, to: usize },
    /// As recorded.
    Trace(Arc<Vec<trace::Row>>),
}

/// One stream of arrivals.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Source {
    /// The tenant's place in the list; `None`: requests go to the tenants in turn.
    pub(crate) tenant: Option<usize>,
    pub(crate) rate: Rate,
}

/// What belongs to the warm-up, and where the test ends.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(crate) struct Extent {
    /// Requests due before this are not measured.
    pub(crate) warmup: Duration,
    /// Nor are so many first ones.
    pub(crate) warmup_requests: u64,
    /// Nothing is sent this long after the warm-up.
    pub(crate) duration: Option<Duration>,
    /// At most so many are measured.
    pub(crate) requests: Option<u64>,
}

// === impl Extent ===

impl Extent {
    pub(crate) fn is_warmup(&self, index: u64, at: Duration) -> bool {
        at < self.warmup || index < self.warmup_requests
    }

    /// The moment after which nothing is sent.
    pub(crate) fn end(&self) -> Option<Duration> {
        self.duration.map(|duration| self.warmup + duration)
    }
}

/// A request's moment and what the schedule says about it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Due {
    /// Its place in the test; with the seed it fixes what the request holds.
    pub(crate) index: u64,
    /// Since the start.
    pub(crate) at: Duration,
    pub(crate) warmup: bool,
    pub(crate) tenant: Option<usize>,
    /// The row of the trace.
    pub(crate) row: Option<usize>,
}

/// The moments of a test, in order.
#[derive(Debug)]
pub(crate) struct Schedule {
    moments: Moments,
    extent: Extent,
    index: u64,
    measured: u64,
}

#[derive(Debug)]
enum Moments {
    /// For each source its tenant, its next moment, and those after it.
    Sources(Vec<(Option<usize>, Duration, Arrivals)>),
    Rows(Arc<Vec<trace::Row>>),
}

// === impl Schedule ===

impl Schedule {
    /// `None` for a closed loop.
    pub(crate) fn new(pattern: &Pattern, extent: Extent, seed: u64) -> Option<Self> {
        let moments = match pattern {
            Pattern::Closed { .. } => return None,
            Pattern::Trace(rows) => Moments::Rows(Arc::clone(rows)),
            Pattern::Open { spread, sources } => {
                let source = |(number, source): (usize, &Source)| {
                    let random = Random::new(seed, Purpose::Arrivals(number as u32));
                    let mut arrivals = Arrivals::new(*spread, source.rate, random);
                    let first = arrivals.next().unwrap_or(Duration::MAX);
                    (source.tenant, first, arrivals)
                };
                Moments::Sources(sources.iter().enumerate().map(source).collect())
            }
        };
        Some(Self {
            moments,
            extent,
            index: 0,
            measured: 0,
        })
    }

    fn moment(&mut self) -> Option<(Duration, Option<usize>, Option<usize>)> {
        match &mut self.moments {
            Moments::Rows(rows) => {
                let row = self.index as usize;
                rows.get(row).map(|found| (found.at, None, Some(row)))
            }
            Moments::Sources(sources) => {
                let (tenant, next, arrivals) = sources.iter_mut().min_by_key(|source| source.1)?;
                let at = *next;
                *next = arrivals.next().unwrap_or(Duration::MAX);
                Some((at, *tenant, None))
            }
        }
    }
}

impl Iterator for Schedule {
    type Item = Due;

    fn next(&mut self) -> Option<Due> {
        if self
            .extent
            .requests
            .is_some_and(|limit| self.measured >= limit)
        {
            return None;
        }
        let (at, tenant, row) = self.moment()?;
        if self.extent.end().is_some_and(|end| at >= end) {
            return None;
        }
        let due = Due {
            index: self.index,
            at,
            warmup: self.extent.is_warmup(self.index, at),
            tenant,
            row,
        };
        self.index += 1;
        self.measured += u64::from(!due.warmup);
        Some(due)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(rates: &[(Option<usize>, f64)]) -> Pattern {
        let source = |(tenant, rate): &(Option<usize>, f64)| Source {
            tenant: *tenant,
            rate: Rate::steady(*rate),
        };
        Pattern::Open {
            spread: Spread::Poisson,
            sources: rates.iter().map(source).collect(),
        }
    }

    #[test]
    fn tenants_have_their_rates_and_moments_are_in_order() {
        let extent = Extent {
            warmup: Duration::from_secs(10),
            duration: Some(Duration::from_secs(100)),
            ..Extent::default()
        };
        let pattern = open(&[(Some(0), 20.0), (Some(1), 5.0)]);
        let all: Vec<Due> = Schedule::new(&pattern, extent, 1).unwrap().collect();
        assert!(
            all.windows(2)
                .all(|w| w[0].at <= w[1].at && w[0].index + 1 == w[1].index)
        );
        assert!(all.iter().all(|due| due.warmup == (due.at < extent.warmup)));
        let of = |tenant| all.iter().filter(|due| due.tenant == Some(tenant)).count();
        assert!((2000..2400).contains(&of(0)), "{}", of(0));
        assert!((470..630).contains(&of(1)), "{}", of(1));
        let again: Vec<Due> = Schedule::new(&pattern, extent, 1).unwrap().collect();
        assert_eq!(all, again);
    }

    #[test]
    fn requests_are_counted_without_the_warmup() {
        let extent = Extent {
            warmup_requests: 7,
            requests: Some(20),
            ..Extent::default()
        };
        let all: Vec<Due> = Schedule::new(&open(&[(None, 9.0)]), extent, 1)
            .unwrap()
            .collect();
        assert_eq!(all.len(), 27);
        assert_eq!(all.iter().filter(|due| due.warmup).count(), 7);
    }

    #[test]
    fn a_trace_is_replayed_row_by_row() {
        let row = |ms| trace::Row {
            at: Duration::from_millis(ms),
            ..trace::Row::default()
        };
        let pattern = Pattern::Trace(Arc::new(vec![row(0), row(5), row(5), row(90)]));
        let extent = Extent {
            duration: Some(Duration::from_millis(50)),
            ..Extent::default()
        };
        let schedule = Schedule::new(&pattern, extent, 1).unwrap();
        let rows: Vec<_> = schedule.map(|due| (due.row, due.at.as_millis())).collect();
        assert_eq!(rows, [(Some(0), 0), (Some(1), 5), (Some(2), 5)]);
    }
}
