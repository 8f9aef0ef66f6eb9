//! The scheduler against random traffic: budgets, order, fairness, and that everything ends.

#![allow(clippy::unwrap_used, reason = "a failed unwrap is a failed test")]

use std::collections::BTreeSet;

use espalier_adapters::version::VersionDigest;
use proptest::prelude::*;

use super::*;

const LIMITS: SchedulerLimits = SchedulerLimits {
    max_num_seqs: 5,
    max_num_batched_tokens: 24,
    prefill_chunk_tokens: 9,
};
const BLOCKS: usize = 8;

fn key(tenant: u8, version: u8) -> Arc<CacheKey> {
    let version = (version > 0).then(|| VersionDigest::from_bytes([version; 32]));
    Arc::new(CacheKey {
        tenant: format!("t{tenant}").into(),
        version,
    })
}

fn new(id: u64, tenant: u8, version: u8, tokens: usize) -> NewSequence {
    NewSequence {
        id: SequenceId(id),
        key: key(tenant, version),
        tokens,
        prefix: None,
    }
}

#[derive(Clone, Debug)]
struct Job {
    tenant: u8,
    version: u8,
    prompt: usize,
    output: usize,
    /// Steps between the previous arrival and this one.
    gap: usize,
    /// Candidates that share the prompt.
    n: usize,
    /// After so many outputs the reader pauses for some steps.
    pause: Option<(usize, usize)>,
    /// Gone after so many steps in the system.
    cancel: Option<usize>,
}

fn job() -> impl Strategy<Value = Job> {
    (
        (0..3_u8, 0..3_u8, 1..70_usize, 1..50_usize),
        (0..6_usize, 1..4_usize),
        prop::option::weighted(0.2, (0..10_usize, 1..30_usize)),
        prop::option::weighted(0.15, 0..40_usize),
    )
        .prop_map(
            |((tenant, version, prompt, output), (gap, n), pause, cancel)| Job {
                tenant,
                version,
                prompt,
                output,
                gap,
                n,
                pause,
                cancel,
            },
        )
}

struct Live {
    id: SequenceId,
    job: Job,
    tokens: usize,
    computed: usize,
    outputs: usize,
    age: usize,
    paused_for: usize,
    has_paused: bool,
}

