//! From a submitted request to sequences in the scheduler, by way of the adapter that it needs.

use std::sync::Arc;
use std::time::{Duration, Instant};

use espalier_adapters::batch::Mixture;

use super::Engine;
use crate::adapter_pool::Lookup;
use crate::cache_key::CacheKey;
use crate::command::Submission;
use crate::constraint::Constraint;
use crate::detokenizer::StopFilter;
use crate::error::EngineError;
use crate::metrics;
use crate::pooling::Pooled;
use crate::request::{Generate, RequestKind, Usage};
use crate::sampler::Sampler;
use crate::scheduler::{NewSequence, Prefix, SequenceId};
use crate::sequence::{
    ActiveRequest, Continuation, Generation, RequestKey, Sequence, StopRules, Task,
};

/// A mixture that has lost versions to the others that it waits for so often,
const MAX_LOST: u32 = 8;
/// and for so long, cannot have them in memory together.
const GATHER_PATIENCE: Duration = Duration::from_secs(2);

/// A sequence on its way to the scheduler.
struct Planned {
    tokens: Vec<u32>,
    task: Task,
    /// Its first so many tokens are those of the group's first sequence.
    shared: usize,
    /// Sequences of one group have a prompt in common.
    group: usize,
}

impl Engine {
    /// Takes a request into the book. It runs when its adapter is there.
    pub(super) fn accept(&mut self, submission: Submission) {
        let Submission {
            request,
            events,
            ticket,
            submitted,
            adapters_missing,
        } = submission;
        let key = RequestKey(self.next_request);
        self.next_request += 1;
        let seed = match &request.kind {
            RequestKind::Generate(generate) => {
                generate.sampling.seed.unwrap_or_else(rand::random::<u64>)
            }
            _ => 0,
        };
        let active = ActiveRequest {
            id: request.id,
            tenant: request.tenant,
            priority: request.priority,
            target: request.target,
            events,
            deadline: request.deadline,
            received: request.received,
            submitted,
            ticket: Some(ticket),
            leases: Vec::new(),
            adapters: Mixture::default(),
            gathered: (0, 0),
            seed,
            adapter_load: Duration::ZERO,
            started: None,
            queue: Duration::ZERO,
            first_output: None,
            last_output: None,
            usage: Usage {
                input_tokens: request.kind.input_tokens(),
                adapter_loads: adapters_missing,
                ..Usage::default()
            },
            open: Vec::new(),
            blocked_since: None,
            likelihoods: Vec::new(),
            labels: Arc::from([]),
        };
        metrics::admission("admitted");
        let mut asked = active.target.iter().map(|target| target.digest);
        let absent =
            asked.find(|digest| request.require_resident && !self.pool.is_resident(digest));
        let base = active.target.is_empty();
        self.requests.insert(key, active);
        match absent {
            Some(digest) => self.fail(key, EngineError::AdapterNotResident { digest }),
            None if base => self.begin(key, request.kind),
            None => self.parked.push((key, request.kind)),
        }
    }

    /// Requests whose adapters have come begin; those whose adapters cannot be had fail.
    pub(super) fn unpark(&mut self, now: Instant) {
        for (key, kind) in std::mem::take(&mut self.parked) {
            if !self.requests.contains_key(&key) {
                continue;
            }
            match self.gather(key, now) {
                Ok(true) => self.begin(key, kind),
                Ok(false) => self.parked.push((key, kind)),
                Err(error) => self.fail(key, error),
            }
        }
    }

    /// Leases all of a request's versions, or none: two requests that each held a part of what both need would wait for
    /// each other.
    fn gather(&mut self, key: RequestKey, now: Instant) -> Result<bool, EngineError> {
        let Some(request) = self.requests.get_mut(&key) else {
            return Ok(false);
        };
        let mut leases = Vec::with_capacity(request.target.len());
        let mut there = 0_u32;
        for (index, target) in request.target.iter().enumerate() {
            match self.pool.lease(target.digest, request.submitted, now) {
                Lookup::Ready(lease) => {
                    there |= 1 << index;
                    leases.push(lease);
                }
                Lookup::Wait => {}
                Lookup::Failed(error) => return Err(error),
            }
        }
        let (before, lost) = request.gathered;
        let lost = lost + (before & !there).count_ones();
        request.gathered = (there, lost);
        if leases.len() < request.target.len() {
            // The first look is the one that starts the loads, or finds them started.
            request.usage.adapter_loads = request
                .usage
                .adapter_loads
                .max(request.target.len() - leases.len());
            if lost > MAX_LOST && now - request.submitted > GATHER_PATIENCE {
                let reason = format!(
                    "its {} versions found no room together in the {} bytes for adapters; name fewer",
                    request.target.len(),
                    self.config.adapter_bytes
                );
                let field = "target";
                return Err(EngineError::InvalidField { field, reason });
            }
            return Ok(false);
        }
        let waited = request.usage.adapter_loads > 0;
        metrics::adapter_lookup(waited);
        if waited {
            request.adapter_load = now - request.submitted;
        }
        request.hold(leases)?;
        Ok(true)
    }

