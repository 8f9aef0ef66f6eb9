//! Where the engine thread's time goes: one look at the clock between the parts of a step, always on, because a handful
//! of them costs less than a microsecond beside a step of milliseconds.

use std::time::{Duration, Instant};

/// Time of the engine thread since its start, by what it did.
#[derive(Clone, Debug, Default, PartialEq, serde::Serialize)]
pub struct StepTimes {
    /// Waiting, because there was nothing to do.
    pub idle: Duration,
    /// Commands, adapters that came, deadlines and readers.
    pub commands: Duration,
    /// Deciding who runs.
    pub schedule: Duration,
    /// The decoder, from tokens to states.
    pub model: Duration,
    /// From states to logits.
    pub logits: Duration,
    /// Choosing tokens, and their text.
    pub sampling: Duration,
    /// Heads, scores, events to readers.
    pub results: Duration,
    /// Lent to training.
    pub training: Duration,
    /// Statistics.
    pub publish: Duration,
}

/// Cuts the engine thread's time in parts without a gap.
pub(crate) struct StepClock {
    last: Instant,
    times: StepTimes,
}

impl StepClock {
    pub(crate) fn new() -> Self {
        StepClock {
            last: Instant::now(),
            times: StepTimes::default(),
        }
    }

    /// Books the time since the last call.
    pub(crate) fn lap(&mut self, part: impl FnOnce(&mut StepTimes) -> &mut Duration) {
        let now = Instant::now();
        *part(&mut self.times) += now - self.last;
        self.last = now;
    }

    pub(crate) fn times(&self) -> &StepTimes {
        &self.times
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_parts_add_up_to_the_whole() {
        let begin = Instant::now();
        let mut clock = StepClock::new();
        let parts: [fn(&mut StepTimes) -> &mut Duration; 3] = [
            |times| &mut times.model,
            |times| &mut times.idle,
            |times| &mut times.model,
        ];
        for part in parts {
            std::thread::sleep(Duration::from_millis(2));
            clock.lap(part);
        }
        let (model, idle) = (clock.times().model, clock.times().idle);
        assert!(model >= Duration::from_millis(4) && idle >= Duration::from_millis(2));
        assert!(model + idle <= begin.elapsed());
    }
}
