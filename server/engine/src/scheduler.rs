//! Who computes how many tokens in the next step. Pure policy over counts: no tensors, no clock, no text, so that it is
//! property-tested without a model.
//!
//! A step first gives every running sequence its decode row, then fills what is left with prefill: running prefills in
//! the order of their admission, then new sequences. New ones are taken first come, first served within a tenant, and
//! between tenants from the one that has had the least service (virtual token counters, S-LoRA's `vtc_fair`: a prompt
//! token counts 1, an output token 2, what the prefix cache holds nothing; who comes back is lifted to the least among
//! the busy). When blocks run out, idle ones of the prefix cache go first; then the sequence admitted last loses its own
//! and is computed again later, as far as nobody took them: the oldest always goes on, so all of them end.
//!
//! Bulk work yields to interactive work: it is admitted after it, gives up its place, its blocks and its share of the
//! prefill for it. So that it never stops, one bulk sequence is promoted when none had a row for [`BULK_PATIENCE`]
//! steps: it takes the next place there is and keeps it like an interactive one. So while interactive work fills
//! the machine, bulk work goes on with one sequence at a time.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

mod bulk;

use self::bulk::BULK_PATIENCE;
use crate::block_manager::{BlockCopy, BlockManager, BlockTable, OutOfBlocks, blocks_for};
use crate::cache_key::CacheKey;
use crate::config::BLOCK_SIZE;
use crate::request::Priority;

/// One sequence for its whole life; never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct SequenceId(pub(crate) u64);

/// What the scheduler must know of a new sequence.
#[derive(Clone, Debug)]
pub(crate) struct NewSequence {
    pub(crate) id: SequenceId,
    pub(crate) key: Arc<CacheKey>,
    /// What is known of it; sampled ones are added by [`Scheduler::push_token`].
    pub(crate) tokens: Vec<u32>,
    /// Nobody needs the states of so many of the first tokens, so they may come from the prefix cache. The last token is
    /// always computed.
    pub(crate) reusable: usize,
    /// Another sequence whose first tokens are the same.
    pub(crate) prefix: Option<Prefix>,
    pub(crate) priority: Priority,
}

/// The first `tokens` tokens are those of sequence `of`, which was added before. While that one lives and has not come
/// so far, the new one waits for it; when it is gone, the new one computes everything itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Prefix {
    pub(crate) of: SequenceId,
    pub(crate) tokens: usize,
}

/// The rows of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ScheduledSequence {
    pub(crate) id: SequenceId,
    /// Position of the first row.
    pub(crate) start: usize,
    /// Rows, at least one.
    pub(crate) rows: usize,
    /// The last row is the last known token: its output is the sequence's next step.
    pub(crate) completes: bool,
}

/// One step. Sequences that the same weights answer stand together; the base model comes first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    pub(crate) items: Vec<ScheduledSequence>,
    /// To be done before the step.
    pub(crate) copies: Vec<BlockCopy>,
    /// Sequences that begin (or begin again) with this step.
    pub(crate) admitted: Vec<Admitted>,
    /// Sequences that lost their blocks.
    pub(crate) preempted: Vec<SequenceId>,
}

/// A sequence that begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Admitted {
    pub(crate) id: SequenceId,
    /// Tokens that it found computed,
    pub(crate) computed: usize,
    /// and whether in the prefix cache rather than with its sibling.
    pub(crate) cached: bool,
}

/// Bounds of a step, and what the scheduler keeps between steps.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SchedulerLimits {
    pub(crate) max_num_seqs: usize,
    pub(crate) max_num_batched_tokens: usize,
    pub(crate) prefill_chunk_tokens: usize,
    /// Whether blocks are kept after their sequences and found again.
    pub(crate) prefix_cache: bool,
}

/// Where a sequence is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Status {
    Waiting,
    Running,
    /// Finished; its blocks stay until those that share its prefix have begun.
    Retained,
}

struct Entry {
    key: Arc<CacheKey>,
    status: Status,
    priority: Priority,
    /// Gives way to interactive work: bulk that was not promoted.
    yields: bool,
    /// Its reader does not keep up: no rows, and no admission.
    paused: bool,
    tokens: Vec<u32>,
    reusable: usize,
    computed: usize,
    table: BlockTable,
    prefix: Option<Prefix>,
    /// Waiting sequences whose prefix this one is.
    dependents: usize,
}

/// A tenant with at least one sequence.
#[derive(Default)]
struct TenantQueue {
    waiting: VecDeque<SequenceId>,
    /// Sequences that wait or run.
    alive: usize,
    /// Virtual tokens served.
    service: u64,
}

