//! Where the objectives stop holding: a bisection over a load. It knows loads as numbers and
//! verdicts as yes or no; who runs a test in between is not its matter.

/// What a search varies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Axis {
    /// Requests a second, of an open loop.
    Rate,
    /// Clients of a closed loop; whole numbers.
    Clients,
}

/// A search between two loads.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Search {
    axis: Axis,
    from: f64,
    to: f64,
    /// The search ends when the two bounds are this close, as a ratio.
    precision: f64,
    /// The highest load that held, the lowest that did not.
    held: Option<f64>,
    broke: Option<f64>,
}

// === impl Search ===

impl Search {
    pub(crate) fn new(axis: Axis, from: f64, to: f64, precision: f64) -> Self {
        Self {
            axis,
            from,
            to,
            precision,
            held: None,
            broke: None,
        }
    }

    /// The load to try next; `None` when the answer is known. The lowest is tried first, then the
    /// highest, then the geometric middle of what is left.
    pub(crate) fn next(&self) -> Option<f64> {
        let (held, broke) = match (self.held, self.broke) {
            (None, None) => return Some(self.from),
            // Not even the lowest.
            (None, Some(_)) => return None,
            (Some(held), None) => return (held < self.to).then_some(self.to),
            (Some(held), Some(broke)) => (held, broke),
        };
        match self.axis {
            Axis::Rate => {
                let is_close = broke / held <= 1.0 + self.precision;
                (!is_close).then(|| (held * broke).sqrt())
            }
            Axis::Clients => {
                let middle = (held * broke).sqrt().round();
                // Between neighbours there is nothing to try.
                (broke - held > 1.0).then(|| middle.clamp(held + 1.0, broke - 1.0))
            }
        }
    }

    /// What came of a load.
    pub(crate) fn found(&mut self, load: f64, holds: bool) {
        if holds {
            self.held = Some(self.held.map_or(load, |held| held.max(load)));
        } else {
            self.broke = Some(self.broke.map_or(load, |broke| broke.min(load)));
        }
    }

    /// The highest load that held, and whether a higher one is known not to.
    pub(crate) fn answer(&self) -> Option<(f64, bool)> {
        self.held.map(|held| (held, self.broke.is_some()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(mut search: Search, limit: f64) -> (Option<(f64, bool)>, usize) {
        let mut steps = 0;
        while let Some(load) = search.next() {
            search.found(load, load <= limit);
            steps += 1;
            assert!(steps < 40, "it does not end");
        }
        (search.answer(), steps)
    }

    #[test]
    fn a_rate_is_found_to_its_precision() {
        for limit in [1.0, 1.7, 30.0, 99.0] {
            let (answer, steps) = run(Search::new(Axis::Rate, 1.0, 100.0, 0.05), limit);
            let (found, bounded) = answer.unwrap();
            assert!(
                found <= limit && limit / found <= 1.05 && bounded,
                "{limit}: {found}"
            );
            assert!(steps <= 9, "{steps}");
        }
    }

    #[test]
    fn clients_are_whole_and_bounds_are_answers_too() {
        for limit in 1..=32 {
            let (answer, _) = run(
                Search::new(Axis::Clients, 1.0, 32.0, 0.05),
                f64::from(limit),
            );
            let bounded = limit < 32;
            assert_eq!(answer, Some((f64::from(limit), bounded)));
        }
        assert_eq!(run(Search::new(Axis::Rate, 1.0, 9.0, 0.05), 0.5), (None, 1));
        assert_eq!(
            run(Search::new(Axis::Rate, 3.0, 3.0, 0.05), 5.0).0,
            Some((3.0, false))
        );
    }
}
