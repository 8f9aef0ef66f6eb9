//! Histograms in a file that other tools read (HdrHistogram's interval log, V2 compressed, one
//! tagged histogram a metric, microseconds), and several such files as one. The counts of the
//! test stand in a comment, as JSON.

use std::time::{Duration, SystemTime};

use base64::{Engine, prelude::BASE64_STANDARD as BASE64};
use hdrhistogram::serialization::{
    Deserializer, V2DeflateSerializer,
    interval_log::{IntervalLogIterator, IntervalLogWriterBuilder, LogEntry, Tag},
};
use serde::{Deserialize, Serialize};

use crate::bench::{
    record::{Histograms, Metric},
    summary::Summary,
};

/// Begins the comment that holds the counts.
const COUNTS: &str = "[espalier-bench: ";

/// What histograms do not hold.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct Counts {
    /// Unix seconds at which the measured part began.
    pub(crate) began: f64,
    /// Seconds.
    pub(crate) duration: f64,
    pub(crate) completed: u64,
    pub(crate) failed: u64,
    pub(crate) warmup: u64,
    pub(crate) good: Option<u64>,
    pub(crate) input_tokens: u64,
    pub(crate) output_tokens: u64,
    pub(crate) cached_tokens: u64,
    /// Errors by reason.
    pub(crate) errors: std::collections::BTreeMap<String, u64>,
}

impl Counts {
    pub(crate) fn of(summary: &Summary, began: f64) -> Self {
        let failures = summary.failures.iter();
        Self {
            began,
            duration: summary.duration,
            completed: summary.completed,
            failed: summary.failed,
            warmup: summary.warmup,
            good: summary.good,
            input_tokens: summary.input_tokens,
            output_tokens: summary.output_tokens,
            cached_tokens: summary.cached_tokens,
            errors: failures
                .map(|(reason, found)| (reason.clone(), found.count))
                .collect(),
        }
    }

    /// Adds another process's. Processes that ran beside each other share their time.
    fn add(&mut self, other: &Self) {
        let end = (self.began + self.duration).max(other.began + other.duration);
        self.began = self.began.min(other.began);
        self.duration = end - self.began;
        self.completed += other.completed;
        self.failed += other.failed;
        self.warmup += other.warmup;
        self.good = self.good.zip(other.good).map(|(a, b)| a + b);
        self.input_tokens += other.input_tokens;
        self.output_tokens += other.output_tokens;
        self.cached_tokens += other.cached_tokens;
        for (reason, count) in &other.errors {
            *self.errors.entry(reason.clone()).or_default() += count;
        }
    }
}

/// A file's content.
pub(crate) fn write(counts: &Counts, histograms: &Histograms) -> Result<Vec<u8>, String> {
    let mut log = Vec::new();
    let mut serializer = V2DeflateSerializer::new();
    let json = serde_json::to_string(counts).map_err(|error| error.to_string())?;
    let begin = SystemTime::UNIX_EPOCH + Duration::from_secs_f64(counts.began.max(0.0));
    let mut writer = IntervalLogWriterBuilder::new()
        .add_comment("[espalier bench; values are microseconds]")
        .add_comment(&format!("{COUNTS}{json}]"))
        .with_start_time(begin)
        .with_base_time(begin)
        .begin_log_with(&mut log, &mut serializer)
        .map_err(|error| error.to_string())?;
    for metric in Metric::ALL {
        let cells = histograms.get(metric);
        let span = Duration::from_secs_f64(counts.duration);
        writer
            .write_histogram(cells, Duration::ZERO, span, Tag::new(metric.tag()))
            .map_err(|error| format!("{error:?}"))?;
    }
    Ok(log)
}

/// A file read back.
pub(crate) fn read(log: &[u8]) -> Result<(Counts, Histograms), String> {
    let text = String::from_utf8_lossy(log);
    let comment = text
        .lines()
        .find_map(|line| line.strip_prefix('#')?.strip_prefix(COUNTS));
    let json = comment
        .and_then(|line| line.trim_end().strip_suffix(']'))
        .ok_or("is no histogram file of `espalier bench --hist`")?;
    let counts = serde_json::from_str(json).map_err(|error| format!("its counts: {error}"))?;
    let mut histograms = Histograms::default();
    let mut deserializer = Deserializer::new();
    for entry in IntervalLogIterator::new(log) {
        let LogEntry::Interval(interval) = entry.map_err(|error| format!("{error:?}"))? else {
            continue;
        };
        let tag = interval.tag().map_or("", |tag| tag.as_str());
        // Metrics that a later version adds are left alone.
        let Some(metric) = Metric::ALL.into_iter().find(|metric| metric.tag() == tag) else {
            continue;
        };
        let bytes = BASE64
            .decode(interval.encoded_histogram())
            .map_err(|error| format!("{tag}: {error}"))?;
        let cells = deserializer
            .deserialize::<u64, _>(&mut bytes.as_slice())
            .map_err(|error| format!("{tag}: {error:?}"))?;
        let add = histograms.get_mut(metric).add(&cells);
        add.map_err(|error| format!("{tag}: {error:?}"))?;
    }
    Ok((counts, histograms))
}

/// Several files as one.
pub(crate) fn merge(files: &[(Counts, Histograms)]) -> Option<(Counts, Histograms)> {
    let (first, rest) = files.split_first()?;
    let (mut counts, mut histograms) = first.clone();
    for (other, cells) in rest {
        counts.add(other);
        for metric in Metric::ALL {
            histograms.get_mut(metric).add(cells.get(metric)).ok()?;
        }
    }
    Some((counts, histograms))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::{
        random::{Purpose, Random},
        statistics::{Figures, record},
    };

    fn file(seed: u64, began: f64) -> (Vec<u8>, Vec<u64>) {
        let mut random = Random::new(seed, Purpose::Arrivals(0));
        let mut histograms = Histograms::default();
        let values: Vec<u64> = (0..5000)
            .map(|_| (30_000.0 * random.normal().exp()) as u64 + 1)
            .collect();
        for value in &values {
            record(histograms.get_mut(Metric::Ttft), *value);
        }
        let counts = Counts {
            began,
            duration: 10.0,
            completed: 5000,
            output_tokens: 9,
            errors: [("X".to_owned(), 2)].into(),
            ..Counts::default()
        };
        (write(&counts, &histograms).unwrap(), values)
    }

    #[test]
    fn processes_merge_to_what_one_would_have_measured() {
        let ((one, mut values), (two, more)) = (file(1, 100.0), file(2, 104.0));
        let files = [read(&one).unwrap(), read(&two).unwrap()];
        let (counts, histograms) = merge(&files).unwrap();
        values.extend(more);
        let truth = Figures::of_values(&mut values).unwrap();
        let found = Figures::of(histograms.get(Metric::Ttft)).unwrap();
        assert_eq!(found.count, 10_000);
        for i in 0..truth.percentiles.len() {
            assert!((found.percentiles[i] / truth.percentiles[i] - 1.0).abs() < 2e-3);
        }
        assert_eq!((counts.completed, counts.output_tokens), (10_000, 18));
        assert!((counts.duration - 14.0).abs() < 1e-9, "they overlapped");
        assert_eq!(counts.errors["X"], 4);
        assert_eq!(histograms.get(Metric::Itl).len(), 0);
    }

    #[test]
    fn other_files_are_refused() {
        assert!(read(b"hello").is_err_and(|error| error.contains("--hist")));
        let (mut log, _) = file(1, 0.0);
        let at = log.len() - 20;
        log[at] = b'!';
        assert!(read(&log).is_err());
    }
}
