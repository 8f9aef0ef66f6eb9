//! The block manager beside a model of the memory: every slot says which tokens, under which key, were written there.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::hash::{DefaultHasher, Hash, Hasher};

use proptest::prelude::*;

use super::*;
use crate::cache_key::test_key;

const BLOCKS: usize = 20;

#[derive(Clone, Debug)]
enum Action {
    /// Few texts, so that prefixes meet.
    Begin {
        tenant: u8,
        version: u8,
        text: Vec<u8>,
        cut: usize,
        reusable: usize,
    },
    /// Computes so many rows.
    Compute {
        table: usize,
        rows: usize,
    },
    /// A step that writes wrong numbers and panics.
    Panic {
        table: usize,
    },
    Grow {
        table: usize,
        letter: u8,
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
    let text = prop::collection::vec(0..2_u8, 1..6);
    prop_oneof![
        4 => (0..2_u8, 0..2_u8, text, 0..16_usize, prop_oneof![Just(usize::MAX), 0..80_usize]).prop_map(
            |(tenant, version, text, cut, reusable)| Action::Begin { tenant, version, text, cut, reusable }
        ),
        6 => (any::<usize>(), 1..60_usize).prop_map(|(table, rows)| Action::Compute { table, rows }),
        1 => any::<usize>().prop_map(|table| Action::Panic { table }),
        2 => (any::<usize>(), 0..2_u8, 1..30_usize).prop_map(|(table, letter, tokens)| Action::Grow { table, letter, tokens }),
        1 => (any::<usize>(), 0..2_u8, 0..2_u8, any::<usize>()).prop_map(
            |(table, tenant, version, share)| Action::Fork { table, tenant, version, share }
        ),
        3 => any::<usize>().prop_map(|table| Action::Release { table }),
    ]
}

struct Live {
    table: BlockTable,
    tokens: Vec<u32>,
    computed: usize,
}

/// What the tokens up to a position are, and whose.
fn fingerprint(key: &CacheKey, tokens: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (key, tokens).hash(&mut hasher);
    hasher.finish()
}

fn tokens_of(text: &[u8], cut: usize) -> Vec<u32> {
    let tokens = text
        .iter()
        .flat_map(|&letter| (0..16).map(move |i| u32::from(letter) * 100 + i));
    tokens
        .take((text.len() * 16).saturating_sub(cut).max(1))
        .collect()
}

struct World {
    manager: BlockManager,
    live: Vec<Live>,
    memory: Vec<[u64; BLOCK_SIZE]>,
}

impl World {
    fn begin(&mut self, key: &Arc<CacheKey>, tokens: Vec<u32>, reusable: usize) {
        let reusable = reusable.min(tokens.len() - 1);
        let before = self.manager.available();
        let Ok((table, cached)) = self.manager.begin(key, &tokens, reusable, 0) else {
            assert_eq!(
                before,
                self.manager.available(),
                "a refusal changes nothing"
            );
            return;
        };
        assert!(cached <= reusable, "{cached} tokens were not to be skipped");
        for other in self
            .live
            .iter()
            .filter(|other| self.manager.caching && other.table.key == *key)
        {
            let common = tokens
                .iter()
                .zip(&other.tokens[..other.computed])
                .take_while(|(a, b)| a == b)
                .count();
            assert!(
                cached >= common.min(reusable) / BLOCK_SIZE * BLOCK_SIZE,
                "what another sequence computed is found"
            );
        }
        self.live.push(Live {
            table,
            tokens,
            computed: cached,
        });
    }

    fn compute(&mut self, index: usize, rows: usize) {
        let Live {
            table,
            tokens,
            computed,
        } = &mut self.live[index];
        let end = (*computed + rows).min(tokens.len());
        for position in *computed..end {
            let block = table.blocks[position / BLOCK_SIZE] as usize;
            self.memory[block][position % BLOCK_SIZE] =
                fingerprint(&table.key, &tokens[..=position]);
        }
        *computed = end;
        self.manager.know(table, &tokens[..end]);
    }

    fn panic(&mut self, index: usize) {
        let Live {
            table,
            tokens,
            computed,
        } = self.live.swap_remove(index);
        for position in computed..tokens.len() {
            self.memory[table.blocks[position / BLOCK_SIZE] as usize][position % BLOCK_SIZE] = 1;
        }
        self.manager.release(table);
    }

    fn fork(&mut self, index: usize, key: &Arc<CacheKey>, share: usize) {
        let parent = &self.live[index];
        let share = share % (parent.computed + 1);
        let Ok((table, copy)) = self.manager.fork(&parent.table, key, share) else {
            assert!(*key != parent.table.key || self.manager.available() == 0);
            return;
        };
        assert_eq!(*key, parent.table.key);
        assert_eq!(copy.is_some(), !share.is_multiple_of(BLOCK_SIZE));
        if let Some(copy) = copy {
            assert!(!parent.table.blocks.contains(&copy.to));
            self.memory[copy.to as usize] = self.memory[copy.from as usize];
        }
        let tokens = parent.tokens[..share].to_vec();
        self.live.push(Live {
            table,
            tokens,
            computed: share,
        });
    }

