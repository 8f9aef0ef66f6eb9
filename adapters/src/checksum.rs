//! A fast check that bytes are those of an earlier look: 64 bits at the speed of memory.
//!
//! It finds what a disk or a copy does to bytes (a change of any one word changes the sum for certain). It withstands
//! nobody who chooses the bytes: what comes from outside is known by its SHA-256 only.

const LANES: usize = 8;
const BLOCK: usize = LANES * 8;
/// Odd, so that multiplying loses nothing; its bits are those of the golden ratio's fraction.
const FACTOR: u64 = 0x9e37_79b9_7f4a_7c15;

/// A sum in the making. The result depends on the bytes alone, not on how they were cut.
#[derive(Clone, Debug)]
pub struct Checksum {
    lanes: [u64; LANES],
    rest: [u8; BLOCK],
    held: usize,
    total: u64,
}

impl Default for Checksum {
    fn default() -> Self {
        Self {
            lanes: std::array::from_fn(|lane| FACTOR.rotate_left(lane as u32 * 7)),
            rest: [0; BLOCK],
            held: 0,
            total: 0,
        }
    }
}

impl Checksum {
    /// Adds bytes.
    pub fn update(&mut self, mut bytes: &[u8]) {
        self.total += bytes.len() as u64;
        if self.held > 0 {
            let taken = bytes.len().min(BLOCK - self.held);
            self.rest[self.held..self.held + taken].copy_from_slice(&bytes[..taken]);
            self.held += taken;
            bytes = &bytes[taken..];
            if self.held < BLOCK {
                return;
            }
            let block = self.rest;
            self.mix(&block);
            self.held = 0;
        }
        let blocks = bytes.chunks_exact(BLOCK);
        let tail = blocks.remainder();
        blocks.for_each(|block| self.mix(block));
        self.rest[..tail.len()].copy_from_slice(tail);
        self.held = tail.len();
    }

    /// The sum of all bytes so far.
    #[must_use]
    pub fn finish(mut self) -> u64 {
        self.rest[self.held..].fill(0);
        let block = self.rest;
        self.mix(&block);
        let sum = self.lanes.iter().fold(self.total, |sum, lane| {
            (sum ^ lane).wrapping_mul(FACTOR).rotate_left(29)
        });
        sum ^ (sum >> 32)
    }

    fn mix(&mut self, block: &[u8]) {
        for (lane, word) in self.lanes.iter_mut().zip(block.as_chunks::<8>().0) {
            // A bijection of the lane for any word: what differs once stays different.
            let word = u64::from_le_bytes(*word);
            *lane = (*lane ^ word).wrapping_mul(FACTOR).rotate_left(29);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sum(bytes: &[u8]) -> u64 {
        let mut sum = Checksum::default();
        sum.update(bytes);
        sum.finish()
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_seen_and_the_cutting_is_not() {
        let bytes: Vec<u8> = (0..1_000u32).map(|i| (i * i % 251) as u8).collect();
        let whole = sum(&bytes);
        for at in 0..bytes.len() {
            let mut parts = Checksum::default();
            parts.update(&bytes[..at]);
            parts.update(&bytes[at..]);
            assert_eq!(parts.finish(), whole, "cut at {at}");
            assert_ne!(sum(&bytes[..at]), whole, "ends at {at}");
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << (at % 8);
            assert_ne!(sum(&flipped), whole, "bit at {at}");
        }
        let zeros = [0; 200];
        assert_ne!(sum(&zeros[..100]), sum(&zeros), "length counts");
    }
}
