//! The scheduler against random traffic: budgets, order, fairness, that everything ends, and that every sequence reads
//! the keys and values of its own tokens.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};

use proptest::prelude::*;

use super::*;
use crate::cache_key::test_key;

const LIMITS: SchedulerLimits = SchedulerLimits {
    max_num_seqs: 5,
    max_num_batched_tokens: 24,
    prefill_chunk_tokens: 9,
    prefix_cache: true,
};
const BLOCKS: usize = 8;

/// A sequence whose tokens nobody else has.
fn new(id: u64, tenant: u8, version: u8, tokens: usize) -> NewSequence {
    NewSequence {
        id: SequenceId(id),
        key: test_key(tenant, version),
        tokens: (0..tokens as u32).map(|i| id as u32 * 1000 + i).collect(),
        reusable: usize::MAX,
        prefix: None,
        priority: Priority::Interactive,
    }
}

fn bulk(id: u64, tenant: u8, tokens: usize) -> NewSequence {
    NewSequence {
        priority: Priority::Bulk,
        ..new(id, tenant, 0, tokens)
    }
}

fn tenant(number: u8) -> Arc<str> {
    Arc::clone(test_key(number, 0).tenant())
}

#[derive(Clone, Debug)]
struct Job {
    tenant: u8,
    version: u8,
    prompt: usize,
    output: usize,
    /// So many of the prompt's tokens are those of everybody else.
    common: usize,
    /// So many tokens' states are not wanted.
    reusable: usize,
    /// Its first complete step panics.
    fails: bool,
    /// Steps between the previous arrival and this one.
    gap: usize,
    /// Candidates that share the prompt.
    n: usize,
    priority: Priority,
    /// After so many outputs the reader pauses for some steps.
    pause: Option<(usize, usize)>,
    /// Gone after so many steps in the system.
    cancel: Option<usize>,
}

fn job() -> impl Strategy<Value = Job> {
    (
        (0..3_u8, 0..2_u8, 1..70_usize, 1..50_usize),
        (
            0..80_usize,
            prop_oneof![Just(usize::MAX), 0..40_usize],
            prop::bool::weighted(0.1),
        ),
        (0..6_usize, 1..4_usize, any::<bool>()),
        prop::option::weighted(0.2, (0..10_usize, 1..30_usize)),
        prop::option::weighted(0.15, 0..40_usize),
    )
        .prop_map(
            |(
                (tenant, version, prompt, output),
                (common, reusable, fails),
                (gap, n, bulk),
                pause,
                cancel,
            )| Job {
                tenant,
                version,
                prompt,
                output,
                common,
                reusable,
                fails,
                gap,
                n,
                priority: if bulk {
                    Priority::Bulk
                } else {
                    Priority::Interactive
                },
                pause,
                cancel,
            },
        )
}

struct Live {
    id: SequenceId,
    job: Job,
    key: Arc<CacheKey>,
    tokens: Vec<u32>,
    computed: usize,
    outputs: usize,
    age: usize,
    paused_for: usize,
    has_paused: bool,
}

/// What was written where: a fingerprint of the key and of all tokens up to the position.
type Memory = [[u64; BLOCK_SIZE]; BLOCKS];

fn fingerprint(key: &CacheKey, tokens: &[u32]) -> u64 {
    let mut hasher = DefaultHasher::new();
    (key, tokens).hash(&mut hasher);
    hasher.finish()
}

fn arrive(scheduler: &mut Scheduler, live: &mut Vec<Live>, next_id: &mut u64, job: &Job) {
    let mut parent = None;
    let first = *next_id as u32;
    for _ in 0..job.n {
        let id = SequenceId(*next_id);
        *next_id += 1;
        let key = test_key(job.tenant, job.version);
        let own = |i| {
            if i < job.common {
                i as u32
            } else {
                (first + 1) * 1000 + i as u32
            }
        };
        let tokens: Vec<u32> = (0..job.prompt).map(own).collect();
        let prefix = parent.map(|of| Prefix {
            of,
            tokens: job.prompt - 1,
        });
        parent.get_or_insert(id);
        scheduler.add(NewSequence {
            id,
            key: Arc::clone(&key),
            tokens: tokens.clone(),
            reusable: job.reusable,
            prefix,
            priority: job.priority,
        });
        live.push(Live {
            id,
            job: job.clone(),
            key,
            tokens,
            computed: 0,
            outputs: 0,
            age: 0,
            paused_for: 0,
            has_paused: false,
        });
    }
}

