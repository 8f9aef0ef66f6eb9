//! The loop: one thread owns model, KV cache, adapters and the book of requests, and repeats four lines (drain commands,
//! schedule, run, postprocess) and then lends the machine to training.
//!
//! No other thread touches the model while it works. A panic inside a step is caught and costs the requests concerned,
//! never the process. The engine must not know names, proto or files.

mod intake;
mod merging;
mod postprocess;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use espalier_adapters::ops::Backend;
use tokio::sync::oneshot;

use crate::adapter_loader::{self, AdapterSource};
use crate::adapter_pool::{AdapterPool, Shelf};
use crate::command::{CommandSender, EngineCommand};
use crate::config::{BLOCK_SIZE, EngineConfig};
use crate::constraint::{Compiler, Masker};
use crate::error::EngineError;
use crate::handle::{Gauges, ModelInfo, Shared};
use crate::merger::{self, MergeJob};
use crate::metrics::{self, EngineStats};
use crate::model::{LoadedModel, Model, ResidentAdapter};
use crate::model_runner::{ModelRunner, RunItem};
use crate::prefill_pace::PrefillPace;
use crate::request::{Event, RequestKind};
use crate::scheduler::{Admitted, Plan, ScheduledSequence, Scheduler, SchedulerLimits, SequenceId};
use crate::sequence::{ActiveRequest, RequestKey, Sequence};
use crate::step_clock::StepClock;
use crate::traffic::Traffic;
use crate::train::worker::TrainingWorker;

/// Places for control messages beside those for requests.
const CONTROL_PLACES: usize = 128;
/// How often a sleeping engine shows that it lives.
const HEARTBEAT: Duration = Duration::from_millis(100);
/// How often deadlines, readers and adapters are looked at while nothing can run.
const WATCH: Duration = Duration::from_millis(2);
/// How long trainers may take to end after a drain's deadline: a checkpoint of an adapter takes milliseconds.
const TRAINERS_GRACE: Duration = Duration::from_secs(5);

/// Everything that the engine thread owns.
struct Engine {
    config: EngineConfig,
    model: ModelInfo,
    commands: Receiver<EngineCommand>,
    gauges: Arc<Gauges>,
    runner: ModelRunner,
    scheduler: Scheduler,
    pace: PrefillPace,
    pool: AdapterPool,
    traffic: Traffic,
    merger: SyncSender<MergeJob>,
    next_judgement: Instant,
    training: TrainingWorker,
    requests: BTreeMap<RequestKey, ActiveRequest>,
    sequences: HashMap<SequenceId, Sequence>,
    /// Requests whose adapter is not there yet, in the order of arrival.
    parked: Vec<(RequestKey, RequestKind)>,
    drain: Option<Drain>,
    /// The last plan was empty: nothing can run until something happens.
    stalled: bool,
    next_request: u64,
    next_sequence: u64,
    totals: EngineStats,
    /// Where constrained sequences' next tokens are worked out.
    masker: Masker,
    clock: StepClock,
}

struct Drain {
    deadline: Instant,
    reply: oneshot::Sender<()>,
}

/// A planned sequence after the step: where its wanted states are, or that its step panicked.
struct StepOutput {
    item: ScheduledSequence,
    /// Rows of the runner's states; `None` after a panic.
    states: Option<Range<usize>>,
}

