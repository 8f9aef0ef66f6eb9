//! Which KV block belongs to whom. Numbers only: the keys and values themselves are in `kv_cache`, and nothing here
//! may know a tensor.
//!
//! A block is counted by the tables that list it. Only a block whose 16 tokens are all computed is ever listed twice,
//! and only by tables of one [`CacheKey`]: nobody writes to it any more, and nobody else may read it. When no table
//! lists it any more it is free, or, if the prefix cache knows its tokens, idle until somebody needs room.

use std::sync::Arc;

use crate::cache_key::CacheKey;
use crate::config::BLOCK_SIZE;
use crate::prefix_cache::{Chain, PrefixCache};

/// The blocks of one sequence, in the order of its tokens. Goes back with [`BlockManager::release`].
#[derive(Debug)]
pub(crate) struct BlockTable {
    blocks: Vec<u32>,
    key: Arc<CacheKey>,
    /// So many of the first blocks are in the prefix cache,
    known: usize,
    /// and this is the content of the last of them.
    chain: Option<Chain>,
}

/// A block whose content must be copied before the next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockCopy {
    /// Copy what is here,
    pub(crate) from: u32,
    /// to here.
    pub(crate) to: u32,
}

/// There were not enough blocks; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutOfBlocks;

/// Owner of the free list and of the prefix cache.
pub(crate) struct BlockManager {
    free: Vec<u32>,
    /// How many tables list each block.
    references: Vec<u32>,
    cache: PrefixCache,
    /// Whether blocks are kept for what they hold.
    caching: bool,
    evictions: u64,
}

// === impl BlockTable ===

impl BlockTable {
    pub(crate) fn new(key: Arc<CacheKey>) -> Self {
        BlockTable {
            blocks: Vec::new(),
            key,
            known: 0,
            chain: None,
        }
    }

    pub(crate) fn blocks(&self) -> &[u32] {
        &self.blocks
    }
}

// === impl BlockManager ===

/// Blocks that hold `tokens` tokens.
pub(crate) fn blocks_for(tokens: usize) -> usize {
    tokens.div_ceil(BLOCK_SIZE)
}

impl BlockManager {
    /// With `caching`, whole blocks are kept after their sequences, and found again by what they hold.
    pub(crate) fn new(blocks: usize, caching: bool) -> Self {
        let count = u32::try_from(blocks).unwrap_or(u32::MAX);
        // Low numbers first: a server that is never full touches few pages.
        BlockManager {
            free: (0..count).rev().collect(),
            references: vec![0; count as usize],
            cache: PrefixCache::new(count as usize),
            caching,
            evictions: 0,
        }
    }

    pub(crate) fn total(&self) -> usize {
        self.references.len()
    }

