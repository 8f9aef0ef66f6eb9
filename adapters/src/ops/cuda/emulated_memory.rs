//! The emulator's memory: allocations of the processor's, whose ends are watched.
//!
//! All of it begins as 0xff bytes, in every format a number that is none, and so do the edges around it: what reads there shows it in its results, and
//! what writes there is found out. It must not know what the bytes are.

#![allow(unsafe_code, reason = "addresses are pointers")]

use std::alloc::{self, Layout};
use std::collections::BTreeMap;
use std::slice;

use super::driver::{Address, DeviceError, failed};

/// Allocations begin at multiples of this.
const ALIGNMENT: usize = 256;
/// Watched bytes before an allocation, and at least as many after it.
const EDGE: usize = ALIGNMENT;
/// What memory is made of before anyone writes.
const UNWRITTEN: u8 = 0xff;

#[derive(Debug)]
pub(super) struct EmulatedMemory {
    limit: usize,
    used: usize,
    /// By address.
    blocks: BTreeMap<u64, Block>,
}

/// An allocation with its edges.
#[derive(Debug)]
struct Block {
    start: *mut u8,
    layout: Layout,
    bytes: usize,
}

// SAFETY: the memory belongs to the value alone.
unsafe impl Send for Block {}

// === impl EmulatedMemory ===

impl EmulatedMemory {
    pub(super) fn new(limit: usize) -> Self {
        EmulatedMemory {
            limit,
            used: 0,
            blocks: BTreeMap::new(),
        }
    }

    pub(super) fn free_bytes(&self) -> usize {
        self.limit - self.used
    }

    pub(super) fn allocate(&mut self, bytes: usize) -> Result<Address, DeviceError> {
        let full = DeviceError::OutOfMemory {
            asked: bytes,
            free: self.free_bytes(),
        };
        if bytes > self.free_bytes() {
            return Err(full);
        }
        let block = Block::new(bytes).ok_or(full)?;
        let at = block.data().addr() as u64;
        self.used += bytes;
        self.blocks.insert(at, block);
        Ok(Address(at))
    }

    pub(super) fn free(&mut self, at: Address, bytes: usize) -> Result<(), DeviceError> {
        let lost = |found: Option<usize>| {
            failed("free")(format!(
                "{bytes} bytes at {:#x}: allocated there are {found:?}",
                at.0
            ))
        };
        let found = self.blocks.get(&at.0).map(|block| block.bytes);
        if found != Some(bytes) {
            return Err(lost(found));
        }
        self.used -= bytes;
        self.blocks.remove(&at.0);
        Ok(())
    }

    /// Where a range of one allocation lies.
    pub(super) fn range(
        &self,
        call: &'static str,
        at: Address,
        bytes: usize,
    ) -> Result<*mut u8, DeviceError> {
        let (start, block) = self.block(call, at)?;
        let offset = (at.0 - start) as usize;
        if bytes > block.bytes - offset {
            let beyond = bytes - (block.bytes - offset);
            return Err(failed(call)(format!(
                "{bytes} bytes from byte {offset} of an allocation of {} run {beyond} beyond its end",
                block.bytes
            )));
        }
        Ok(block.data().wrapping_add(offset))
    }

    /// Checks that an address lies in an allocation, or at its end.
    pub(super) fn known(&self, call: &'static str, at: Address) -> Result<(), DeviceError> {
        self.block(call, at).map(|_| ())
    }

    fn block(&self, call: &'static str, at: Address) -> Result<(u64, &Block), DeviceError> {
        let before = self.blocks.range(..=at.0).next_back();
        let within = |(start, block): &(&u64, &Block)| at.0 - **start <= block.bytes as u64;
        let (start, block) = before
            .filter(within)
            .ok_or_else(|| failed(call)(format!("{:#x} lies in no allocation", at.0)))?;
        Ok((*start, block))
    }

    /// Checks that nobody wrote around an allocation.
    pub(super) fn check(&self) -> Result<(), String> {
        for block in self.blocks.values() {
            let [before, after] = block.edges();
            let strays = |edge: &[u8]| edge.iter().position(|byte| *byte != UNWRITTEN);
            if let Some(at) = strays(before) {
                let away = EDGE - at;
                return Err(format!("wrote {away} bytes before {} bytes", block.bytes));
            }
            if let Some(at) = strays(after) {
                return Err(format!("wrote {at} bytes behind {} bytes", block.bytes));
            }
        }
        Ok(())
    }
}

// === impl Block ===

impl Block {
    fn new(bytes: usize) -> Option<Self> {
        let size = bytes.checked_next_multiple_of(ALIGNMENT)?;
        let size = size.checked_add(2 * EDGE)?;
        let layout = Layout::from_size_align(size, ALIGNMENT).ok()?;
        // SAFETY: the size is not zero.
        let start = unsafe { alloc::alloc(layout) };
        if start.is_null() {
            return None;
        }
        // SAFETY: the allocation has this size.
        unsafe { start.write_bytes(UNWRITTEN, size) };
        Some(Block {
            start,
            layout,
            bytes,
        })
    }

    fn data(&self) -> *mut u8 {
        self.start.wrapping_add(EDGE)
    }

    fn edges(&self) -> [&[u8]; 2] {
        let end = EDGE + self.bytes;
        // SAFETY: the whole allocation was written when it began, and kernels run only while the memory is borrowed for them alone.
        let all = unsafe { slice::from_raw_parts(self.start, self.layout.size()) };
        [&all[..EDGE], &all[end..]]
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        // SAFETY: the memory was allocated with this layout and is given back once.
        unsafe { alloc::dealloc(self.start, self.layout) };
    }
}