    /// Makes the sequences of a request and hands them to the scheduler.
    fn begin(&mut self, key: RequestKey, kind: RequestKind) {
        let planned = match self.plan_sequences(key, kind) {
            Ok(planned) => planned,
            Err(error) => return self.fail(key, error),
        };
        let Some(request) = self.requests.get_mut(&key) else {
            return;
        };
        let tenant = Arc::clone(&request.tenant);
        let merged = request.merged().is_some();
        let cache_key = Arc::new(CacheKey::new(tenant, &request.target, merged));
        let priority = request.priority;
        let mut first_of_group: Option<(usize, SequenceId)> = None;
        for Planned {
            tokens,
            task,
            shared,
            group,
        } in planned
        {
            let id = SequenceId(self.next_sequence);
            self.next_sequence += 1;
            let first = first_of_group.filter(|(of, _)| *of == group);
            if first.is_none() {
                first_of_group = Some((group, id));
            }
            self.scheduler.add(NewSequence {
                id,
                key: Arc::clone(&cache_key),
                tokens,
                reusable: task.reusable(),
                prefix: first.map(|(_, of)| Prefix { of, tokens: shared }),
                priority,
            });
            request.open.push(id);
            self.sequences.insert(
                id,
                Sequence {
                    request: key,
                    brings_prompt: first.is_none(),
                    task,
                },
            );
        }
    }

    fn plan_sequences(
        &mut self,
        key: RequestKey,
        kind: RequestKind,
    ) -> Result<Vec<Planned>, EngineError> {
        let hidden = self.model.config.hidden;
        let Some(request) = self.requests.get_mut(&key) else {
            return Ok(Vec::new());
        };
        let alone = |group, tokens, task| Planned {
            tokens,
            task,
            shared: 0,
            group,
        };
        Ok(match kind {
            RequestKind::Generate(generate) => {
                let seed = request.seed;
                return Ok(self.plan_candidates(seed, generate));
            }
            RequestKind::Classify { inputs } => {
                let head = request.head()?;
                let (labels, reads) = (Arc::clone(&head.labels), head.adapter.head_settings());
                let pooling = reads.pooling;
                request.labels = labels;
                let task = |index| Task::Classify {
                    index,
                    pooled: Pooled::new(pooling, hidden),
                };
                let indexed = inputs.into_iter().enumerate();
                indexed
                    .map(|(index, tokens)| alone(index, tokens, task(index)))
                    .collect()
            }
            RequestKind::Embed {
                inputs,
                pooling,
                normalize,
            } => {
                let task = |index| Task::Embed {
                    index,
                    normalize,
                    pooled: Pooled::new(pooling, hidden),
                };
                let indexed = inputs.into_iter().enumerate();
                indexed
                    .map(|(index, tokens)| alone(index, tokens, task(index)))
                    .collect()
            }
            RequestKind::Score {
                prompt,
                continuations,
            } => continuations
                .into_iter()
                .enumerate()
                .map(|(index, targets)| continuation(0, &prompt, targets, index, false))
                .collect(),
            RequestKind::LabelLikelihood {
                prompts,
                labels,
                label_tokens,
            } => {
                request.labels = labels.into();
                request.likelihoods = vec![vec![None; label_tokens.len()]; prompts.len()];
                let mut planned = Vec::with_capacity(prompts.len() * label_tokens.len());
                for (group, prompt) in prompts.iter().enumerate() {
                    for (label, targets) in label_tokens.iter().enumerate() {
                        let index = group * label_tokens.len() + label;
                        planned.push(continuation(group, prompt, targets.clone(), index, true));
                    }
                }
                planned
            }
        })
    }

    fn plan_candidates(&self, seed: u64, generate: Generate) -> Vec<Planned> {
        let Generate {
            prompt,
            sampling,
            stop,
            logprobs,
            constraint,
        } = generate;
        let room = self.model.max_sequence_tokens.saturating_sub(prompt.len());
        let eos = if stop.ignore_eos {
            Vec::new()
        } else {
            self.model.stop_ids.clone()
        };
        // A grammar's end is one of the model's stop ids, so what does not stop at them must not choose them.
        let banned_always = if stop.ignore_eos && constraint.is_some() {
            self.model.stop_ids.clone()
        } else {
            Vec::new()
        };
        let banned_early = eos
            .iter()
            .chain(&stop.stop_token_ids)
            .chain(&banned_always)
            .copied()
            .collect();
        let rules = Arc::new(StopRules {
            max_tokens: stop.max_tokens.unwrap_or(room).min(room),
            banned_always,
            eos,
            banned_early,
            logprobs,
            conditions: stop,
        });
        let candidate = |candidate: usize| {
            let conditions = &rules.conditions;
            let generation = Generation {
                candidate,
                sampler: Sampler::new(sampling.clone(), seed, candidate as u64, &prompt),
                decoder: match constraint {
                    // A constraint counts every character, a first space too.
                    Some(_) => self.model.tokenizer.decode_stream(true).with_first_space(),
                    None => self.model.tokenizer.decode_stream(true),
                },
                filter: StopFilter::new(conditions.stop.clone(), conditions.include_stop_str),
                rules: Arc::clone(&rules),
                constraint: constraint.as_ref().map(Constraint::candidate),
                outputs: 0,
            };
            Planned {
                tokens: prompt.clone(),
                task: Task::Generate(Box::new(generation)),
                shared: prompt.len() - 1,
                group: 0,
            }
        };
        (0..sampling.n).map(candidate).collect()
    }
}

/// The last target needs no state of its own.
fn continuation(
    group: usize,
    prompt: &[u32],
    targets: Vec<u32>,
    index: usize,
    label: bool,
) -> Planned {
    let mut tokens = prompt.to_vec();
    tokens.extend_from_slice(&targets[..targets.len() - 1]);
    let from = prompt.len();
    let task = Task::Score(Continuation {
        index,
        from,
        targets,
        scored: Vec::new(),
        label,
    });
    Planned {
        tokens,
        task,
        shared: from - 1,
        group,
    }
}
