//! Which thread records the main lane, and what it may not do meanwhile.

use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::driver::{DeviceError, Lane, failed};

/// The thread that records, or 0.
#[derive(Debug, Default)]
pub(super) struct Recorder(AtomicUsize);

/// Ends the recording when it is dropped.
#[derive(Debug)]
pub(super) struct Turn<'a>(&'a Recorder);

/// A number that no other living thread has.
fn here() -> usize {
    thread_local!(static PLACE: u8 = const { 0 });
    PLACE.with(|place| ptr::from_ref(place).addr())
}

impl Recorder {
    /// Makes this thread the one that records.
    pub(super) fn begin(&self) -> Result<Turn<'_>, DeviceError> {
        self.0
            .compare_exchange(0, here(), Ordering::AcqRel, Ordering::Acquire)
            .map(|_| Turn(self))
            .map_err(|_| failed("record")("a recording is under way"))
    }

    /// Whether any thread records.
    pub(super) fn busy(&self) -> bool {
        self.0.load(Ordering::Acquire) != 0
    }

    /// Whether this work is recorded.
    pub(super) fn takes(&self, call: &'static str, lane: Lane) -> Result<bool, DeviceError> {
        match (lane, self.0.load(Ordering::Acquire)) {
            (Lane::Side, _) | (Lane::Main, 0) => Ok(false),
            (Lane::Main, recorder) if recorder == here() => Ok(true),
            _ => Err(failed(call)("another thread records the main lane")),
        }
    }

    /// Refuses what cannot be recorded to the thread that records.
    pub(super) fn refuse(&self, call: &'static str) -> Result<(), DeviceError> {
        if self.0.load(Ordering::Acquire) == here() {
            return Err(failed(call)("it cannot be recorded"));
        }
        Ok(())
    }

    /// Refuses what cannot be recorded to the thread that records, and the main lane to all others meanwhile.
    pub(super) fn refuse_on(&self, call: &'static str, lane: Lane) -> Result<(), DeviceError> {
        self.refuse(call)?;
        self.takes(call, lane).map(|_| ())
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.0.store(0, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_thread_records_and_the_others_keep_off_the_main_lane() {
        let recorder = Recorder::default();
        assert_eq!(recorder.takes("copy", Lane::Main), Ok(false));
        recorder.refuse_on("upload", Lane::Main).unwrap();
        let turn = recorder.begin().unwrap();
        assert!(recorder.busy());
        assert!(recorder.begin().is_err());
        assert_eq!(recorder.takes("copy", Lane::Main), Ok(true));
        assert_eq!(recorder.takes("copy", Lane::Side), Ok(false));
        assert!(recorder.refuse_on("upload", Lane::Side).is_err());
        std::thread::scope(|scope| {
            let other = || {
                assert!(recorder.takes("copy", Lane::Main).is_err());
                assert!(recorder.refuse_on("upload", Lane::Main).is_err());
                assert_eq!(recorder.refuse_on("upload", Lane::Side), Ok(()));
            };
            scope.spawn(other).join().unwrap();
        });
        drop(turn);
        assert_eq!(recorder.takes("copy", Lane::Main), Ok(false));
    }
}