fn check_plan(plan: &Plan, scheduler: &Scheduler, live: &mut [Live]) {
    let rows: usize = plan.items.iter().map(|item| item.rows).sum();
    assert!(rows <= LIMITS.max_num_batched_tokens, "{rows} rows");
    assert!(scheduler.running() <= LIMITS.max_num_seqs);
    let weights: Vec<_> = plan
        .items
        .iter()
        .map(|item| scheduler.entries[&item.id].key.weights())
        .collect();
    assert!(weights.is_sorted(), "one version's rows stand together");
    let ids: BTreeSet<_> = plan.items.iter().map(|item| item.id).collect();
    assert_eq!(ids.len(), plan.items.len(), "a sequence has rows once");
    for id in &plan.preempted {
        live.iter_mut()
            .find(|live| live.id == *id)
            .unwrap()
            .computed = 0;
        assert!(!ids.contains(id), "a victim has no rows");
    }
    for admitted in &plan.admitted {
        let sequence = live.iter_mut().find(|live| live.id == admitted.id).unwrap();
        assert!(!admitted.cached || admitted.computed <= sequence.job.reusable);
        assert!(scheduler.limits.prefix_cache || !admitted.cached || admitted.computed == 0);
        sequence.computed = admitted.computed;
    }
    let is_decode = |item: &&ScheduledSequence| item.rows == 1 && item.start > 0 && item.completes;
    let admitted =
        |item: &&ScheduledSequence| plan.admitted.iter().any(|admitted| admitted.id == item.id);
    if plan
        .items
        .iter()
        .filter(is_decode)
        .any(|item| !admitted(&item))
    {
        let prefill: usize = plan
            .items
            .iter()
            .filter(|item| !is_decode(item))
            .map(|item| item.rows)
            .sum();
        assert!(
            prefill <= LIMITS.prefill_chunk_tokens,
            "{prefill} rows of prefill beside decode rows"
        );
    }
    for item in &plan.items {
        let sequence = live.iter_mut().find(|live| live.id == item.id).unwrap();
        assert_eq!(
            item.start, sequence.computed,
            "rows go on where the last step ended"
        );
        assert_eq!(scheduler.tokens(item.id), sequence.tokens);
        assert!(item.rows >= 1 && item.start + item.rows <= sequence.tokens.len());
        assert_eq!(
            item.completes,
            item.start + item.rows == sequence.tokens.len()
        );
        assert_eq!(sequence.paused_for, 0, "a paused sequence has no rows");
        assert!(scheduler.block_table(item.id).len() >= blocks_for(item.start + item.rows));
        sequence.computed = item.start + item.rows;
    }
}

/// Runs a step in memory: what each row reads must be what its sequence's tokens were written as.
fn run(plan: &Plan, scheduler: &Scheduler, live: &[Live], memory: &mut Memory) {
    for copy in &plan.copies {
        memory[copy.to as usize] = memory[copy.from as usize];
    }
    for item in &plan.items {
        let sequence = live.iter().find(|live| live.id == item.id).unwrap();
        let table = scheduler.block_table(item.id);
        let fails = sequence.job.fails && item.completes;
        for position in item.start..item.start + item.rows {
            let written = fingerprint(&sequence.key, &sequence.tokens[..=position]);
            let block = table[position / BLOCK_SIZE] as usize;
            memory[block][position % BLOCK_SIZE] = if fails { 1 } else { written };
        }
        for position in (0..item.start + item.rows).filter(|_| !fails) {
            let expected = fingerprint(&sequence.key, &sequence.tokens[..=position]);
            let block = table[position / BLOCK_SIZE] as usize;
            assert_eq!(
                memory[block][position % BLOCK_SIZE],
                expected,
                "{:?} reads position {position} in block {block}",
                item.id
            );
        }
    }
}

/// Bulk work begins only when no interactive work is left that could.
fn check_priority(plan: &Plan, scheduler: &Scheduler) {
    let ready = |entry: &SequenceId| {
        let of = &scheduler.entries[entry];
        of.status == Status::Waiting
            && of.priority == Priority::Interactive
            && scheduler.is_ready(*entry)
    };
    let yielding = plan
        .admitted
        .iter()
        .find(|admitted| scheduler.entries[&admitted.id].yields);
    if let Some(Admitted { id, .. }) = yielding {
        let waiting = scheduler.entries.keys().copied().find(|id| ready(id));
        assert_eq!(waiting, None, "bulk sequence {id:?} began before it");
    }
}

