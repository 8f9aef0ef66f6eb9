//! Where jobs with small micro-batches meet, so that one pass over the weights serves several.
//!
//! A job that comes to a pass posts its share if others are here or on their way. When all have come, the one whose turn it is
//! runs the pass for those that go with it, and the others wait for no more than one such pass of each kind. A share is posted, or away with its host, or back, and never two of these. The
//! meeting must not know turns, threads or what a pass computes.

use crate::train::trainer::Share;

/// Rows of a pass that is shared: beyond it reading the weights costs little beside computing on them.
const SHARED_ROWS: usize = 256;

/// A share above this goes alone: two of 120 rows in a pass took longer than one after the other.
const LARGEST_GUEST: usize = SHARED_ROWS / 4;

/// Who is where.
#[derive(Debug, Default)]
pub(super) struct Meeting {
    /// Jobs between two small passes: they will soon be here.
    coming: Vec<u64>,
    /// In the order in which they came.
    posted: Vec<(u64, Share)>,
    /// Guests whose share a host has, and the host.
    away: Vec<(u64, u64)>,
    /// Guests whose share is back; `None`: the pass failed with its host.
    back: Vec<(u64, Option<Share>)>,
}

// === impl Meeting ===

impl Meeting {
    /// Whether a share is small enough to be worth company, and of a kind that can have it.
    pub(super) fn is_for(share: &Share) -> bool {
        share.rows() <= LARGEST_GUEST && share.goes_with(share)
    }

    /// A job is on its way to its next small pass.
    pub(super) fn come(&mut self, job: u64) {
        if !self.is_coming(job) {
            self.coming.push(job);
        }
    }

    /// A job is not on its way any more.
    pub(super) fn leave(&mut self, job: u64) {
        self.coming.retain(|coming| *coming != job);
    }

    pub(super) fn is_coming(&self, job: u64) -> bool {
        self.coming.contains(&job)
    }

    pub(super) fn post(&mut self, job: u64, share: Share) {
        self.posted.push((job, share));
    }

    /// The share that a job has posted, if no host has taken it.
    pub(super) fn withdraw(&mut self, job: u64) -> Option<Share> {
        let at = self.posted.iter().position(|(posted, _)| *posted == job)?;
        Some(self.posted.remove(at).1)
    }

    /// Whether nobody has posted a share.
    pub(super) fn is_empty(&self) -> bool {
        self.posted.is_empty()
    }

    /// Whether a job waits here for a host.
    pub(super) fn is_posted(&self, job: u64) -> bool {
        self.posted.iter().any(|(posted, _)| *posted == job)
    }

    /// Whether a host has the job's share.
    pub(super) fn is_away(&self, job: u64) -> bool {
        self.away.iter().any(|(guest, _)| *guest == job)
    }

    /// Whether a job has others' shares.
    pub(super) fn is_host(&self, job: u64) -> bool {
        self.away.iter().any(|(_, host)| *host == job)
    }

    /// The posted shares that go with a host's and fit beside it, first come first served.
    pub(super) fn board(&mut self, host: u64, share: &Share) -> Vec<(u64, Share)> {
        let mut room = SHARED_ROWS.min(share.room()).saturating_sub(share.rows());
        let mut guests = Vec::new();
        let mut at = 0;
        while at < self.posted.len() {
            let (_, posted) = &self.posted[at];
            if posted.rows() <= room && posted.goes_with(share) {
                room -= posted.rows();
                guests.push(self.posted.remove(at));
            } else {
                at += 1;
            }
        }
        let away = guests.iter().map(|(guest, _)| (*guest, host));
        self.away.extend(away);
        guests
    }

    /// A guest's share is back from its host, or lost with it.
    pub(super) fn bring_back(&mut self, guest: u64, share: Option<Share>) {
        self.away.retain(|(away, _)| *away != guest);
        self.back.push((guest, share));
        self.come(guest);
    }

    /// What has come back for a job.
    pub(super) fn take_back(&mut self, job: u64) -> Option<Option<Share>> {
        let at = self.back.iter().position(|(back, _)| *back == job)?;
        Some(self.back.swap_remove(at).1)
    }

    /// Forgets a job that has ended. Its share, if a host still has it, is dropped when it is back.
    pub(super) fn forget(&mut self, job: u64) {
        self.leave(job);
        self.withdraw(job);
        self.back.retain(|(back, _)| *back != job);
    }
}
