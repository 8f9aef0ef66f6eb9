//! Which KV block belongs to whom. Numbers only: the keys and values themselves are in `kv_cache`, and nothing here
//! may know a tensor.
//!
//! A block is counted by the tables that list it. Only a block whose 16 tokens are all computed is ever listed twice,
//! and only by tables of one [`CacheKey`]: nobody writes to it any more, and nobody else may read it.

use std::sync::Arc;

use espalier_adapters::version::VersionDigest;

use crate::config::BLOCK_SIZE;

/// Whose keys and values a block may hold. Two sequences may share a block only when tenant and version are equal.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct CacheKey {
    /// The tenant.
    pub(crate) tenant: Arc<str>,
    /// The adapter version; `None` is the base model.
    pub(crate) version: Option<VersionDigest>,
}

/// The blocks of one sequence, in the order of its tokens. Goes back with [`BlockManager::release`].
#[derive(Debug)]
pub(crate) struct BlockTable {
    blocks: Vec<u32>,
    key: Arc<CacheKey>,
}

/// A block whose content must be copied before the next step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct BlockCopy {
    /// Copy what is here,
    pub(crate) from: u32,
    /// to here.
    pub(crate) to: u32,
}

/// There were not enough free blocks; nothing was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct OutOfBlocks;

/// Owner of the free list.
pub(crate) struct BlockManager {
    free: Vec<u32>,
    /// How many tables list each block.
    references: Vec<u32>,
}

// === impl BlockTable ===