/// Runs all jobs to their end; panics when an invariant breaks or when nothing moves.
fn simulate(jobs: &[Job], prefix_cache: bool) {
    let limits = SchedulerLimits {
        prefix_cache,
        ..LIMITS
    };
    let mut scheduler = Scheduler::new(limits, BLOCKS);
    let mut memory: Memory = [[0; BLOCK_SIZE]; BLOCKS];
    let (mut live, mut next_id, mut arrivals) = (Vec::<Live>::new(), 0, jobs.iter().peekable());
    let mut until_next = arrivals.peek().map_or(0, |job| job.gap);
    let work: usize = jobs
        .iter()
        .map(|job| job.n * (job.prompt + job.output) * 3 + job.gap + 60)
        .sum();
    for step in 0.. {
        // Preemption repeats work: the bound is generous, but a bound.
        assert!(
            step < work * 4 + 1000,
            "{} sequences never end: {}",
            live.len(),
            scheduler.describe()
        );
        while until_next == 0 {
            let Some(job) = arrivals.next() else { break };
            arrive(&mut scheduler, &mut live, &mut next_id, job);
            until_next = arrivals.peek().map_or(0, |job| job.gap);
        }
        until_next = until_next.saturating_sub(1);
        if live.is_empty() && arrivals.peek().is_none() {
            break;
        }
        let plan = scheduler.schedule();
        scheduler.check_integrity();
        check_plan(&plan, &scheduler, &mut live);
        check_priority(&plan, &scheduler);
        run(&plan, &scheduler, &live, &mut memory);
        postprocess(&plan, &mut scheduler, &mut live);
        scheduler.check_integrity();
    }
    assert_eq!(
        (
            scheduler.running(),
            scheduler.waiting(),
            scheduler.blocks_used()
        ),
        (0, 0, 0)
    );
    assert!(scheduler.tenants.is_empty() && scheduler.entries.is_empty());
}

fn postprocess(plan: &Plan, scheduler: &mut Scheduler, live: &mut Vec<Live>) {
    for item in &plan.items {
        let index = live.iter().position(|live| live.id == item.id).unwrap();
        let sequence = &mut live[index];
        if sequence.job.fails && item.completes {
            scheduler.finish(item.id);
            live.remove(index);
            continue;
        }
        scheduler.complete(item);
        if item.completes {
            sequence.outputs += 1;
            if sequence.outputs < sequence.job.output {
                // Outputs of some sequences agree, as those of greedy ones do.
                let token = 7 + sequence.outputs as u32 + (item.id.0 as u32 % 2) * 5000;
                sequence.tokens.push(token);
                scheduler.push_token(item.id, token);
            }
        }
    }
    for sequence in live.iter_mut() {
        sequence.age += 1;
        if sequence.paused_for > 0 {
            sequence.paused_for -= 1;
            if sequence.paused_for == 0 {
                scheduler.set_paused(sequence.id, false);
            }
        } else if let Some((after, steps)) = sequence.job.pause
            && sequence.outputs > after
            && !sequence.has_paused
        {
            sequence.has_paused = true;
            sequence.paused_for = steps;
            scheduler.set_paused(sequence.id, true);
        }
    }
    live.retain(|sequence| {
        let cancelled = sequence.job.cancel.is_some_and(|age| sequence.age > age);
        let done = sequence.outputs >= sequence.job.output || cancelled;
        if done {
            scheduler.finish(sequence.id);
        }
        !done
    });
}

proptest! {
    #[test]
    fn random_traffic_keeps_every_invariant_and_ends(
        jobs in prop::collection::vec(job(), 1..30), prefix_cache in prop::bool::weighted(0.8),
    ) {
        simulate(&jobs, prefix_cache);
    }
}

/// Runs `steps` steps in which nobody finishes; rows given to each tenant.
fn rows_by_tenant(scheduler: &mut Scheduler, steps: usize) -> BTreeMap<Arc<str>, usize> {
    let mut rows = BTreeMap::new();
    for _ in 0..steps {
        let plan = scheduler.schedule();
        for item in &plan.items {
            scheduler.complete(item);
            let tenant = Arc::clone(scheduler.entries[&item.id].key.tenant());
            *rows.entry(tenant).or_default() += item.rows;
            if item.completes {
                scheduler.finish(item.id);
            }
        }
    }
    rows
}

#[test]
fn within_a_tenant_the_first_comes_first() {
    let mut scheduler = Scheduler::new(LIMITS, 64);
    for id in 0..12 {
        scheduler.add(new(id, 0, (id % 3) as u8, 20));
    }
    let mut admitted = Vec::new();
    while scheduler.waiting() > 0 {
        let plan = scheduler.schedule();
        admitted.extend(plan.admitted.iter().map(|admitted| admitted.id.0));
        for item in &plan.items {
            scheduler.complete(item);
            if item.completes {
                scheduler.finish(item.id);
            }
        }
    }
    assert_eq!(admitted, (0..12).collect::<Vec<_>>());
}

