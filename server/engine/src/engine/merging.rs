//! Which versions get a merged copy and which lose theirs, looked at a few times a second. A request keeps what it was
//! admitted with, so nothing here changes a running request.

use std::time::{Duration, Instant};

use espalier_adapters::linear::OverlayBytes;
use espalier_adapters::profile::MergePolicy;
use espalier_adapters::version::VersionDigest;

use super::Engine;
use crate::adapter_pool::MergeView;
use crate::merger::MergeJob;
use crate::metrics;
use crate::scheduler::Plan;
use crate::sequence::ActiveRequest;
use crate::traffic::Candidate;

/// How often traffic is judged.
const JUDGED: Duration = Duration::from_millis(50);

/// Versions that are looked at: what comes after them has next to no share.
const BUSIEST: usize = 16;

impl Engine {
    /// Books a step's rows by the versions that they are for.
    pub(super) fn count_traffic(&mut self, plan: &Plan, now: Instant) {
        if self.config.merged_bytes == 0 {
            return;
        }
        let mut versions: Vec<(VersionDigest, usize)> = Vec::new();
        let mut base_rows = 0;
        for item in &plan.items {
            let sequence = self.sequences.get(&item.id);
            let request = sequence.and_then(|sequence| self.requests.get(&sequence.request));
            match request.and_then(ActiveRequest::alone) {
                Some(digest) => match versions.iter_mut().find(|(known, _)| *known == digest) {
                    Some((_, rows)) => *rows += item.rows,
                    None => versions.push((digest, item.rows)),
                },
                None => base_rows += item.rows,
            }
        }
        self.traffic.step(&versions, base_rows, now);
    }

    /// Gives up copies that do not pay any more, and has the next one made that would.
    pub(super) fn judge_merging(&mut self, now: Instant) {
        if self.config.merged_bytes == 0 || now < self.next_judgement {
            return;
        }
        self.next_judgement = now + JUDGED;
        for view in self.pool.merged() {
            let candidate = self.candidate(&view);
            if self.traffic.demotes(&view.digest, &candidate) {
                self.demote(view.digest);
            }
        }
        for digest in self.traffic.busiest().into_iter().take(BUSIEST) {
            let Some(view) = self.pool.unmerged(&digest) else {
                continue;
            };
            let candidate = self.candidate(&view);
            if self.traffic.promotes(&digest, &candidate) && self.promote(&view, &candidate) {
                return;
            }
        }
    }

    fn candidate(&self, view: &MergeView) -> Candidate {
        let policy = match view.adapter.can_merge() {
            false => MergePolicy::Unmerged,
            true => view.policy,
        };
        Candidate {
            policy,
            adapter_bytes: view.adapter.bytes(),
            copy: OverlayBytes::of(&view.adapter, &**self.runner.model()),
        }
    }

    /// Has a copy made, if there is room for it or room can be made; says whether one is on its way.
    fn promote(&mut self, view: &MergeView, candidate: &Candidate) -> bool {
        let Some(reservation) = self.pool.reserve_merged(candidate.copy.merged) else {
            self.make_merged_room(view);
            return false;
        };
        let Some(lease) = self.pool.begin_merge(&view.digest) else {
            return false;
        };
        let job = MergeJob {
            digest: view.digest,
            lease,
            reservation,
        };
        if self.merger.try_send(job).is_err() {
            self.pool.demote(&view.digest);
            return false;
        }
        true
    }

    /// Gives up the copy that is used least, if this version is used more: its bytes come back with the last request
    /// that runs on it, and the next look finds them.
    fn make_merged_room(&mut self, wanted: &MergeView) {
        let share = self.traffic.share_of(&wanted.digest);
        let rank = |view: &MergeView| {
            (
                view.policy == MergePolicy::Merged,
                self.traffic.share_of(&view.digest),
            )
        };
        let least = self.pool.merged().into_iter().min_by(|a, b| {
            rank(a)
                .partial_cmp(&rank(b))
                .unwrap_or(std::cmp::Ordering::Equal)
        });
        let Some(least) = least else { return };
        let (kept, least_share) = rank(&least);
        let wins = if kept {
            wanted.policy == MergePolicy::Merged && least_share < share / 2.0
        } else {
            wanted.policy == MergePolicy::Merged || least_share < share
        };
        if wins {
            self.demote(least.digest);
        }
    }

    fn demote(&mut self, digest: VersionDigest) {
        if self.pool.demote(&digest) {
            tracing::info!(%digest, "merged copy given up");
            metrics::demoted();
        }
    }
}
