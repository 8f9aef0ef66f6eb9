//! How long work stays polite: a chance to pause at least every couple of milliseconds.
//!
//! Cutting an operation by rows or outputs changes no bit of its result (see [`crate::ops`]), so that a pause moves
//! only the moment at which work goes on. It must not know who waits or why.

use std::ops::Range;

use crate::ops::PANEL;

/// The work is not wanted any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stopped")]
pub struct Stopped;

/// Called between pieces of long work.
pub trait Pace {
    /// May block while others need the machine.
    ///
    /// # Errors
    /// [`Stopped`] when the work is to end here.
    fn breathe(&self) -> Result<(), Stopped>;

    /// Floating point operations between two breaths; the default takes about two milliseconds on two cores (see
    /// [`crate::ops::Ops::quantum_flops`] for others).
    fn quantum_flops(&self) -> usize {
        1 << 28
    }
}

/// Never pauses.
#[derive(Clone, Copy, Debug, Default)]
pub struct Unpaced;

impl Pace for Unpaced {
    fn breathe(&self) -> Result<(), Stopped> {
        Ok(())
    }

    fn quantum_flops(&self) -> usize {
        usize::MAX
    }
}

/// Fewer rows than this would read the weights too often for what is computed on them.
const LEAST_ROWS: usize = 64;

/// Cuts a product of `rows` rows by an `[outputs, inputs]` weight into pieces that fit the quantum, in row-major order.
pub fn pieces(
    pace: &dyn Pace,
    rows: usize,
    outputs: usize,
    inputs: usize,
) -> impl Iterator<Item = (Range<usize>, Range<usize>)> + use<> {
    let affordable = pace.quantum_flops() / (2 * inputs.max(1));
    let by_rows = affordable / outputs.max(1);
    let (height, width) = if by_rows >= LEAST_ROWS {
        (by_rows.min(rows.max(1)), outputs.max(1))
    } else {
        let width = affordable / LEAST_ROWS / PANEL * PANEL;
        (LEAST_ROWS, width.max(PANEL))
    };
    (0..rows).step_by(height).flat_map(move |row| {
        let row_range = row..(row + height).min(rows);
        (0..outputs)
            .step_by(width)
            .map(move |output| (row_range.clone(), output..(output + width).min(outputs)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Small;

    impl Pace for Small {
        fn breathe(&self) -> Result<(), Stopped> {
            Ok(())
        }

        fn quantum_flops(&self) -> usize {
            2 * 8 * 64 * 64
        }
    }

    #[test]
    fn pieces_cover_every_element_once() {
        for (rows, outputs) in [(1, 1), (64, 64), (65, 97), (200, 40), (3, 1000)] {
            for pace in [&Small as &dyn Pace, &Unpaced] {
                let mut seen = vec![0; rows * outputs];
                for (r, o) in pieces(pace, rows, outputs, 8) {
                    assert!(o.start.is_multiple_of(PANEL));
                    assert!(o.end.is_multiple_of(PANEL) || o.end == outputs);
                    for row in r {
                        seen[row * outputs + o.start..row * outputs + o.end]
                            .iter_mut()
                            .for_each(|n| *n += 1);
                    }
                }
                assert!(seen.iter().all(|n| *n == 1), "{rows} x {outputs}");
            }
        }
    }
}