fn arrive(scheduler: &mut Scheduler, live: &mut Vec<Live>, next_id: &mut u64, job: &Job) {
    let mut parent = None;
    for _ in 0..job.n {
        let id = SequenceId(*next_id);
        *next_id += 1;
        let mut sequence = new(id.0, job.tenant, job.version, job.prompt);
        sequence.prefix = parent.map(|of| Prefix {
            of,
            tokens: job.prompt - 1,
        });
        parent.get_or_insert(id);
        scheduler.add(sequence);
        live.push(Live {
            id,
            job: job.clone(),
            tokens: job.prompt,
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
    let versions: Vec<_> = plan
        .items
        .iter()
        .map(|item| scheduler.entries[&item.id].key.version)
        .collect();
    assert!(versions.is_sorted(), "one version's rows stand together");
    let ids: BTreeSet<_> = plan.items.iter().map(|item| item.id).collect();
    assert_eq!(ids.len(), plan.items.len(), "a sequence has rows once");
    for id in &plan.preempted {
        live.iter_mut()
            .find(|live| live.id == *id)
            .unwrap()
            .computed = 0;
        assert!(!ids.contains(id), "a victim has no rows");
    }
    for (id, cached) in &plan.admitted {
        live.iter_mut()
            .find(|live| live.id == *id)
            .unwrap()
            .computed = *cached;
    }
    let is_decode = |item: &&ScheduledSequence| item.rows == 1 && item.start > 0 && item.completes;
    let admitted = |item: &&ScheduledSequence| plan.admitted.iter().any(|(id, _)| *id == item.id);
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
        assert!(item.rows >= 1 && item.start + item.rows <= sequence.tokens);
        assert_eq!(item.completes, item.start + item.rows == sequence.tokens);
        assert_eq!(sequence.paused_for, 0, "a paused sequence has no rows");
        assert!(scheduler.block_table(item.id).len() >= blocks_for(item.start + item.rows));
        sequence.computed = item.start + item.rows;
    }
}

/// Runs all jobs to their end; panics when an invariant breaks or when nothing moves.
fn simulate(jobs: &[Job]) {
    let mut scheduler = Scheduler::new(LIMITS, BLOCKS);
    let (mut live, mut next_id, mut arrivals) = (Vec::<Live>::new(), 0, jobs.iter().peekable());
    let mut until_next = arrivals.peek().map_or(0, |job| job.gap);
    let work: usize = jobs
        .iter()
        .map(|job| job.n * (job.prompt + job.output) * 3 + job.gap + 60)
        .sum();
    for step in 0.. {
        // Preemption repeats work: the bound is generous, but a bound.
        assert!(step < work * 4 + 1000, "{} sequences never end", live.len());
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
        scheduler.complete(&plan);
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
    for item in plan.items.iter().filter(|item| item.completes) {
        let sequence = live.iter_mut().find(|live| live.id == item.id).unwrap();
        sequence.outputs += 1;
        if sequence.outputs < sequence.job.output {
            sequence.tokens += 1;
            scheduler.push_token(item.id);
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
    fn random_traffic_keeps_every_invariant_and_ends(jobs in prop::collection::vec(job(), 1..30)) {
        simulate(&jobs);
    }
}

/// Runs `steps` steps in which nobody finishes; rows given to each tenant.
fn rows_by_tenant(scheduler: &mut Scheduler, steps: usize) -> BTreeMap<Arc<str>, usize> {
    let mut rows = BTreeMap::new();
    for _ in 0..steps {
        let plan = scheduler.schedule();
        scheduler.complete(&plan);
        for item in &plan.items {
            let tenant = Arc::clone(&scheduler.entries[&item.id].key.tenant);
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
        admitted.extend(plan.admitted.iter().map(|(id, _)| id.0));
        scheduler.complete(&plan);
        for item in plan.items.iter().filter(|item| item.completes) {
            scheduler.finish(item.id);
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
    let (first, second) = (rows[&Arc::from("t0")], rows[&Arc::from("t1")]);
    assert!(
        first.abs_diff(second) <= 2 * LIMITS.max_num_batched_tokens,
        "{first} and {second} rows"
    );
}

#[test]
fn candidates_share_the_whole_blocks_of_their_prompt() {
    let mut scheduler = Scheduler::new(LIMITS, 64);
    scheduler.add(new(0, 0, 1, 40));
    for id in 1..3 {
        let prefix = Some(Prefix {
            of: SequenceId(0),
            tokens: 39,
        });
        scheduler.add(NewSequence {
            prefix,
            ..new(id, 0, 1, 40)
        });
    }
    let first = scheduler.schedule();
    assert_eq!(
        first.admitted,
        [(SequenceId(0), 0)],
        "the others wait for the prefix"
    );
    scheduler.complete(&first);
    let second = scheduler.schedule();
    scheduler.complete(&second);
    scheduler.push_token(SequenceId(0));
    let third = scheduler.schedule();
    assert_eq!(third.admitted, [(SequenceId(1), 39), (SequenceId(2), 39)]);
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
            ..LIMITS
        },
        64,
    );
    scheduler.add(new(0, 0, 1, 20));
    scheduler.add(NewSequence {
        prefix: Some(Prefix {
            of: SequenceId(0),
            tokens: 16,
        }),
        ..new(1, 0, 1, 30)
    });
    let plan = scheduler.schedule();
    scheduler.complete(&plan);
    scheduler.finish(SequenceId(0));
    assert_eq!(scheduler.blocks_used(), 2);
    let plan = scheduler.schedule();
    assert_eq!(plan.admitted, [(SequenceId(1), 16)]);
    scheduler.finish(SequenceId(1));
    assert_eq!(scheduler.blocks_used(), 0);
}