#[test]
fn a_flood_of_one_tenant_does_not_hold_up_another() {
    let mut scheduler = Scheduler::new(LIMITS, 64);
    for id in 0..200 {
        scheduler.add(new(id, 0, 0, 20));
    }
    rows_by_tenant(&mut scheduler, 10);
    for id in 200..230 {
        scheduler.add(new(id, 1, 0, 20));
    }
    let rows = rows_by_tenant(&mut scheduler, 20);
    let (first, second) = (rows[&tenant(0)], rows[&tenant(1)]);
    assert!(
        first.abs_diff(second) <= 2 * LIMITS.max_num_batched_tokens,
        "{first} and {second} rows"
    );
}

/// Runs a planned step of which nothing fails.
fn step(scheduler: &mut Scheduler) -> Plan {
    let plan = scheduler.schedule();
    plan.items.iter().for_each(|item| scheduler.complete(item));
    plan
}

/// `(id, tokens found computed, by the prefix cache)`.
fn admitted(plan: &Plan) -> Vec<(u64, usize, bool)> {
    let facts = |admitted: &Admitted| (admitted.id.0, admitted.computed, admitted.cached);
    plan.admitted.iter().map(facts).collect()
}

#[test]
fn candidates_share_the_whole_blocks_of_their_prompt() {
    let mut scheduler = Scheduler::new(LIMITS, 64);
    let prompt = new(0, 0, 1, 40);
    for id in 0..3 {
        let prefix = (id > 0).then_some(Prefix {
            of: SequenceId(0),
            tokens: 39,
        });
        scheduler.add(NewSequence {
            id: SequenceId(id),
            prefix,
            ..prompt.clone()
        });
    }
    let first = step(&mut scheduler);
    assert_eq!(
        admitted(&first),
        [(0, 0, true)],
        "the others wait for the prefix"
    );
    step(&mut scheduler);
    scheduler.push_token(SequenceId(0), 1);
    let third = scheduler.schedule();
    assert_eq!(admitted(&third), [(1, 39, false), (2, 39, false)]);
    assert_eq!(
        third.copies.len(),
        2,
        "the block that is not full is copied"
    );
    assert_eq!(scheduler.blocks_used(), 3 + 1 + 1);
    assert_eq!(
        scheduler.block_table(SequenceId(1))[..2],
        scheduler.block_table(SequenceId(0))[..2]
    );
}

#[test]
fn a_finished_prefix_stays_until_it_was_shared() {
    let mut scheduler = Scheduler::new(
        SchedulerLimits {
            max_num_seqs: 1,
            prefix_cache: false,
            ..LIMITS
        },
        64,
    );
    let long = new(0, 0, 1, 30);
    scheduler.add(NewSequence {
        tokens: long.tokens[..20].to_vec(),
        ..long.clone()
    });
    scheduler.add(NewSequence {
        id: SequenceId(1),
        prefix: Some(Prefix {
            of: SequenceId(0),
            tokens: 16,
        }),
        ..long
    });
    step(&mut scheduler);
    scheduler.finish(SequenceId(0));
    assert_eq!(scheduler.blocks_used(), 2);
    let plan = scheduler.schedule();
    assert_eq!(admitted(&plan), [(1, 16, false)]);
    scheduler.finish(SequenceId(1));
    assert_eq!((scheduler.blocks_used(), scheduler.blocks_idle()), (0, 0));
}

#[test]
fn a_prompt_is_found_again_by_its_own_tenant_and_version_only() {
    let mut scheduler = Scheduler::new(
        SchedulerLimits {
            max_num_batched_tokens: 256,
            ..LIMITS
        },
        64,
    );
    let mut first = new(0, 0, 1, 50);
    first.reusable = 49;
    scheduler.add(first.clone());
    step(&mut scheduler);
    // While the first one runs, and after.
    for round in 0..2 {
        let ask = |id: u64, tenant, version, reusable| NewSequence {
            id: SequenceId(10 * (round + 1) + id),
            key: test_key(tenant, version),
            reusable,
            ..first.clone()
        };
        let asked = [
            ask(0, 0, 1, 49),
            ask(1, 1, 1, 49),
            ask(2, 0, 2, 49),
            ask(3, 0, 1, 40),
        ];
        let mut found = BTreeMap::new();
        for sequence in asked {
            let id = sequence.id;
            scheduler.add(sequence);
            let plan = scheduler.schedule();
            found.insert(id.0 % 10, plan.admitted[0].computed);
            // Nothing is booked, so that nobody leaves anything behind.
            scheduler.finish(id);
        }
        assert_eq!(found, BTreeMap::from([(0, 48), (1, 0), (2, 0), (3, 32)]));
        scheduler.finish(SequenceId(0));
    }
    assert_eq!(scheduler.blocks_used(), 0);
}