/// Waiting and running sequences, and the blocks between them.
pub(crate) struct Scheduler {
    limits: SchedulerLimits,
    blocks: BlockManager,
    entries: HashMap<SequenceId, Entry>,
    /// Those that yield stand behind those that do not, and so lose blocks first and get rows last; else in the order
    /// of admission. Paused ones included.
    running: Vec<SequenceId>,
    tenants: BTreeMap<QueueKey, TenantQueue>,
    waiting: usize,
    /// Steps since bulk work that could have run had a row.
    bulk_waited: u32,
}

/// Fairness is between tenants of one priority: a tenant's bulk work does not count against its interactive calls.
type QueueKey = (Priority, Arc<str>);

const PREFILL_COST: u64 = 1;
const DECODE_COST: u64 = 2;

// === impl Entry ===

impl Entry {
    fn remaining(&self) -> usize {
        self.tokens.len() - self.computed
    }

    fn decodes(&self) -> bool {
        self.computed > 0 && self.remaining() == 1
    }

    fn queue(&self) -> QueueKey {
        (self.priority, Arc::clone(self.key.tenant()))
    }
}

// === impl Scheduler ===

impl Scheduler {
    /// `blocks` must hold the longest sequence that will be added.
    pub(crate) fn new(limits: SchedulerLimits, blocks: usize) -> Self {
        Scheduler {
            limits,
            blocks: BlockManager::new(blocks, limits.prefix_cache),
            entries: HashMap::new(),
            running: Vec::new(),
            tenants: BTreeMap::new(),
            waiting: 0,
            bulk_waited: 0,
        }
    }

    /// Puts a sequence at the end of its tenant's queue.
    pub(crate) fn add(&mut self, new: NewSequence) {
        let prefix = new.prefix.filter(|prefix| {
            prefix.tokens > 0
                && self
                    .entries
                    .get(&prefix.of)
                    .is_some_and(|of| of.key == new.key && of.tokens.len() >= prefix.tokens)
        });
        if let Some(of) = prefix.and_then(|prefix| self.entries.get_mut(&prefix.of)) {
            of.dependents += 1;
        }
        let floor = self
            .tenants
            .iter()
            .filter(|((priority, _), _)| *priority == new.priority)
            .map(|(_, tenant)| tenant.service)
            .min()
            .unwrap_or(0);
        let queue = (new.priority, Arc::clone(new.key.tenant()));
        let tenant = self.tenants.entry(queue).or_default();
        if tenant.alive == 0 {
            tenant.service = tenant.service.max(floor);
        }
        tenant.alive += 1;
        tenant.waiting.push_back(new.id);
        self.waiting += 1;
        let table = BlockTable::new(Arc::clone(&new.key));
        let entry = Entry {
            key: new.key,
            status: Status::Waiting,
            priority: new.priority,
            yields: new.priority == Priority::Bulk,
            paused: false,
            tokens: new.tokens,
            reusable: new.reusable,
            computed: 0,
            table,
            prefix,
            dependents: 0,
        };
        self.entries.insert(new.id, entry);
    }

    /// Rows of prefill in a step that also decodes, from now on.
    pub(crate) fn set_prefill_chunk(&mut self, tokens: usize) {
        self.limits.prefill_chunk_tokens = tokens;
    }

    /// Plans the next step. An empty plan means that nothing can run.
    pub(crate) fn schedule(&mut self) -> Plan {
        let mut plan = Plan::default();
        if self.bulk_waited >= BULK_PATIENCE {
            self.promote();
        }
        let urgent = self.make_way(&mut plan);
        let yielded = plan.preempted.len();
        let decodes = self.count_running(|entry| !entry.paused && entry.decodes());
        let mut prefill_left = self.limits.max_num_batched_tokens.saturating_sub(decodes);
        if decodes > 0 {
            prefill_left = prefill_left.min(self.limits.prefill_chunk_tokens);
        }
        self.continue_running(&mut plan, &mut prefill_left, urgent);
        if plan.preempted.len() == yielded {
            self.admit(&mut plan, &mut prefill_left);
        }
        self.note_bulk(&plan);
        let weights = |item: &ScheduledSequence| Some(self.entries.get(&item.id)?.key.weights());
        plan.items.sort_by(|a, b| weights(a).cmp(&weights(b)));
        plan
    }

    /// Books rows that were computed: from now on others may find them.
    pub(crate) fn complete(&mut self, item: &ScheduledSequence) {
        if let Some(entry) = self.entries.get_mut(&item.id) {
            entry.computed = item.start + item.rows;
            self.blocks
                .know(&mut entry.table, &entry.tokens[..entry.computed]);
        }
    }

