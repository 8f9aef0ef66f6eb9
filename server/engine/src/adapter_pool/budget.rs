//! Bytes of adapters, counted where they are held and given back by `Drop`, so that no path can forget them. Must not know
//! what the bytes are.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A number of bytes that all adapters share.
#[derive(Clone, Debug)]
pub(crate) struct Budget {
    used: Arc<AtomicUsize>,
    limit: usize,
}

/// Bytes of the budget, given back on drop.
#[derive(Debug)]
pub(crate) struct Reservation {
    used: Arc<AtomicUsize>,
    bytes: usize,
}

// === impl Budget ===

impl Budget {
    pub(crate) fn new(limit: usize) -> Self {
        Budget {
            used: Arc::new(AtomicUsize::new(0)),
            limit,
        }
    }

    pub(crate) fn used(&self) -> usize {
        self.used.load(Ordering::SeqCst)
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    pub(crate) fn reserve(&self, bytes: usize) -> Option<Reservation> {
        let fits = |used: usize| used.checked_add(bytes).filter(|&sum| sum <= self.limit);
        self.used
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, fits)
            .ok()
            .map(|_| Reservation {
                used: Arc::clone(&self.used),
                bytes,
            })
    }
}

// === impl Reservation ===

impl Reservation {
    /// Gives back what was reserved too much.
    pub(crate) fn shrink(&mut self, bytes: usize) {
        let surplus = self.bytes.saturating_sub(bytes);
        self.used.fetch_sub(surplus, Ordering::SeqCst);
        self.bytes -= surplus;
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.used.fetch_sub(self.bytes, Ordering::SeqCst);
    }
}