/// Builds the model and starts loader and engine threads.
pub(crate) fn start(
    config: EngineConfig,
    ops: Backend,
    loaded: LoadedModel,
    source: Arc<dyn AdapterSource>,
) -> Result<Shared, EngineError> {
    config.validate()?;
    let cannot = |detail: String| EngineError::CannotStart { detail };
    let max_sequence_tokens = loaded
        .config
        .context_length
        .min(config.max_sequence_tokens)
        .min(config.kv_blocks * BLOCK_SIZE);
    let decoder = Model::new(ops, loaded.config.clone(), loaded.weights)
        .map_err(|error| cannot(error.to_string()))?;
    let formats = decoder.formats();
    tracing::info!(
        dtype = %loaded.dtype,
        bytes = formats.bytes(),
        matrices = %formats,
        "the base model's weights are in memory"
    );
    let model = ModelInfo {
        name: loaded.name,
        digest: loaded.digest,
        config: loaded.config,
        dtype: loaded.dtype,
        formats,
        max_sequence_tokens,
        tokenizer: loaded.tokenizer,
        template: loaded.template,
        stop_ids: loaded.stop_ids,
    };
    let decoder = Arc::new(decoder);
    let gauges = Arc::new(Gauges::new());
    let (sender, commands) = sync_channel(config.max_queue + CONTROL_PLACES);
    let sender = CommandSender::new(sender, Arc::clone(&gauges));
    let shelf = Arc::new(Shelf::new(
        config.adapter_bytes,
        config.pinned_bytes(),
        config.merged_bytes,
    ));
    let jobs = adapter_loader::start(
        source,
        Arc::clone(&decoder),
        &config,
        Arc::clone(&shelf),
        sender.clone(),
    )
    .map_err(|error| cannot(error.to_string()))?;
    let merger = merger::start(Arc::clone(&decoder), Arc::clone(&shelf))
        .map_err(|error| cannot(error.to_string()))?;
    let pool = AdapterPool::new(shelf, config.max_adapter_loads, jobs);
    let limits = SchedulerLimits {
        max_num_seqs: config.max_num_seqs,
        max_num_batched_tokens: config.max_num_batched_tokens,
        prefill_chunk_tokens: config.prefill_chunk_tokens,
        prefix_cache: config.prefix_cache,
    };
    let compiler = Compiler::start(
        Arc::clone(&model.tokenizer),
        model.config.vocab,
        model.stop_ids.clone(),
        config.constraints.clone(),
    )
    .map_err(|error| cannot(error.to_string()))?;
    let engine = Engine {
        model: model.clone(),
        commands,
        gauges: Arc::clone(&gauges),
        runner: ModelRunner::new(decoder, config.kv_blocks),
        scheduler: Scheduler::new(limits, config.kv_blocks),
        pace: PrefillPace::new(config.prefill_max_step_impact, config.prefill_chunk_tokens),
        pool: pool.clone(),
        traffic: Traffic::new(config.merge_window, config.merge_share),
        merger,
        next_judgement: Instant::now(),
        training: TrainingWorker::new(&config, Arc::clone(&gauges), sender.clone()),
        requests: BTreeMap::new(),
        sequences: HashMap::new(),
        parked: Vec::new(),
        drain: None,
        stalled: true,
        next_request: 0,
        next_sequence: 0,
        totals: EngineStats::default(),
        clock: StepClock::new(),
        masker: Masker::start(config.max_num_seqs).map_err(|error| cannot(error.to_string()))?,
        config: config.clone(),
    };
    metrics::describe(&config);
    std::thread::Builder::new()
        .name("engine".to_owned())
        .spawn(move || engine.run_until_drained())
        .map_err(|error| cannot(error.to_string()))?;
    Ok(Shared {
        compiler,
        config,
        model,
        commands: sender,
        gauges,
        pool,
    })
}

// === impl Engine ===

impl Engine {
    fn run_until_drained(mut self) {
        while !self.drained() {
            self.drain_commands();
            self.clock.lap(|times| &mut times.commands);
            let plan = self.schedule();
            self.clock.lap(|times| &mut times.schedule);
            let outputs = self.run(&plan);
            self.clock.lap(|times| &mut times.model);
            self.postprocess(outputs);
            self.clock.lap(|times| &mut times.results);
            self.train();
            self.clock.lap(|times| &mut times.training);
            self.publish_stats();
            self.clock.lap(|times| &mut times.publish);
        }
        tracing::info!(steps = self.totals.steps, "the engine has drained");
        self.pool.stop();
        if let Some(drain) = self.drain.take() {
            let _ = drain.reply.send(());
        }
    }

    // --- drain commands ---

    /// Takes all commands; waits for one when there is nothing to do.
    fn drain_commands(&mut self) {
        let wait = self.idle_time();
        if !wait.is_zero() {
            let command = self.commands.recv_timeout(wait);
            self.clock.lap(|times| &mut times.idle);
            match command {
                Ok(command) => self.handle(command),
                Err(RecvTimeoutError::Timeout) => {}
                // The engine's own parts hold senders, so this cannot be; if it is, nobody can ask for anything.
                Err(RecvTimeoutError::Disconnected) => {
                    self.begin_drain(Instant::now(), oneshot::channel().0)
                }
            }
        }
        while let Ok(command) = self.commands.try_recv() {
            self.handle(command);
        }
        let now = Instant::now();
        self.judge_merging(now);
        self.unpark(now);
        self.watch(now);
    }

    /// How long the engine may sleep before it looks again.
    fn idle_time(&self) -> Duration {
        let can_run = self.scheduler.has_work() && !self.stalled;
        if can_run || self.training.ready() {
            return Duration::ZERO;
        }
        if !self.requests.is_empty() || self.drain.is_some() {
            WATCH
        } else {
            HEARTBEAT
        }
    }

