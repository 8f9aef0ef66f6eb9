//! How bulk work yields to interactive work, and how it goes on nevertheless: the scheduler's two bands. Must not know
//! what a step costs or who asked.

use super::{Entry, Plan, Scheduler, SequenceId, TenantQueue};
use crate::block_manager::blocks_for;
use crate::config::BLOCK_SIZE;
use crate::request::Priority;

/// Steps without a row after which one bulk sequence is promoted: it then counts as interactive until its end.
pub(super) const BULK_PATIENCE: u32 = 32;

// === impl Scheduler ===

impl Scheduler {
    /// The first sequence that can begin: promoted bulk, interactive, bulk; in each of the tenant with the least service.
    pub(super) fn next_waiting(&self) -> Option<SequenceId> {
        let bulk = self.next_of(Priority::Bulk);
        let interactive = || self.next_of(Priority::Interactive);
        bulk.filter(|&id| !self.yields(id))
            .or_else(interactive)
            .or(bulk)
    }

    /// The first sequence of a priority that can begin, of the tenant with the least service; a promoted one before.
    fn next_of(&self, priority: Priority) -> Option<SequenceId> {
        // What gave way stands first in its queue again, before the promoted one that it gave way to.
        let first_ready = |tenant: &TenantQueue| {
            let ready = || {
                tenant
                    .waiting
                    .iter()
                    .copied()
                    .filter(|&id| self.is_ready(id))
            };
            ready()
                .find(|&id| !self.yields(id))
                .or_else(|| ready().next())
        };
        self.tenants
            .iter()
            .filter(|((of, _), _)| *of == priority)
            .filter_map(|(_, tenant)| Some((tenant.service, first_ready(tenant)?)))
            .min_by_key(|&(service, id)| {
                let promoted = priority == Priority::Bulk && !self.yields(id);
                (!promoted, service)
            })
            .map(|(_, id)| id)
    }

    pub(super) fn yields(&self, id: SequenceId) -> bool {
        self.entries.get(&id).is_some_and(|entry| entry.yields)
    }

    /// Whether a sequence that does not yield waits and could begin. When places or blocks are lacking for it, bulk
    /// work gives up its own, the last admitted first.
    pub(super) fn make_way(&mut self, plan: &mut Plan) -> bool {
        let Some(id) = self.next_waiting().filter(|&id| !self.yields(id)) else {
            return false;
        };
        let shares = self.entries.get(&id).and_then(|entry| entry.prefix);
        while !self.has_room(id) {
            if self.has_place() && self.drop_retained_except(shares.map(|prefix| prefix.of)) {
                continue;
            }
            let Some(last) = self.running.last().copied().filter(|&id| self.yields(id)) else {
                break;
            };
            self.preempt(last);
            plan.preempted.push(last);
        }
        true
    }

    /// Whether a waiting sequence would find a place and blocks; what the prefix cache knows only makes it smaller.
    fn has_room(&self, id: SequenceId) -> bool {
        let Some(entry) = self.entries.get(&id) else {
            return true;
        };
        let shared = entry
            .prefix
            .filter(|prefix| self.entries.contains_key(&prefix.of))
            .map_or(0, |prefix| prefix.tokens / BLOCK_SIZE);
        let reserve = self.running.len().min(self.blocks.total() / 8);
        let wanted = blocks_for(entry.tokens.len()) - shared + reserve;
        self.has_place() && wanted <= self.blocks.available()
    }

    fn has_place(&self) -> bool {
        self.running.len() < self.limits.max_num_seqs
    }

    /// Lets one bulk sequence count as interactive from now on: the first that runs, else the first that can begin.
    /// One at a time: while a promoted one is on its way or runs, no other is.
    pub(super) fn promote(&mut self) {
        let waiting = self.next_of(Priority::Bulk);
        let promoted = |entry: &Entry| entry.priority == Priority::Bulk && !entry.yields;
        if self.count_running(|entry| promoted(entry) && !entry.paused) > 0
            || waiting.is_some_and(|id| !self.yields(id))
        {
            return;
        }
        let runs = |id: &&SequenceId| {
            self.entries
                .get(id)
                .is_some_and(|entry| entry.yields && !entry.paused)
        };
        let running = self.running.iter().find(runs).copied();
        let Some(id) = running.or(waiting) else {
            return;
        };
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.yields = false;
        }
        if running.is_some() {
            self.running.retain(|&other| other != id);
            self.take_place(id);
        }
    }

    /// Puts a sequence among the running ones: those that yield stay behind those that do not.
    pub(super) fn take_place(&mut self, id: SequenceId) {
        let end = self.running.len();
        let place = if self.yields(id) {
            end
        } else {
            let first = self.running.iter().position(|&other| self.yields(other));
            first.unwrap_or(end)
        };
        self.running.insert(place, id);
    }

    /// Counts the steps in which bulk work could have had a row and had none.
    pub(super) fn note_bulk(&mut self, plan: &Plan) {
        let is_bulk = |id: SequenceId| {
            self.entries
                .get(&id)
                .is_some_and(|entry| entry.priority == Priority::Bulk)
        };
        let served = plan.items.iter().any(|item| is_bulk(item.id));
        let could = || {
            self.next_of(Priority::Bulk).is_some()
                || self.count_running(|entry| {
                    entry.priority == Priority::Bulk && !entry.paused && entry.remaining() > 0
                }) > 0
        };
        self.bulk_waited = if served || !could() {
            0
        } else {
            self.bulk_waited + 1
        };
    }
}
