//! Compiled constraints by digest, within a number of entries and bytes; the least recently used leave first. The
//! digest holds the tenant: what one tenant has compiled must not show in another's times.

use std::collections::HashMap;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use super::{ConstraintSource, Prepared};

/// SHA-256 over tenant, kind and texts, each with its length in front.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Key([u8; 32]);

pub(super) struct Cache {
    entries: HashMap<Key, Entry>,
    bytes: usize,
    max_entries: usize,
    max_bytes: usize,
    clock: u64,
}

struct Entry {
    prepared: Arc<Prepared>,
    bytes: usize,
    used: u64,
}

impl Key {
    pub(super) fn new(tenant: &str, source: &ConstraintSource) -> Self {
        let texts: Vec<&str> = match source {
            ConstraintSource::JsonSchema(text)
            | ConstraintSource::Regex(text)
            | ConstraintSource::Grammar(text) => vec![text],
            ConstraintSource::Choices(choices) => choices.iter().map(String::as_str).collect(),
        };
        let mut hash = Sha256::new();
        for part in [tenant, source.kind()].into_iter().chain(texts) {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Key(hash.finalize().into())
    }
}

impl Cache {
    pub(super) fn new(max_entries: usize, max_bytes: usize) -> Self {
        Cache {
            entries: HashMap::new(),
            bytes: 0,
            max_entries,
            max_bytes,
            clock: 0,
        }
    }

    pub(super) fn get(&mut self, key: &Key) -> Option<Arc<Prepared>> {
        self.clock += 1;
        let entry = self.entries.get_mut(key)?;
        entry.used = self.clock;
        Some(Arc::clone(&entry.prepared))
    }

    /// Keeps an entry, unless it alone is more than all may be.
    pub(super) fn put(&mut self, key: Key, prepared: Arc<Prepared>, bytes: usize) {
        if bytes > self.max_bytes || self.max_entries == 0 {
            return;
        }
        self.clock += 1;
        let used = self.clock;
        let entry = Entry {
            prepared,
            bytes,
            used,
        };
        self.bytes += bytes;
        if let Some(before) = self.entries.insert(key, entry) {
            self.bytes -= before.bytes;
        }
        while self.entries.len() > self.max_entries || self.bytes > self.max_bytes {
            let oldest = self.entries.iter().min_by_key(|(_, entry)| entry.used);
            let Some(key) = oldest.map(|(key, _)| *key) else {
                break;
            };
            if let Some(gone) = self.entries.remove(&key) {
                self.bytes -= gone.bytes;
            }
        }
    }

    pub(super) fn entries(&self) -> usize {
        self.entries.len()
    }

    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }
}
