//! Which whole blocks hold known tokens, found again by what they hold; and, of those that nobody reads, which one goes
//! first. Numbers only, no tensors: `block_manager` owns the blocks, this only knows their content.
//!
//! A block's content is its 16 tokens and the chain before them; a chain is the content of the block before, down to a
//! [`CacheKey`]. The map compares contents in full, so a hash that collides cannot serve a wrong block. There is one
//! entry for each block at most: the book is as small as the cache.
//!
//! **Who goes first.** The oldest idle block of the tenant that has most of them, so that a tenant who floods the cache
//! pushes out what is its own, and a tenant below an equal share cannot tell from its own misses what others do. Only a
//! block that nobody has read while the whole cache could have been refilled some times over goes before, whoever's it
//! is: else tenants who are gone would hold their shares for ever. A block is never younger than those before it in its
//! chain, so the oldest one always is a chain's end.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use crate::cache_key::CacheKey;
use crate::config::BLOCK_SIZE;

/// An idle block is stale when so many times the cache's blocks have become idle since.
const STALE_TURNS: u64 = 4;

/// The content of a cached block and of all before it: equal chains are equal tokens under an equal key. Never used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Chain(u64);

/// What stands before a block's tokens.
#[derive(Debug, PartialEq, Eq, Hash)]
enum Before {
    Nothing(Arc<CacheKey>),
    Chain(Chain),
}

#[derive(Debug, PartialEq, Eq, Hash)]
struct Content {
    before: Before,
    tokens: [u32; BLOCK_SIZE],
}

/// A block whose content is known.
struct Cached {
    content: Arc<Content>,
    chain: Chain,
    tenant: Arc<str>,
    /// When the last reader left.
    idle_since: Option<u64>,
}

/// The contents of blocks, and the idle ones in order.
pub(crate) struct PrefixCache {
    by_content: HashMap<Arc<Content>, u32>,
    /// By block.
    cached: Vec<Option<Cached>>,
    /// Idle blocks by the time they became so.
    idle: BTreeMap<u64, u32>,
    idle_of: HashMap<Arc<str>, BTreeMap<u64, u32>>,
    /// `(idle blocks, tenant)`: the last one gives a block up.
    shares: BTreeSet<(usize, Arc<str>)>,
    /// Blocks that have become idle so far: the cache's only time.
    clock: u64,
    chains: u64,
}

// === impl PrefixCache ===

impl PrefixCache {
    pub(crate) fn new(blocks: usize) -> Self {
        PrefixCache {
            by_content: HashMap::new(),
            cached: (0..blocks).map(|_| None).collect(),
            idle: BTreeMap::new(),
            idle_of: HashMap::new(),
            shares: BTreeSet::new(),
            clock: 0,
            chains: 0,
        }
    }

    /// The blocks that hold the whole blocks of `tokens`, as far as they are known.
    pub(crate) fn find(&self, key: &Arc<CacheKey>, tokens: &[u32]) -> Vec<(u32, Chain)> {
        let mut before = Before::Nothing(Arc::clone(key));
        let mut found = Vec::new();
        for tokens in tokens.as_chunks::<BLOCK_SIZE>().0 {
            let content = Content {
                before,
                tokens: *tokens,
            };
            let Some(&block) = self.by_content.get(&content) else {
                break;
            };
            let Some(cached) = &self.cached[block as usize] else {
                break;
            };
            found.push((block, cached.chain));
            before = Before::Chain(cached.chain);
        }
        found
    }

    /// Books that `block`, which someone reads, holds `tokens` after `before` (`None`: they are the first). When another
    /// block holds the same already, that one is returned with its chain and `block` stays unknown.
    pub(crate) fn enter(
        &mut self,
        block: u32,
        key: &Arc<CacheKey>,
        before: Option<Chain>,
        tokens: &[u32; BLOCK_SIZE],
    ) -> (u32, Chain) {
        let before = before.map_or_else(|| Before::Nothing(Arc::clone(key)), Before::Chain);
        let content = Arc::new(Content {
            before,
            tokens: *tokens,
        });
        if let Some(&same) = self.by_content.get(&content)
            && let Some(cached) = &self.cached[same as usize]
        {
            return (same, cached.chain);
        }
        let chain = Chain(self.chains);
        self.chains += 1;
        self.by_content.insert(Arc::clone(&content), block);
        self.cached[block as usize] = Some(Cached {
            content,
            chain,
            tenant: Arc::clone(key.tenant()),
            idle_since: None,
        });
        (block, chain)
    }