    fn handle(&mut self, command: EngineCommand) {
        self.gauges.pending.fetch_sub(1, Ordering::SeqCst);
        match command {
            EngineCommand::Submit(submission) => self.accept(*submission),
            EngineCommand::Train(start) => {
                self.training.start(*start, Arc::clone(self.runner.model()));
            }
            // Whoever waits looks again before the next step.
            EngineCommand::AdapterReady => {}
            EngineCommand::SelfCheck { adapter, reply } => {
                let _ = reply.send(self.self_check(&adapter));
            }
            EngineCommand::Probe(reply) => {
                let _ = reply.send(());
            }
            EngineCommand::Wake => self.training.look(),
            EngineCommand::Drain { deadline, reply } => self.begin_drain(deadline, reply),
        }
    }

    fn begin_drain(&mut self, deadline: Instant, reply: oneshot::Sender<()>) {
        tracing::info!(requests = self.requests.len(), "draining");
        self.training.suspend_all();
        self.drain = Some(Drain { deadline, reply });
    }

    fn drained(&mut self) -> bool {
        let Some(drain) = &self.drain else {
            return false;
        };
        let now = Instant::now();
        if now >= drain.deadline {
            let late = now >= drain.deadline + TRAINERS_GRACE;
            let left: Vec<RequestKey> = self.requests.keys().copied().collect();
            for key in left {
                self.fail(key, EngineError::Draining);
            }
            return late || self.training.active() == 0;
        }
        self.requests.is_empty() && self.training.active() == 0
    }

    /// Whether a few tokens through a new adapter give finite states.
    fn self_check(&mut self, adapter: &Arc<ResidentAdapter>) -> bool {
        let runner = &mut self.runner;
        catch_unwind(AssertUnwindSafe(|| runner.self_check(adapter))).unwrap_or(false)
    }

    /// Requests whose client is gone or whose time is over leave; sequences whose reader is behind pause.
    fn watch(&mut self, now: Instant) {
        let keys: Vec<RequestKey> = self.requests.keys().copied().collect();
        for key in keys {
            let Some(request) = self.requests.get_mut(&key) else {
                continue;
            };
            if request.events.is_closed() {
                metrics::admission("cancelled");
                self.remove(key);
                continue;
            }
            if request.deadline.is_some_and(|deadline| now >= deadline) {
                let error = request.deadline_error(now);
                self.fail(key, error);
                continue;
            }
            let room = request.sequences_with_room();
            for (index, &id) in request.open.iter().enumerate() {
                self.scheduler.set_paused(id, index >= room);
            }
            if room > 0 || request.open.is_empty() {
                request.blocked_since = None;
            } else if now - *request.blocked_since.get_or_insert(now)
                > self.config.slow_reader_limit
            {
                let limit_ms =
                    u64::try_from(self.config.slow_reader_limit.as_millis()).unwrap_or(u64::MAX);
                self.fail(key, EngineError::SlowReader { limit_ms });
            }
        }
    }

    // --- schedule ---

    fn schedule(&mut self) -> Plan {
        self.scheduler.set_prefill_chunk(self.pace.rows());
        let plan = self.scheduler.schedule();
        self.stalled = plan.items.is_empty();
        for id in &plan.preempted {
            self.totals.preemptions += 1;
            if let Some(sequence) = self.sequences.get_mut(id) {
                sequence.task.restart();
            }
        }
        let now = Instant::now();
        for admitted in &plan.admitted {
            self.start(admitted, now);
        }
        plan
    }

    /// A sequence begins, or begins again.
    fn start(&mut self, admitted: &Admitted, now: Instant) {
        let Some(sequence) = self.sequences.get_mut(&admitted.id) else {
            return;
        };
        let Some(request) = self.requests.get_mut(&sequence.request) else {
            return;
        };
        if std::mem::take(&mut sequence.brings_prompt) && admitted.cached {
            request.usage.cached_input_tokens += admitted.computed;
            self.totals.cached_input_tokens += admitted.computed as u64;
        }
        request.start(now);
    }

    // --- run ---

    /// The model's states for every planned sequence. When the step panics it is repeated one sequence at a time, so
    /// that only the ones at fault pay: rows and their keys and values do not depend on neighbours.
    fn run(&mut self, plan: &Plan) -> Vec<StepOutput> {
        if plan.items.is_empty() {
            return Vec::new();
        }
        let began = Instant::now();
        self.runner.copy_blocks(&plan.copies);
        let outputs = match self.run_items(&plan.items, 0) {
            Some(outputs) => outputs,
            None if plan.items.len() == 1 => vec![StepOutput {
                item: plan.items[0],
                states: None,
            }],
            None => {
                let mut outputs: Vec<StepOutput> = Vec::with_capacity(plan.items.len());
                for item in &plan.items {
                    let mut found = outputs.iter().filter_map(|output| output.states.as_ref());
                    let kept = found.next_back().map_or(0, |states| states.end);
                    match self.run_items(std::slice::from_ref(item), kept) {
                        Some(alone) => outputs.extend(alone),
                        None => outputs.push(StepOutput {
                            item: *item,
                            states: None,
                        }),
                    }
                }
                outputs
            }
        };
        self.book_step(plan, began.elapsed());
        outputs
    }

