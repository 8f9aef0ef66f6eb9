//! Watching a job: first the events that were, then those that come, each read from the table and none from memory, so that a
//! slow watcher costs nothing and one that lost its stream goes on at any number.

use std::time::Duration;

use tokio::sync::{mpsc, watch as signal};

use super::events::Event;
use super::{JobError, JobService, rows};
use crate::names::JobName;

/// Events read at once.
const READ: usize = 128;

/// What a watcher gets.
#[derive(Debug, Clone)]
pub enum WatchItem {
    /// The next event.
    Event(Box<Event>),
    /// Nothing happened for a while; the number of the event before, 0 with none, and the job's standing.
    Heartbeat {
        /// Number of the last event.
        sequence: u64,
        /// The last event's state and progress; `None` only before the first event.
        last: Option<Box<Event>>,
    },
}

impl JobService {
    /// A job's events from number `from` (0 and 1 are all). The stream ends after the event that brings a final state. It is
    /// read at the watcher's pace; dropping it ends the watch.
    pub async fn watch(
        &self,
        name: JobName,
        from: u64,
        heartbeat: Duration,
    ) -> Result<mpsc::Receiver<Result<WatchItem, JobError>>, JobError> {
        let wanted = name.clone();
        let (key, _) = self
            .inner
            .parts
            .database
            .read(move |tx| rows::by_name(tx, &wanted))
            .await?;
        let (items, receiver) = mpsc::channel(16);
        let service = self.clone();
        let mut stopping = self.inner.stopping.subscribe();
        tokio::spawn(async move {
            let mut next = from.max(1);
            let mut last: Option<Box<Event>> = None;
            loop {
                // Subscribed before the table is read: an event stored in between wakes this at once.
                let mut changed = service.signal_of(key).subscribe();
                let read = service
                    .inner
                    .parts
                    .database
                    .read(move |tx| {
                        let events = rows::events(tx, key, next, READ)?;
                        Ok::<_, JobError>((events, rows::by_key(tx, key)?.state))
                    })
                    .await;
                let (events, state) = match read {
                    Ok(read) => read,
                    Err(error) => {
                        let _ = items.send(Err(error)).await;
                        return;
                    }
                };
                let full = events.len() == READ;
                for event in events {
                    next = event.sequence + 1;
                    last = Some(Box::new(event.clone()));
                    if items
                        .send(Ok(WatchItem::Event(Box::new(event))))
                        .await
                        .is_err()
                    {
                        return;
                    }
                }
                if full {
                    continue;
                }
                if state.is_final() {
                    // Nobody else may be left to forget the signal that the look above made.
                    service.inner.signals.remove(&key);
                    return;
                }
                tokio::select! {
                    _ = changed.changed() => {}
                    () = items.closed() => return,
                    () = stopped(&mut stopping) => {
                        let _ = items.send(Err(JobError::Stopping)).await;
                        return;
                    }
                    () = tokio::time::sleep(heartbeat) => {
                        let beat = WatchItem::Heartbeat { sequence: next - 1, last: last.clone() };
                        if items.send(Ok(beat)).await.is_err() {
                            return;
                        }
                    }
                }
            }
        });
        Ok(receiver)
    }
}

/// Resolves when the service stops, or is gone.
async fn stopped(stopping: &mut signal::Receiver<bool>) {
    let _ = stopping.wait_for(|stop| *stop).await;
}