    fn check(&self) {
        self.manager
            .check_integrity(self.live.iter().map(|live| &live.table));
        for Live {
            table,
            tokens,
            computed,
        } in &self.live
        {
            assert_eq!(table.blocks.len(), blocks_for(tokens.len()));
            for position in 0..*computed {
                let block = table.blocks[position / BLOCK_SIZE] as usize;
                assert_eq!(
                    self.memory[block][position % BLOCK_SIZE],
                    fingerprint(&table.key, &tokens[..=position]),
                    "position {position} in block {block}"
                );
            }
        }
    }

    fn act(&mut self, action: Action) {
        let count = self.live.len();
        match action {
            Action::Begin {
                tenant,
                version,
                text,
                cut,
                reusable,
            } => {
                self.begin(&test_key(tenant, version), tokens_of(&text, cut), reusable);
            }
            Action::Compute { table, rows } if count > 0 => self.compute(table % count, rows),
            Action::Panic { table } if count > 0 => self.panic(table % count),
            Action::Grow {
                table,
                letter,
                tokens,
            } if count > 0 => {
                let live = &mut self.live[table % count];
                let wanted = live.tokens.len() + tokens;
                if self.manager.grow(&mut live.table, wanted).is_ok() {
                    let from = live.tokens.len();
                    live.tokens
                        .extend((from..wanted).map(|i| u32::from(letter) * 100 + (i % 16) as u32));
                }
            }
            Action::Fork {
                table,
                tenant,
                version,
                share,
            } if count > 0 => {
                self.fork(table % count, &test_key(tenant, version), share);
            }
            Action::Release { table } if count > 0 => {
                let live = self.live.swap_remove(table % count);
                self.manager.release(live.table);
            }
            _ => {}
        }
    }
}

proptest! {
    #[test]
    fn a_block_holds_what_its_readers_believe(
        actions in prop::collection::vec(action(), 1..200), caching in prop::bool::weighted(0.8),
    ) {
        let manager = BlockManager::new(BLOCKS, caching);
        let mut world = World { manager, live: Vec::new(), memory: vec![[0; BLOCK_SIZE]; BLOCKS] };
        for action in actions {
            world.act(action);
            world.check();
        }
        for live in std::mem::take(&mut world.live) {
            world.manager.release(live.table);
        }
        world.check();
        prop_assert_eq!(world.manager.available(), BLOCKS);
        prop_assert!(caching || world.manager.idle() == 0);
    }
}

#[test]
fn another_version_cannot_fork() {
    let mut manager = BlockManager::new(4, false);
    let (mut parent, _) = manager.begin(&test_key(0, 1), &[7; 32], 0, 0).unwrap();
    assert!(manager.fork(&parent, &test_key(0, 2), 32).is_err());
    assert!(manager.fork(&parent, &test_key(1, 1), 32).is_err());
    let (child, copy) = manager.fork(&parent, &test_key(0, 1), 32).unwrap();
    assert_eq!((child.blocks(), copy), (parent.blocks(), None));
    manager.know(&mut parent, &[7; 32]);
    manager.release(parent);
    assert_eq!(manager.available(), 2, "the child keeps both blocks");
    manager.release(child);
    assert_eq!((manager.available(), manager.idle()), (4, 0));
}

#[test]
fn idle_blocks_make_room_when_none_is_free() {
    let mut manager = BlockManager::new(4, true);
    let text = tokens_of(&[0, 1, 0], 0);
    let (mut table, cached) = manager.begin(&test_key(0, 1), &text, 47, 0).unwrap();
    assert_eq!(cached, 0);
    manager.know(&mut table, &text);
    manager.release(table);
    assert_eq!((manager.available(), manager.idle()), (4, 3));
    let (again, cached) = manager.begin(&test_key(0, 1), &text, 47, 0).unwrap();
    assert_eq!(
        (cached, again.blocks()),
        (32, [0, 1, 3].as_slice()),
        "the last token is computed"
    );
    manager.release(again);
    let (other, _) = manager.begin(&test_key(1, 1), &text, 47, 0).unwrap();
    assert_eq!(
        manager.evictions(),
        2,
        "a free one, then from the end of the chain"
    );
    assert_eq!(manager.cache.find(&test_key(0, 1), &text).len(), 1);
    assert!(
        manager.begin(&test_key(0, 1), &text, 15, 1).is_err(),
        "a reserve is respected"
    );
    assert_eq!(manager.idle(), 1, "and a refusal wakes nothing");
    manager.release(other);
}
