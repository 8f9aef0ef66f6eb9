//! What a dry run says of the rows and of the job, as a small table.

use crate::{
    cli::output::{Failure, Out, aligned, bytes, seconds_of, span},
    v1::{DataStatistics, TokenCounts, TrainingEstimate},
};

/// Labels that are shown; JSON has them all.
const SHOWN: usize = 20;

/// Prints what is known of a job's rows, and what it would take; nothing that is nothing.
pub(crate) fn print(
    out: Out,
    found: &DataStatistics,
    estimate: Option<&TrainingEstimate>,
) -> Result<(), Failure> {
    let mut rows = lines(found);
    rows.extend(estimate.into_iter().flat_map(prospects));
    for line in aligned(&[], &rows) {
        out.line(line)?;
    }
    Ok(())
}

/// What a job would take.
fn prospects(estimate: &TrainingEstimate) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    let mut row = |name: &str, text: String| rows.push(vec![name.to_owned(), text]);
    match &estimate.duration {
        Some(duration) => row(
            "would take",
            format!(
                "{} at {:.0} tokens a second, as tried just now",
                span(seconds_of(duration)),
                estimate.tokens_per_second
            ),
        ),
        None => row("would take", format!("not known: {}", estimate.unmeasured)),
    }
    if estimate.trained_parameters > 0 {
        let text = format!(
            "{} parameters, in {} at most",
            estimate.trained_parameters,
            bytes(estimate.peak_bytes)
        );
        row("would train", text);
    }
    match estimate.queue_position {
        0 => row("would start", "at once".to_owned()),
        jobs => row("would start", format!("after {jobs} others")),
    }
    rows
}

fn lines(found: &DataStatistics) -> Vec<Vec<String>> {
    let tokens = |counts: Option<TokenCounts>| {
        let counts = counts.unwrap_or_default();
        format!(
            "{} tokens: shortest {}, median {}, 95 % up to {}, longest {}",
            counts.total, counts.shortest, counts.median, counts.p95, counts.longest
        )
    };
    let mut rows = vec![(
        "to train on",
        format!("{} examples, {}", found.examples, tokens(found.tokens)),
    )];
    if found.validation_examples > 0 {
        let text = format!(
            "{} examples, {}",
            found.validation_examples,
            tokens(found.validation_tokens)
        );
        rows.push(("to measure on", text));
    }
    let learned = match found.label_counts.is_empty() {
        true => format!(
            "{} tokens, {} only read",
            found.learned_tokens, found.masked_tokens
        ),
        false => format!(
            "a label each of {}: {}",
            found.label_counts.len(),
            labels(found)
        ),
    };
    rows.push(("learned", learned));
    if found.too_long_rows > 0 {
        let text = format!(
            "{} rows over {} tokens, the longest {}; in {} the prompt alone fills them",
            found.too_long_rows,
            found.max_example_tokens,
            found.longest_refused_tokens,
            found.prompt_too_long_rows
        );
        rows.push(("too long", text));
    }
    if found.duplicate_rows > 0 {
        let text = format!("{} rows repeat an earlier one", found.duplicate_rows);
        rows.push(("duplicates", text));
    }
    if found.conflicting_labels > 0 {
        let text = format!("{} texts have another label too", found.conflicting_labels);
        rows.push(("conflicts", text));
    }
    if found.leaked_rows + found.nearly_leaked_rows > 0 {
        let text = format!(
            "{} rows to measure on are trained on too, {} more but for case and white space",
            found.leaked_rows, found.nearly_leaked_rows
        );
        rows.push(("leakage", text));
    }
    let row = |(name, text): (&str, String)| vec![name.to_owned(), text];
    rows.into_iter().map(row).collect()
}

/// The most frequent labels first.
fn labels(found: &DataStatistics) -> String {
    let mut labels: Vec<(&String, &u64)> = found.label_counts.iter().collect();
    labels.sort_by_key(|(name, count)| (std::cmp::Reverse(**count), *name));
    let mut parts: Vec<String> = labels
        .iter()
        .take(SHOWN)
        .map(|(name, count)| format!("{name} {count}"))
        .collect();
    if labels.len() > SHOWN {
        parts.push(format!("and {} more", labels.len() - SHOWN));
    }
    parts.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_told_and_nothing_else() {
        let counts = |total| TokenCounts {
            total,
            shortest: 3,
            median: 12,
            p95: 30,
            longest: 41,
        };
        let mut found = DataStatistics {
            examples: 20,
            tokens: Some(counts(260)),
            learned_tokens: 90,
            masked_tokens: 170,
            ..Default::default()
        };
        let told = |found: &DataStatistics| aligned(&[], &lines(found));
        let mut estimate = TrainingEstimate {
            duration: Some(prost_types::Duration {
                seconds: 75,
                nanos: 0,
            }),
            tokens_per_second: 512.4,
            trained_parameters: 2_442_240,
            peak_bytes: 100 << 20,
            ..Default::default()
        };
        let prospect = |estimate: &TrainingEstimate| aligned(&[], &prospects(estimate)).join("\n");
        assert_eq!(
            prospect(&estimate),
            "would take   1m15s at 512 tokens a second, as tried just now\n\
             would train  2442240 parameters, in 100.0 MiB at most\n\
             would start  at once"
        );
        (estimate.duration, estimate.queue_position) = (None, 3);
        estimate.unmeasured = "the engine is full".to_owned();
        assert!(prospect(&estimate).starts_with("would take   not known: the engine is full"));
        assert!(prospect(&estimate).ends_with("would start  after 3 others"));
        assert_eq!(
            told(&found),
            [
                "to train on  20 examples, 260 tokens: shortest 3, median 12, 95 % up to 30, longest 41",
                "learned      90 tokens, 170 only read",
            ]
        );
        found.validation_examples = 4;
        found.validation_tokens = Some(counts(50));
        (found.too_long_rows, found.max_example_tokens) = (3, 64);
        (found.longest_refused_tokens, found.prompt_too_long_rows) = (99, 2);
        (found.duplicate_rows, found.conflicting_labels) = (5, 6);
        (found.leaked_rows, found.nearly_leaked_rows) = (0, 7);
        for at in 0..22_u64 {
            found.label_counts.insert(format!("l{at:02}"), at / 10 + 1);
        }
        let text = told(&found).join("\n");
        for part in [
            "to measure on  4 examples, 50 tokens",
            "a label each of 22: l20 3, l21 3, l10 2",
            "l06 1, l07 1, and 2 more",
            "3 rows over 64 tokens, the longest 99; in 2 the",
            "duplicates     5 rows",
            "conflicts      6 texts",
            "0 rows to measure on are trained on too, 7 more but",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }
}