    /// Has the wanted states put after the `kept` first; `None` after a panic.
    fn run_items(&mut self, items: &[ScheduledSequence], kept: usize) -> Option<Vec<StepOutput>> {
        let (runner, scheduler) = (&mut self.runner, &self.scheduler);
        let (sequences, requests) = (&self.sequences, &self.requests);
        let run = AssertUnwindSafe(|| {
            let run_items: Vec<RunItem<'_>> = items
                .iter()
                .filter_map(|item| {
                    let sequence = sequences.get(&item.id)?;
                    let request = requests.get(&sequence.request)?;
                    Some(RunItem {
                        tokens: &scheduler.tokens(item.id)[item.start..item.start + item.rows],
                        start: item.start,
                        block_table: scheduler.block_table(item.id),
                        adapters: &request.adapters,
                        merged: request.merged(),
                        wanted: sequence.task.wanted(item.start, item.rows, item.completes),
                    })
                })
                .collect();
            let states = runner.run(&run_items, kept);
            let outputs = items.iter().zip(states).map(|(item, states)| StepOutput {
                item: *item,
                states: Some(states),
            });
            outputs.collect()
        });
        let outputs = catch_unwind(run).ok();
        if outputs.is_none() {
            self.totals.panics += 1;
            metrics::panic_caught("step");
            tracing::error!(sequences = items.len(), "a step panicked");
            self.runner.renew_buffers();
        }
        outputs
    }

    fn book_step(&mut self, plan: &Plan, duration: Duration) {
        self.totals.steps += 1;
        let rows: usize = plan.items.iter().map(|item| item.rows).sum();
        let decodes = plan
            .items
            .iter()
            .filter(|item| item.rows == 1 && item.start > 0)
            .count();
        self.totals.input_tokens += (rows - decodes) as u64;
        let mut versions: Vec<_> = plan
            .items
            .iter()
            .filter_map(|item| self.requests.get(&self.sequences.get(&item.id)?.request))
            .flat_map(|request| request.target.iter().zip(&request.leases))
            .map(|(target, lease)| (target.digest, lease.adapter.bytes()))
            .collect();
        versions.sort_unstable();
        versions.dedup();
        let bytes: usize = versions.iter().map(|(_, bytes)| bytes).sum();
        self.totals.adapter_bytes_read += bytes as u64;
        metrics::step(plan.items.len(), rows, decodes, versions.len(), duration);
        self.count_traffic(plan, Instant::now());
        self.pace.note(decodes, rows - decodes, duration);
        self.training.after_step(duration);
    }

    // --- training's turn ---

    fn train(&mut self) {
        self.training.turn(!self.stalled);
    }

    fn publish_stats(&mut self) {
        let totals = &mut self.totals;
        totals.running = self.scheduler.running();
        totals.waiting = self.scheduler.waiting() + self.parked.len();
        totals.kv_blocks_used = self.scheduler.blocks_used();
        totals.kv_blocks_kept = self.scheduler.blocks_idle();
        totals.kv_evictions = self.scheduler.evictions();
        totals.kv_blocks = self.scheduler.blocks_total();
        let adapters = self.pool.counts();
        totals.adapters_resident = adapters.resident;
        totals.adapter_bytes_used = adapters.bytes;
        totals.adapter_bytes = self.config.adapter_bytes;
        totals.adapter_leases = adapters.leases;
        totals.adapters_pinned = adapters.pinned;
        totals.adapter_bytes_pinned = adapters.pinned_bytes;
        totals.merged = adapters.merged;
        totals.merged_bytes = adapters.merged_bytes;
        totals.training_impact = self.training.impact();
        totals.times.clone_from(self.clock.times());
        metrics::gauges(totals, self.scheduler.service_gap());
        *self
            .gauges
            .stats
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = (Instant::now(), totals.clone());
    }

    // --- the end of requests ---

    /// Ends a request with an error.
    fn fail(&mut self, key: RequestKey, error: EngineError) {
        if let Some(request) = self.requests.get(&key) {
            tracing::debug!(request = request.id, %error, "request failed");
            metrics::request_failed(&error);
            request.send(Event::Failed(error));
        }
        self.remove(key);
    }

    /// Forgets a request and all its sequences: blocks, lease and queue place go back.
    fn remove(&mut self, key: RequestKey) {
        let Some(request) = self.requests.remove(&key) else {
            return;
        };
        for id in &request.open {
            self.scheduler.finish(*id);
            self.sequences.remove(id);
        }
        self.parked.retain(|(parked, _)| *parked != key);
    }
}
