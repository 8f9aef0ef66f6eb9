//! The small tables that a pass brings to the device: ids, spans, updates. They lie in a ring, so that nothing is allocated
//! and a pass that is like the one before finds its tables where they were.
//!
//! A table stays until the pass is over: the ring holds more than any pass brings.

use std::sync::Arc;

use super::driver::{Address, DeviceError, Driver, Lane};
use super::memory::Memory;

/// Bytes of the ring.
const RING_BYTES: usize = 16 << 20;
/// Tables begin at multiples of this.
const ALIGN: usize = 256;

/// The ring.
#[derive(Debug)]
pub(super) struct Tables {
    ring: Memory,
    next: usize,
}

impl Tables {
    pub(super) fn new(driver: &Arc<dyn Driver>) -> Result<Self, DeviceError> {
        Ok(Self {
            ring: Memory::new(driver, RING_BYTES)?,
            next: 0,
        })
    }

    /// A new pass begins: work of the lane runs in order, so the one before is done with its tables when these arrive.
    pub(super) fn begin(&mut self) {
        self.next = 0;
    }

    /// Brings a table. Its place is as large as the next power of two, so that the next table's place does not depend on
    /// small differences.
    pub(super) fn bring(
        &mut self,
        driver: &dyn Driver,
        lane: Lane,
        table: &[u8],
    ) -> Result<Address, DeviceError> {
        let room = table.len().next_power_of_two().max(ALIGN);
        assert!(
            room <= RING_BYTES / 2,
            "a table of {} bytes is more than a pass has",
            table.len()
        );
        if self.next + room > RING_BYTES {
            self.next = 0;
        }
        let at = self.ring.at(self.next);
        self.next += room;
        driver.upload(lane, table, at)?;
        Ok(at)
    }
}
