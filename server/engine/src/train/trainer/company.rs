//! Passes that several jobs share: a small micro-batch reads all weights for few rows, and others' rows cost little more.
//!
//! Who keeps whom company changes no bit of anyone's gradients, by the row rule; it moves only the moment at which they
//! come. The trainer hands over its part and gets it back; who waits for whom is not known here.

use espalier_adapters::pace::{Pace, Stopped, Unpaced};

use super::share::Share;

/// Runs the model forward and back over shares, and leaves in each its losses and gradients.
pub type RunPass<'a> = &'a mut dyn FnMut(&mut [Share]) -> Result<(), Stopped>;

/// Why a share did not come back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Interrupted {
    /// The work is not wanted any more.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// The job in whose pass it was has failed: its gradients are gone, and the step begins anew.
    #[error("the pass failed with the job that ran it")]
    Lost,
}

/// A pace at which jobs may meet.
pub trait Company: Pace {
    /// The share after a pass: this job's own by `run`, with others' shares beside it, or another job's.
    ///
    /// # Errors
    /// [`Interrupted`].
    fn pass(&self, share: Share, run: RunPass<'_>) -> Result<Share, Interrupted> {
        Ok(by_itself(share, run)?)
    }

    /// Long work follows that is no pass to share: nobody is to wait for this job.
    fn alone(&self) {}
}

/// A pass over one share.
///
/// # Errors
/// [`Stopped`] when the pace of `run` says so.
pub fn by_itself(share: Share, run: RunPass<'_>) -> Result<Share, Stopped> {
    let mut alone = [share];
    run(&mut alone)?;
    let [share] = alone;
    Ok(share)
}

impl Company for Unpaced {}
