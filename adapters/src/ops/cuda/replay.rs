//! Steps that recur are recorded once and replayed: one call instead of some hundred launches, and no gaps between them.
//!
//! Two steps are the same work if they brought tables of the same sizes to the same places, with the same grids, and no buffer
//! moved meanwhile: then every launch has the arguments of the last time. What the tables hold may differ. The first step of
//! a kind runs plainly, which loads kernels and grows buffers; the second one is recorded.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use super::driver::Recording;

/// Kinds of steps that are kept; more than that many shapes do not recur.
const MOST_KINDS: usize = 512;

/// Steps by kind.
#[derive(Debug, Default)]
pub(super) struct Replays {
    /// What the pass has brought so far.
    signature: DefaultHasher,
    /// How often buffers had moved when the kinds below were seen.
    moved: u64,
    /// `None`: it ran once and was not recorded yet.
    kinds: HashMap<u64, Option<Arc<Recording>>>,
}

/// What to do with a step.
pub(super) enum Step {
    /// Run it.
    Run,
    /// Record it, replay that, and tell [`Replays::recorded`].
    Record,
    /// Replay this.
    Replay(Arc<Recording>),
}

// === impl Replays ===

impl Replays {
    /// A pass begins.
    pub(super) fn begin(&mut self) {
        self.signature = DefaultHasher::new();
    }

    /// The pass's launches depend on this.
    pub(super) fn note(&mut self, what: impl Hash) {
        what.hash(&mut self.signature);
    }

    /// What to do with the step of this pass. What is about memory that is gone is forgotten, and everything when there is too
    /// much of it.
    pub(super) fn step(&mut self, moved: u64) -> Step {
        if self.moved != moved || self.kinds.len() > MOST_KINDS {
            self.kinds.clear();
            self.moved = moved;
        }
        match self.kinds.get(&self.signature.finish()) {
            Some(Some(recording)) => Step::Replay(Arc::clone(recording)),
            Some(None) => Step::Record,
            None => {
                self.kinds.insert(self.signature.finish(), None);
                Step::Run
            }
        }
    }

    /// The step of this pass was recorded.
    pub(super) fn recorded(&mut self, recording: Arc<Recording>) {
        self.kinds.insert(self.signature.finish(), Some(recording));
    }
}