    /// Blocks that can be had: free ones, and idle ones of the prefix cache.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.cache.idle()
    }

    /// Blocks that no table lists and that hold known tokens.
    pub(crate) fn idle(&self) -> usize {
        self.cache.idle()
    }

    /// Idle blocks that were given to others so far.
    pub(crate) fn evictions(&self) -> u64 {
        self.evictions
    }

    /// A table of `key` with room for `tokens.len()` tokens that begins with the known blocks of the first `reusable`
    /// ones, and how many tokens these hold. Afterwards at least `reserve` blocks can still be had.
    pub(crate) fn begin(
        &mut self,
        key: &Arc<CacheKey>,
        tokens: &[u32],
        reusable: usize,
        reserve: usize,
    ) -> Result<(BlockTable, usize), OutOfBlocks> {
        let whole = reusable.min(tokens.len()) / BLOCK_SIZE;
        let needed = blocks_for(tokens.len());
        // A sequence that waits for room asks in every step; most of the time this is the answer.
        if needed - whole + reserve > self.available() {
            return Err(OutOfBlocks);
        }
        let found = self.cache.find(key, &tokens[..whole * BLOCK_SIZE]);
        let woken = found
            .iter()
            .filter(|(block, _)| self.references[*block as usize] == 0)
            .count();
        if needed - found.len() + reserve > self.available() - woken {
            return Err(OutOfBlocks);
        }
        let mut table = BlockTable::new(Arc::clone(key));
        for &(block, chain) in &found {
            self.list(block);
            table.blocks.push(block);
            table.chain = Some(chain);
        }
        table.known = found.len();
        if self.grow(&mut table, tokens.len()).is_err() {
            self.release(table);
            return Err(OutOfBlocks);
        }
        Ok((table, found.len() * BLOCK_SIZE))
    }

    /// Makes room for `tokens` tokens in all.
    pub(crate) fn grow(
        &mut self,
        table: &mut BlockTable,
        tokens: usize,
    ) -> Result<(), OutOfBlocks> {
        let missing = blocks_for(tokens).saturating_sub(table.blocks.len());
        if missing > self.available() {
            return Err(OutOfBlocks);
        }
        for _ in 0..missing {
            let block = self.take().ok_or(OutOfBlocks)?;
            table.blocks.push(block);
        }
        Ok(())
    }

    /// Books that a table's blocks hold `computed`, all of its sequence's computed tokens. Of blocks with equal content
    /// one is kept: rows do not depend on neighbours, so the keys and values in them are equal bit for bit.
    pub(crate) fn know(&mut self, table: &mut BlockTable, computed: &[u32]) {
        if !self.caching {
            return;
        }
        let whole = computed.as_chunks::<BLOCK_SIZE>().0;
        for (place, tokens) in whole.iter().enumerate().skip(table.known) {
            let own = table.blocks[place];
            let (kept, chain) = self.cache.enter(own, &table.key, table.chain, tokens);
            if kept != own {
                self.list(kept);
                self.unlist(own);
                table.blocks[place] = kept;
            }
            table.known = place + 1;
            table.chain = Some(chain);
        }
    }

    /// A table of `key` whose first `tokens` tokens are those of `parent`, which has computed them. Whole blocks are
    /// shared; of a block that is not full a copy is asked for, because both will write to it.
    pub(crate) fn fork(
        &mut self,
        parent: &BlockTable,
        key: &Arc<CacheKey>,
        tokens: usize,
    ) -> Result<(BlockTable, Option<BlockCopy>), OutOfBlocks> {
        let whole = tokens / BLOCK_SIZE;
        let has_rest = !tokens.is_multiple_of(BLOCK_SIZE);
        if parent.key != *key
            || parent.blocks.len() < blocks_for(tokens)
            || (has_rest && self.available() == 0)
        {
            return Err(OutOfBlocks);
        }
        let mut table = BlockTable::new(Arc::clone(key));
        for &block in &parent.blocks[..whole] {
            self.list(block);
            table.blocks.push(block);
        }
        // What the child may know of a longer parent it looks up when it has computed a block of its own.
        if parent.known == whole {
            (table.known, table.chain) = (parent.known, parent.chain);
        }
        let copy = if has_rest {
            let to = self.take().ok_or(OutOfBlocks)?;
            table.blocks.push(to);
            Some(BlockCopy {
                from: parent.blocks[whole],
                to,
            })
        } else {
            None
        };
        Ok((table, copy))
    }

    /// Takes a table's blocks back; those that no other table lists are free again, or idle when their content is known.
    pub(crate) fn release(&mut self, table: BlockTable) {
        // From the end: what stands before a block in its chain must not rest before it.
        for block in table.blocks.into_iter().rev() {
            self.unlist(block);
        }
    }

    fn list(&mut self, block: u32) {
        let references = &mut self.references[block as usize];
        *references += 1;
        if *references == 1 {
            self.cache.wake(block);
        }
    }

    fn unlist(&mut self, block: u32) {
        let references = &mut self.references[block as usize];
        *references -= 1;
        if *references == 0 {
            if self.cache.holds(block) {
                self.cache.rest(block);
            } else {
                self.free.push(block);
            }
        }
    }

    /// A block for new content: free ones first.
    fn take(&mut self) -> Option<u32> {
        let block = match self.free.pop() {
            Some(block) => block,
            None => {
                let evicted = self.cache.evict()?;
                self.evictions += 1;
                evicted
            }
        };
        self.references[block as usize] = 1;
        Some(block)
    }

    /// Checks the book against the tables that exist; for tests.
    #[cfg(test)]
    pub(crate) fn check_integrity<'a>(&self, tables: impl Iterator<Item = &'a BlockTable>) {
        let mut counted = vec![0_u32; self.references.len()];
        let mut owner: Vec<Option<Arc<CacheKey>>> = vec![None; self.references.len()];
        for table in tables {
            for &block in &table.blocks {
                counted[block as usize] += 1;
                let owner = owner[block as usize].get_or_insert_with(|| Arc::clone(&table.key));
                assert_eq!(
                    *owner, table.key,
                    "block {block} is shared between versions or tenants"
                );
            }
        }
        assert_eq!(
            counted, self.references,
            "the counts are those of the tables"
        );
        self.cache.check_integrity(&self.references);
        let mut free = self.free.clone();
        free.sort_unstable();
        let left: Vec<u32> = (0..self.references.len() as u32)
            .filter(|&block| counted[block as usize] == 0 && !self.cache.holds(block))
            .collect();
        assert_eq!(
            free, left,
            "every block is free, idle or listed, and only one of these"
        );
        assert_eq!(
            self.available(),
            self.total() - counted.iter().filter(|&&count| count > 0).count()
        );
    }
}

#[cfg(test)]
mod tests;