    /// Adds a sampled token, to be computed next.
    pub(crate) fn push_token(&mut self, id: SequenceId, token: u32) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.tokens.push(token);
        }
    }

    /// All known tokens of a sequence.
    pub(crate) fn tokens(&self, id: SequenceId) -> &[u32] {
        self.entries.get(&id).map_or(&[], |entry| &entry.tokens)
    }

    /// A paused sequence keeps its blocks (while there are enough), gets no rows and is not admitted.
    pub(crate) fn set_paused(&mut self, id: SequenceId, paused: bool) {
        if let Some(entry) = self.entries.get_mut(&id) {
            entry.paused = paused;
        }
    }

    /// Ends a sequence, whatever it is doing. Its blocks are free (or idle) now, or when the last one that shares them
    /// began.
    pub(crate) fn finish(&mut self, id: SequenceId) {
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        let was = std::mem::replace(&mut entry.status, Status::Retained);
        let tenant = entry.queue();
        let unused_prefix = entry.prefix.take();
        let retain = was != Status::Waiting && entry.dependents > 0 && entry.remaining() == 0;
        match was {
            Status::Waiting => {
                self.waiting -= 1;
                if let Some(queue) = self.tenants.get_mut(&tenant) {
                    queue.waiting.retain(|&waiting| waiting != id);
                }
            }
            Status::Running => self.running.retain(|&running| running != id),
            Status::Retained => return,
        }
        if let Some(prefix) = unused_prefix {
            self.drop_dependent(prefix.of);
        }
        if !retain {
            self.forget(id);
        }
        if let Some(queue) = self.tenants.get_mut(&tenant) {
            queue.alive -= 1;
            if queue.alive == 0 {
                self.tenants.remove(&tenant);
            }
        }
    }

    /// The blocks of a running sequence.
    pub(crate) fn block_table(&self, id: SequenceId) -> &[u32] {
        self.entries
            .get(&id)
            .map_or(&[], |entry| entry.table.blocks())
    }

    /// Whether a step may have rows. Not certain: what waits may wait for blocks of paused sequences.
    pub(crate) fn has_work(&self) -> bool {
        self.waiting > 0 || self.count_running(|entry| !entry.paused && entry.remaining() > 0) > 0
    }

    pub(crate) fn running(&self) -> usize {
        self.running.len()
    }

    pub(crate) fn waiting(&self) -> usize {
        self.waiting
    }

    /// Blocks that sequences hold.
    pub(crate) fn blocks_used(&self) -> usize {
        self.blocks.total() - self.blocks.available()
    }

    /// Blocks that nobody holds, kept for what is in them.
    pub(crate) fn blocks_idle(&self) -> usize {
        self.blocks.idle()
    }

    /// Kept blocks that were given to others so far.
    pub(crate) fn evictions(&self) -> u64 {
        self.blocks.evictions()
    }

    pub(crate) fn blocks_total(&self) -> usize {
        self.blocks.total()
    }

    /// Largest minus smallest service of the tenants whose interactive work waits.
    pub(crate) fn service_gap(&self) -> u64 {
        let waiting = || {
            self.tenants
                .iter()
                .filter(|((priority, _), tenant)| {
                    *priority == Priority::Interactive && !tenant.waiting.is_empty()
                })
                .map(|(_, tenant)| tenant.service)
        };
        waiting().max().unwrap_or(0) - waiting().min().unwrap_or(0)
    }

    fn count_running(&self, holds: impl Fn(&Entry) -> bool) -> usize {
        self.running
            .iter()
            .filter(|id| self.entries.get(id).is_some_and(&holds))
            .count()
    }

    /// Rows for the sequences that run, oldest first: a victim of preemption is always one that has no rows yet.
    /// With `urgent` work waiting, bulk work that yields gets no rows of prefill.
    fn continue_running(&mut self, plan: &mut Plan, prefill_left: &mut usize, urgent: bool) {
        let mut index = 0;
        while let Some(&id) = self.running.get(index) {
            let Some(entry) = self.entries.get(&id) else {
                break;
            };
            let held = urgent && entry.yields && !entry.decodes();
            if entry.paused || held || entry.remaining() == 0 {
                index += 1;
                continue;
            }
            let rows = if entry.decodes() {
                1
            } else {
                entry.remaining().min(*prefill_left)
            };
            if rows == 0 {
                index += 1;
                continue;
            }
            if !self.grow_or_preempt(id, plan) {
                // The sequence itself was the victim; the next one has moved to this index.
                continue;
            }
            if !self.entries.get(&id).is_some_and(Entry::decodes) {
                *prefill_left -= rows;
            }
            self.give_rows(id, rows, plan);
            // Victims that are paused may stand before this one.
            index = self
                .running
                .iter()
                .position(|&running| running == id)
                .map_or(index, |position| position + 1);
        }
    }

    /// Makes room for all tokens of a running sequence. False when that cost it its own place.
    fn grow_or_preempt(&mut self, id: SequenceId, plan: &mut Plan) -> bool {
        loop {
            let Some(entry) = self.entries.get_mut(&id) else {
                return false;
            };
            if self
                .blocks
                .grow(&mut entry.table, entry.tokens.len())
                .is_ok()
            {
                return true;
            }
            if self.drop_retained_except(None) {
                continue;
            }
            let victim = self.victim().unwrap_or(id);
            self.preempt(victim);
            plan.preempted.push(victim);
            if victim == id {
                return false;
            }
        }
    }

    /// Who gives up blocks first: a paused sequence, else the one admitted last.
    fn victim(&self) -> Option<SequenceId> {
        let paused = |id: &&SequenceId| self.entries.get(id).is_some_and(|entry| entry.paused);
        self.running
            .iter()
            .rev()
            .find(paused)
            .or(self.running.last())
            .copied()
    }

    fn preempt(&mut self, id: SequenceId) {
        self.running.retain(|&running| running != id);
        let Some(entry) = self.entries.get_mut(&id) else {
            return;
        };
        entry.status = Status::Waiting;
        entry.computed = 0;
        let table = std::mem::replace(&mut entry.table, BlockTable::new(Arc::clone(&entry.key)));
        self.blocks.release(table);
        self.waiting += 1;
        if let Some(queue) = self.tenants.get_mut(&entry.queue()) {
            queue.waiting.push_front(id);
        }
    }

    fn admit(&mut self, plan: &mut Plan, prefill_left: &mut usize) {
        while *prefill_left > 0 && self.running.len() < self.limits.max_num_seqs {
            let Some(id) = self.next_waiting() else {
                return;
            };
            // What has just given way does not come back in the same step.
            if !plan.preempted.is_empty() && self.yields(id) {
                return;
            }
            // Nobody overtakes one that does not fit, or large prompts would wait for ever.
            if !self.begin(id, plan) {
                return;
            }
            let Some(rows) = self
                .entries
                .get(&id)
                .map(|entry| entry.remaining().min(*prefill_left))
            else {
                return;
            };
            *prefill_left -= rows;
            self.give_rows(id, rows, plan);
        }
    }

    /// Not ready: its reader does not keep up, or the prefix is being computed by another sequence.
    fn is_ready(&self, id: SequenceId) -> bool {
        let Some(entry) = self.entries.get(&id).filter(|entry| !entry.paused) else {
            return false;
        };
        let Some(prefix) = entry.prefix else {
            return true;
        };
        self.entries
            .get(&prefix.of)
            .is_none_or(|of| of.computed >= prefix.tokens)
    }

    /// Moves a waiting sequence to the running ones with blocks for all its tokens. False when they are not to be had.
    fn begin(&mut self, id: SequenceId, plan: &mut Plan) -> bool {
        let (table, copy, admitted) = loop {
            match self.find_blocks(id) {
                Ok(found) => break found,
                Err(OutOfBlocks) => {
                    let prefix = self.entries.get(&id).and_then(|entry| entry.prefix);
                    // The shared prefix itself goes last, and only when nothing runs whose end could make room.
                    let dropped = self.drop_retained_except(prefix.map(|prefix| prefix.of))
                        || (self.running.is_empty() && self.drop_retained_except(None));
                    if !dropped {
                        return false;
                    }
                }
            }
        };
        plan.copies.extend(copy);
        plan.admitted.push(admitted);
        self.take_place(id);
        self.waiting -= 1;
        let Some(entry) = self.entries.get_mut(&id) else {
            return false;
        };
        entry.status = Status::Running;
        entry.computed = admitted.computed;
        entry.table = table;
        let prefix = entry.prefix.take();
        if let Some(queue) = self.tenants.get_mut(&entry.queue()) {
            queue.waiting.retain(|&waiting| waiting != id);
        }
        if let Some(prefix) = prefix {
            self.drop_dependent(prefix.of);
        }
        true
    }

    /// Blocks for all tokens of a waiting sequence: those of its sibling's prefix, or what the prefix cache knows, and
    /// new ones.
    fn find_blocks(
        &mut self,
        id: SequenceId,
    ) -> Result<(BlockTable, Option<BlockCopy>, Admitted), OutOfBlocks> {
        let entry = self.entries.get(&id).ok_or(OutOfBlocks)?;
        // One block for each running sequence spares most preemptions right after an admission.
        let reserve = self.running.len().min(self.blocks.total() / 8);
        let admitted = |computed, cached| Admitted {
            id,
            computed,
            cached,
        };
        let parent = entry
            .prefix
            .and_then(|prefix| Some((prefix, self.entries.get(&prefix.of)?)));
        let Some((prefix, of)) = parent else {
            let reusable = entry.reusable.min(entry.tokens.len().saturating_sub(1));
            let (table, known) = self
                .blocks
                .begin(&entry.key, &entry.tokens, reusable, reserve)?;
            return Ok((table, None, admitted(known, true)));
        };
        let shared = prefix.tokens / BLOCK_SIZE;
        if blocks_for(entry.tokens.len()) - shared + reserve > self.blocks.available() {
            return Err(OutOfBlocks);
        }
        let (mut table, copy) = self.blocks.fork(&of.table, &entry.key, prefix.tokens)?;
        if self.blocks.grow(&mut table, entry.tokens.len()).is_err() {
            self.blocks.release(table);
            return Err(OutOfBlocks);
        }
        Ok((table, copy, admitted(prefix.tokens, false)))
    }

    fn give_rows(&mut self, id: SequenceId, rows: usize, plan: &mut Plan) {
        let Some(entry) = self.entries.get(&id) else {
            return;
        };
        let completes = rows == entry.remaining();
        plan.items.push(ScheduledSequence {
            id,
            start: entry.computed,
            rows,
            completes,
        });
        let cost = if entry.decodes() {
            DECODE_COST
        } else {
            PREFILL_COST
        };
        if let Some(tenant) = self.tenants.get_mut(&entry.queue()) {
            tenant.service += rows as u64 * cost;
        }
    }

    fn drop_dependent(&mut self, of: SequenceId) {
        if let Some(entry) = self.entries.get_mut(&of) {
            entry.dependents -= 1;
            if entry.dependents == 0 && entry.status == Status::Retained {
                self.forget(of);
            }
        }
    }

    /// Frees one finished sequence's blocks, though others could still share them: they compute the prefix again.
    fn drop_retained_except(&mut self, keep: Option<SequenceId>) -> bool {
        let retained = self
            .entries
            .iter()
            .filter(|(id, entry)| entry.status == Status::Retained && Some(**id) != keep);
        let Some(id) = retained.map(|(id, _)| *id).min() else {
            return false;
        };
        self.forget(id);
        true
    }

    /// Waiting sequences that name it find it gone, which is to compute the prefix themselves.
    fn forget(&mut self, id: SequenceId) {
        if let Some(entry) = self.entries.remove(&id) {
            self.blocks.release(entry.table);
        }
    }

    /// Every sequence in a few words, for a test that fails.
    #[cfg(test)]
    fn describe(&self) -> String {
        let line = |(id, entry): (&SequenceId, &Entry)| {
            format!(
                "\n{id:?} {:?} {:?} yields {} paused {} {}/{} tokens, {} blocks, prefix {:?}",
                entry.status,
                entry.priority,
                entry.yields,
                entry.paused,
                entry.computed,
                entry.tokens.len(),
                entry.table.blocks().len(),
                entry.prefix
            )
        };
        let lines: String = self.entries.iter().map(line).collect();
        format!(
            "running {:?}, {} blocks left{lines}",
            self.running,
            self.blocks.available()
        )
    }

    #[cfg(test)]
    fn check_integrity(&self) {
        self.blocks
            .check_integrity(self.entries.values().map(|entry| &entry.table));
        assert!(
            self.running.is_sorted_by_key(|id| self.entries[id].yields),
            "those that yield stand behind"
        );
        let waiting: usize = self
            .tenants
            .values()
            .map(|tenant| tenant.waiting.len())
            .sum();
        assert_eq!(waiting, self.waiting);
        let alive = self
            .entries
            .values()
            .filter(|entry| entry.status != Status::Retained)
            .count();
        assert_eq!(
            alive,
            self.waiting + self.running.len(),
            "every sequence waits or runs"
        );
        assert_eq!(
            alive,
            self.tenants
                .values()
                .map(|tenant| tenant.alive)
                .sum::<usize>()
        );
        for (id, entry) in &self.entries {
            let named = |other: &&Entry| other.prefix.is_some_and(|prefix| prefix.of == *id);
            assert_eq!(
                entry.dependents,
                self.entries.values().filter(named).count()
            );
        }
    }
}

#[cfg(test)]
mod tests;