#[test]
fn a_preempted_sequence_finds_its_own_blocks_again() {
    let mut scheduler = Scheduler::new(
        SchedulerLimits {
            max_num_batched_tokens: 256,
            ..LIMITS
        },
        8,
    );
    scheduler.add(new(0, 0, 0, 60));
    scheduler.add(new(1, 0, 0, 40));
    step(&mut scheduler);
    assert_eq!(scheduler.running(), 2);
    let mut preempted = Vec::new();
    for token in 0.. {
        if !preempted.is_empty() {
            break;
        }
        scheduler.push_token(SequenceId(0), token);
        preempted = step(&mut scheduler).preempted;
    }
    assert_eq!(preempted, [SequenceId(1)]);
    scheduler.finish(SequenceId(0));
    assert_eq!(
        admitted(&scheduler.schedule()),
        [(1, 32, true)],
        "its whole blocks are there"
    );
}

/// Steps with `load` interactive sequences always there, each of `output` tokens; gives the steps in which a bulk
/// sequence had a row, and the interactive ones' longest wait for their first row in steps.
fn under_load(
    scheduler: &mut Scheduler,
    load: usize,
    output: usize,
    steps: usize,
) -> (Vec<usize>, usize) {
    let (mut next, mut alive) = (1000_u64, BTreeMap::<u64, (usize, usize, bool)>::new());
    let (mut served, mut longest) = (Vec::new(), 0);
    for at in 0..steps {
        while alive.len() < load {
            scheduler.add(new(next, (next % 3) as u8, 0, 10));
            alive.insert(next, (at, 0, false));
            next += 1;
        }
        let plan = step(scheduler);
        scheduler.check_integrity();
        for item in &plan.items {
            let Some((born, outputs, seen)) = alive.get_mut(&item.id.0) else {
                served.push(at);
                if item.completes {
                    scheduler.push_token(item.id, 7);
                }
                continue;
            };
            if !*seen {
                (*seen, longest) = (true, longest.max(at - *born));
            }
            if item.completes {
                *outputs += 1;
                scheduler.push_token(item.id, 7);
            }
            if *outputs == output {
                alive.remove(&item.id.0);
                scheduler.finish(item.id);
            }
        }
    }
    (served, longest)
}

#[test]
fn interactive_work_takes_the_places_of_bulk_work_at_once() {
    let mut scheduler = Scheduler::new(LIMITS, 256);
    for id in 0..8 {
        scheduler.add(bulk(id, 0, 4));
    }
    for _ in 0..3 {
        let plan = step(&mut scheduler);
        for item in plan.items.iter().filter(|item| item.completes) {
            scheduler.push_token(item.id, 7);
        }
    }
    assert_eq!(
        scheduler.running(),
        LIMITS.max_num_seqs,
        "bulk work takes what nobody else wants"
    );
    scheduler.add(new(100, 1, 0, 6));
    let plan = scheduler.schedule();
    assert_eq!(
        plan.preempted,
        [SequenceId(4)],
        "the last admitted gives way"
    );
    assert_eq!(admitted(&plan), [(100, 0, true)]);
    let (_, longest) = under_load(&mut scheduler, 2, 5, 400);
    assert!(
        longest <= 1,
        "with free places under bulk, an interactive sequence waited {longest} steps"
    );
}

#[test]
fn bulk_work_goes_on_under_any_interactive_load() {
    let mut scheduler = Scheduler::new(LIMITS, 256);
    for id in 0..3 {
        scheduler.add(bulk(id, 0, 20));
    }
    // Three times as many as there are places, so that one waits in every step.
    let output = 6;
    let (served, _) = under_load(&mut scheduler, 3 * LIMITS.max_num_seqs, output, 1000);
    let longest = served.windows(2).map(|pair| pair[1] - pair[0]).max();
    // The promoted one waits for the next place, which is there when an interactive sequence ends.
    let bound = BULK_PATIENCE as usize + output + 20;
    assert!(served[0] <= bound, "the first row in step {}", served[0]);
    assert!(
        longest.unwrap() <= bound,
        "{longest:?} steps without a row, the bound is {bound}"
    );
    assert!(
        served.len() > 500,
        "a promoted sequence keeps its place: {} rows in 1000 steps",
        served.len()
    );
}