impl BlockTable {
    pub(crate) fn new(key: Arc<CacheKey>) -> Self {
        BlockTable {
            blocks: Vec::new(),
            key,
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
    pub(crate) fn new(blocks: usize) -> Self {
        let count = u32::try_from(blocks).unwrap_or(u32::MAX);
        // Low numbers first: a server that is never full touches few pages.
        BlockManager {
            free: (0..count).rev().collect(),
            references: vec![0; count as usize],
        }
    }

    pub(crate) fn total(&self) -> usize {
        self.references.len()
    }

    pub(crate) fn free(&self) -> usize {
        self.free.len()
    }

    /// Makes room for `tokens` tokens in all.
    pub(crate) fn grow(
        &mut self,
        table: &mut BlockTable,
        tokens: usize,
    ) -> Result<(), OutOfBlocks> {
        let missing = blocks_for(tokens).saturating_sub(table.blocks.len());
        if missing > self.free.len() {
            return Err(OutOfBlocks);
        }
        for _ in 0..missing {
            let block = self.take().ok_or(OutOfBlocks)?;
            table.blocks.push(block);
        }
        Ok(())
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
            || (has_rest && self.free.is_empty())
        {
            return Err(OutOfBlocks);
        }
        let mut table = BlockTable::new(Arc::clone(key));
        for &block in &parent.blocks[..whole] {
            self.references[block as usize] += 1;
            table.blocks.push(block);
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

    /// Takes a table's blocks back; those that no other table lists are free again.
    pub(crate) fn release(&mut self, table: BlockTable) {
        for block in table.blocks.into_iter().rev() {
            let references = &mut self.references[block as usize];
            *references -= 1;
            if *references == 0 {
                self.free.push(block);
            }
        }
    }

    fn take(&mut self) -> Option<u32> {
        let block = self.free.pop()?;
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
        let mut free = self.free.clone();
        free.sort_unstable();
        let unlisted: Vec<u32> = (0..self.references.len() as u32)
            .filter(|&block| counted[block as usize] == 0)
            .collect();
        assert_eq!(
            free, unlisted,
            "every block is free or listed, and never both"
        );
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;
    use proptest::prelude::*;

    fn key(tenant: u8, version: u8) -> Arc<CacheKey> {
        let version = (version > 0).then(|| VersionDigest::from_bytes([version; 32]));
        Arc::new(CacheKey {
            tenant: format!("t{tenant}").into(),
            version,
        })
    }

    #[derive(Clone, Debug)]
    enum Action {
        New {
            tenant: u8,
            version: u8,
            tokens: usize,
        },
        Grow {
            table: usize,
            tokens: usize,
        },
        Fork {
            table: usize,
            tenant: u8,
            version: u8,
            share: usize,
        },
        Release {
            table: usize,
        },
    }

    fn action() -> impl Strategy<Value = Action> {
        prop_oneof![
            (0..2_u8, 0..3_u8, 0..90_usize).prop_map(|(tenant, version, tokens)| Action::New {
                tenant,
                version,
                tokens
            }),
            (any::<usize>(), 1..40_usize)
                .prop_map(|(table, tokens)| Action::Grow { table, tokens }),
            (any::<usize>(), 0..2_u8, 0..3_u8, any::<usize>()).prop_map(
                |(table, tenant, version, share)| Action::Fork {
                    table,
                    tenant,
                    version,
                    share
                }
            ),
            any::<usize>().prop_map(|table| Action::Release { table }),
        ]
    }

    proptest! {
        #[test]
        fn no_block_is_lost_or_shared_between_versions(actions in prop::collection::vec(action(), 1..200)) {
            let mut manager = BlockManager::new(24);
            let mut tables: Vec<(BlockTable, usize)> = Vec::new();
            for action in actions {
                match action {
                    Action::New { tenant, version, tokens } => {
                        let mut table = BlockTable::new(key(tenant, version));
                        let free = manager.free();
                        if manager.grow(&mut table, tokens).is_ok() {
                            tables.push((table, tokens));
                        } else {
                            prop_assert_eq!(free, manager.free(), "a refusal changes nothing");
                            prop_assert!(blocks_for(tokens) > free);
                        }
                    }
                    Action::Grow { table, tokens } if !tables.is_empty() => {
                        let index = table % tables.len();
                        let (table, held) = &mut tables[index];
                        if manager.grow(table, *held + tokens).is_ok() {
                            *held += tokens;
                            prop_assert_eq!(table.blocks().len(), blocks_for(*held));
                        }
                    }
                    Action::Fork { table, tenant, version, share } if !tables.is_empty() => {
                        let (parent, held) = &tables[table % tables.len()];
                        let (child_key, share) = (key(tenant, version), share % (held + 1));
                        match manager.fork(parent, &child_key, share) {
                            Ok((child, copy)) => {
                                prop_assert_eq!(&*child_key, &*parent.key);
                                prop_assert_eq!(copy.is_some(), share % BLOCK_SIZE != 0);
                                if let Some(copy) = copy {
                                    prop_assert_eq!(child.blocks().last(), Some(&copy.to));
                                    prop_assert!(!parent.blocks().contains(&copy.to));
                                }
                                tables.push((child, share));
                            }
                            Err(OutOfBlocks) => prop_assert!(
                                *child_key != *parent.key || manager.free() == 0
                            ),
                        }
                    }
                    Action::Release { table } if !tables.is_empty() => {
                        let index = table % tables.len();
                        manager.release(tables.swap_remove(index).0);
                    }
                    _ => {}
                }
                manager.check_integrity(tables.iter().map(|(table, _)| table));
            }
            for (table, _) in tables {
                manager.release(table);
            }
            prop_assert_eq!(manager.free(), manager.total());
        }
    }

    #[test]
    fn another_version_cannot_fork() {
        let mut manager = BlockManager::new(4);
        let mut parent = BlockTable::new(key(0, 1));
        manager.grow(&mut parent, 32).unwrap();
        assert!(manager.fork(&parent, &key(0, 2), 32).is_err());
        assert!(manager.fork(&parent, &key(1, 1), 32).is_err());
        let (child, copy) = manager.fork(&parent, &key(0, 1), 32).unwrap();
        assert_eq!((child.blocks(), copy), (parent.blocks(), None));
        manager.release(parent);
        assert_eq!(manager.free(), 2, "the child keeps both blocks");
        manager.release(child);
        assert_eq!(manager.free(), 4);
    }
}