    /// Whether the block's content is known.
    pub(crate) fn holds(&self, block: u32) -> bool {
        self.cached[block as usize].is_some()
    }

    /// The last reader of a known block has left. Of one chain the last block must come first.
    pub(crate) fn rest(&mut self, block: u32) {
        let Some(cached) = &mut self.cached[block as usize] else {
            return;
        };
        let now = self.clock;
        self.clock += 1;
        cached.idle_since = Some(now);
        let tenant = Arc::clone(&cached.tenant);
        self.idle.insert(now, block);
        self.change_share(&tenant, |idle| {
            idle.insert(now, block);
        });
    }

    /// A known block has its first reader again.
    pub(crate) fn wake(&mut self, block: u32) {
        let Some(cached) = &mut self.cached[block as usize] else {
            return;
        };
        let Some(since) = cached.idle_since.take() else {
            return;
        };
        let tenant = Arc::clone(&cached.tenant);
        self.idle.remove(&since);
        self.change_share(&tenant, |idle| {
            idle.remove(&since);
        });
    }

    /// Forgets the idle block that goes first; it is the caller's now.
    pub(crate) fn evict(&mut self) -> Option<u32> {
        let (&oldest, &stale) = self.idle.first_key_value()?;
        let block = if self.clock - oldest > STALE_TURNS * self.cached.len() as u64 {
            stale
        } else {
            let (_, tenant) = self.shares.last()?;
            *self.idle_of.get(tenant)?.first_key_value()?.1
        };
        self.wake(block);
        let cached = self.cached[block as usize].take()?;
        self.by_content.remove(&cached.content);
        Some(block)
    }

    /// Known blocks that nobody reads.
    pub(crate) fn idle(&self) -> usize {
        self.idle.len()
    }

    fn change_share(&mut self, tenant: &Arc<str>, change: impl FnOnce(&mut BTreeMap<u64, u32>)) {
        let idle = self.idle_of.entry(Arc::clone(tenant)).or_default();
        self.shares.remove(&(idle.len(), Arc::clone(tenant)));
        change(idle);
        if idle.is_empty() {
            self.idle_of.remove(tenant);
        } else {
            self.shares.insert((idle.len(), Arc::clone(tenant)));
        }
    }

