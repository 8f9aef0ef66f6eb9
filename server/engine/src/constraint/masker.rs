//! The thread that works out which tokens may follow, while the engine thread runs the model: most masks are ready before the
//! step is. The metrics `espalier_constraint_mask_duration_seconds` and `..._wait_seconds` say how it goes.

use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::time::Instant;

use super::STACK_BYTES;
use super::machine::{Fault, Machine, TokenSet};
use crate::metrics;

/// A machine on its way to its next mask, and the way back.
pub(super) struct Errand {
    pub(super) machine: Machine,
    pub(super) home: SyncSender<(Machine, Result<TokenSet, Fault>)>,
}

/// The way to the thread; it ends with this.
pub(crate) struct Masker(SyncSender<Errand>);

impl Masker {
    /// Starts the thread. `places`: sequences that may be on their way at once.
    pub(crate) fn start(places: usize) -> std::io::Result<Self> {
        let (errands, waiting) = sync_channel::<Errand>(places);
        std::thread::Builder::new()
            .name("masks".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || waiting.into_iter().for_each(run))?;
        Ok(Masker(errands))
    }

    /// Never waits: without a place, or without a thread, the work is done here.
    pub(super) fn send(&self, errand: Errand) {
        match self.0.try_send(errand) {
            Ok(()) => {}
            Err(TrySendError::Full(errand) | TrySendError::Disconnected(errand)) => run(errand),
        }
    }
}

fn run(errand: Errand) {
    let Errand { mut machine, home } = errand;
    let since = Instant::now();
    let mask = machine.mask();
    metrics::mask_computed(since.elapsed());
    // The sequence may have left meanwhile.
    let _ = home.send((machine, mask));
}
