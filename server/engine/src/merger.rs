//! Makes merged copies on a thread of its own, one after the other, so that neither the engine nor the loaders wait for
//! one. A copy is new memory beside the base; must not know when one is wanted.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Instant;

use espalier_adapters::linear::Overlay;
use espalier_adapters::ops::{Backend, Ops};
use espalier_adapters::version::VersionDigest;

use crate::adapter_pool::{AdapterLease, Reservation, Shelf};
use crate::metrics;
use crate::model::Model;

/// The weights that take the base's place.
pub(crate) type MergedWeights = Overlay<<Backend as Ops>::Matrix>;

/// A merged copy with the bytes that it holds of its budget.
#[derive(Debug)]
pub(crate) struct MergedCopy {
    pub(crate) weights: Arc<MergedWeights>,
    pub(crate) reservation: Reservation,
}

/// One copy to make. The lease keeps the adapter in memory until it is made.
pub(crate) struct MergeJob {
    pub(crate) digest: VersionDigest,
    pub(crate) lease: AdapterLease,
    pub(crate) reservation: Reservation,
}

/// Starts the thread. It ends when the sender of jobs is dropped.
///
/// # Errors
/// A thread that cannot be started.
pub(crate) fn start(model: Arc<Model>, shelf: Arc<Shelf>) -> std::io::Result<SyncSender<MergeJob>> {
    // One waits at most: a second wish is judged anew when its turn comes.
    let (sender, jobs) = sync_channel(1);
    std::thread::Builder::new()
        .name("adapter-merger".to_owned())
        .spawn(move || run(&model, &shelf, &jobs))?;
    Ok(sender)
}

fn run(model: &Model, shelf: &Shelf, jobs: &Receiver<MergeJob>) {
    while let Ok(job) = jobs.recv() {
        let began = Instant::now();
        let MergeJob {
            digest,
            lease,
            mut reservation,
        } = job;
        let build = || Overlay::build(&lease.adapter, model, || !shelf.is_stopped());
        let built = catch_unwind(AssertUnwindSafe(build)).unwrap_or_else(|_| {
            metrics::panic_caught("merge");
            None
        });
        let copy = built.map(|weights| {
            reservation.shrink(weights.bytes());
            MergedCopy {
                weights: Arc::new(weights),
                reservation,
            }
        });
        tracing::info!(%digest, made = copy.is_some(), ms = began.elapsed().as_millis(), "merged copy");
        metrics::merge_ended(copy.is_some(), began.elapsed());
        shelf.merged(digest, copy);
    }
}