    /// Checks the book against itself and against who reads what; for tests.
    #[cfg(test)]
    pub(crate) fn check_integrity(&self, readers: &[u32]) {
        let known = || {
            (0_u32..)
                .zip(&self.cached)
                .filter_map(|(block, cached)| Some((block, cached.as_ref()?)))
        };
        assert_eq!(known().count(), self.by_content.len());
        for (block, cached) in known() {
            assert_eq!(self.by_content.get(&cached.content), Some(&block));
            assert_eq!(
                cached.idle_since.is_none(),
                readers[block as usize] > 0,
                "block {block} is idle or read"
            );
            if let Some(since) = cached.idle_since {
                assert_eq!(self.idle.get(&since), Some(&block));
                assert_eq!(self.idle_of[&cached.tenant].get(&since), Some(&block));
            }
            if let Before::Chain(chain) = cached.content.before {
                let (_, before) = known()
                    .find(|(_, other)| other.chain == chain)
                    .expect("what a chain goes on from is there");
                assert_eq!(before.tenant, cached.tenant);
                let age = |cached: &Cached| cached.idle_since.unwrap_or(u64::MAX);
                assert!(
                    age(before) >= age(cached),
                    "a block rests before what is before it"
                );
            }
        }
        let idle = known()
            .filter(|(_, cached)| cached.idle_since.is_some())
            .count();
        assert_eq!(idle, self.idle.len());
        assert_eq!(
            idle,
            self.idle_of.values().map(BTreeMap::len).sum::<usize>()
        );
        let shares: BTreeSet<_> = self
            .idle_of
            .iter()
            .map(|(tenant, idle)| (idle.len(), Arc::clone(tenant)))
            .collect();
        assert_eq!(shares, self.shares);
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

    use super::*;
    use crate::cache_key::test_key;

    fn block_of(token: u32) -> [u32; BLOCK_SIZE] {
        std::array::from_fn(|i| token * 100 + i as u32)
    }

    /// A chain of blocks `first..` of one tenant, at rest; its tokens.
    fn chain(
        cache: &mut PrefixCache,
        tenant: u8,
        blocks: std::ops::Range<u32>,
        token: u32,
    ) -> Vec<u32> {
        let (mut before, mut tokens) = (None, Vec::new());
        for block in blocks.clone() {
            let own = block_of(token + block - blocks.start);
            let (at, chain) = cache.enter(block, &test_key(tenant, 0), before, &own);
            assert_eq!(at, block);
            before = Some(chain);
            tokens.extend(own);
        }
        blocks.rev().for_each(|block| cache.rest(block));
        tokens
    }

    fn found(cache: &PrefixCache, tenant: u8, tokens: &[u32]) -> Vec<u32> {
        let found = cache.find(&test_key(tenant, 0), tokens);
        found.into_iter().map(|(block, _)| block).collect()
    }

    #[test]
    fn a_chain_is_found_as_far_as_its_tokens_agree() {
        let mut cache = PrefixCache::new(8);
        let tokens = chain(&mut cache, 0, 0..3, 5);
        assert_eq!(found(&cache, 0, &tokens), [0, 1, 2]);
        assert_eq!(found(&cache, 0, &tokens[..47]), [0, 1], "whole blocks only");
        let mut other = tokens.clone();
        other[20] += 1;
        assert_eq!(found(&cache, 0, &other), [0]);
        assert_eq!(
            found(&cache, 0, &tokens[16..]),
            [0; 0],
            "the same tokens elsewhere are something else"
        );
        assert_eq!(found(&cache, 1, &tokens), [0; 0], "another tenant's");
        assert_eq!(
            cache.find(&test_key(0, 1), &tokens),
            [],
            "another version's"
        );
    }

    #[test]
    fn the_same_content_is_kept_once() {
        let mut cache = PrefixCache::new(8);
        let first = cache.enter(3, &test_key(0, 1), None, &block_of(1));
        assert_eq!(cache.enter(4, &test_key(0, 1), None, &block_of(1)), first);
        assert!(!cache.holds(4));
        assert_ne!(cache.enter(4, &test_key(0, 2), None, &block_of(1)), first);
    }

    #[test]
    fn the_oldest_goes_first_and_a_chain_from_its_end() {
        let mut cache = PrefixCache::new(8);
        chain(&mut cache, 0, 0..3, 1);
        chain(&mut cache, 0, 3..5, 9);
        cache.wake(0);
        cache.wake(1);
        cache.rest(1);
        cache.rest(0);
        cache.check_integrity(&[0; 8]);
        let order: Vec<u32> = std::iter::from_fn(|| cache.evict()).collect();
        assert_eq!(order, [2, 4, 3, 1, 0]);
        assert!((0..8).all(|block| !cache.holds(block)));
        cache.check_integrity(&[0; 8]);
    }

    #[test]
    fn a_flood_pushes_out_its_own() {
        let mut cache = PrefixCache::new(64);
        let kept = chain(&mut cache, 1, 0..3, 1);
        chain(&mut cache, 0, 3..8, 10);
        for flood in 0..100 {
            let block = cache.evict().unwrap();
            assert!(block >= 3, "eviction {flood} takes block {block}");
            cache.enter(block, &test_key(0, 0), None, &block_of(100 + flood));
            cache.rest(block);
        }
        assert_eq!(found(&cache, 1, &kept), [0, 1, 2]);
    }

    #[test]
    fn what_nobody_reads_for_long_goes_before() {
        let mut cache = PrefixCache::new(16);
        let old = chain(&mut cache, 1, 0..1, 1);
        chain(&mut cache, 0, 1..9, 10);
        for _ in 0..STALE_TURNS * 16 {
            cache.wake(8);
            cache.rest(8);
        }
        assert_eq!(found(&cache, 1, &old), [0]);
        assert_eq!(cache.evict(), Some(0));
    }
}
