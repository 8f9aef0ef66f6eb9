//! One candidate's place in its constraint. While the model computes the next logits, the machine is away at the masker;
//! it comes home before the next token is chosen.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, sync_channel};
use std::time::Instant;

use super::machine::{Fault, Machine, TokenSet};
use super::masker::{Errand, Masker};
use crate::metrics;

/// The state of one candidate: kept with its tokens, so a sequence that is computed again goes on where it was.
pub(crate) struct Candidate(Place);

enum Place {
    Home {
        machine: Machine,
        mask: Arc<TokenSet>,
    },
    Away(Receiver<(Machine, Result<TokenSet, Fault>)>),
    /// A fault, or a complete text: there is nothing after it.
    Ended,
}

/// What a token made of the text.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// More must or may come.
    Open,
    /// Nothing may follow.
    Complete,
}

impl Candidate {
    pub(super) fn new(machine: Machine, mask: Arc<TokenSet>) -> Self {
        Candidate(Place::Home { machine, mask })
    }

    /// The tokens that may come next. Waits for the masker, whose work on one token is bounded by fuel.
    ///
    /// # Errors
    /// No token may come, or working out which took too much.
    pub(crate) fn allowed(&mut self) -> Result<Arc<TokenSet>, Fault> {
        if let Place::Away(way_home) = &self.0 {
            let since = Instant::now();
            let back = way_home.recv();
            metrics::mask_waited(since.elapsed());
            self.0 = match back {
                Ok((machine, Ok(mask))) => Place::Home {
                    machine,
                    mask: Arc::new(mask),
                },
                Ok((_, Err(fault))) => {
                    self.0 = Place::Ended;
                    return Err(fault);
                }
                Err(_) => Place::Ended,
            };
        }
        match &self.0 {
            Place::Home { mask, .. } => Ok(Arc::clone(mask)),
            _ => Err(Fault::Broken("the constraint's state is gone".to_owned())),
        }
    }

    /// Takes the chosen token, and sends for what may follow it.
    ///
    /// # Errors
    /// The token was not allowed, or taking it took too much.
    pub(crate) fn commit(&mut self, token: u32, masker: &Masker) -> Result<Progress, Fault> {
        let Place::Home { mut machine, .. } = std::mem::replace(&mut self.0, Place::Ended) else {
            return Err(Fault::Broken(
                "a token came before its mask was asked for".to_owned(),
            ));
        };
        if machine.commit(token)? {
            return Ok(Progress::Complete);
        }
        let (home, way_home) = sync_channel(1);
        masker.send(Errand { machine, home });
        self.0 = Place::Away(way_home);
        Ok(Progress::Open)
    }
}
