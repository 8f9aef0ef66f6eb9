//! A job as it is told: its state, its progress, and the numbered events that a watcher sees.
//!
//! These are the stored forms too. Numbers count from 1 without gaps; the last event of a job brings its final state.

use serde::{Deserialize, Serialize};

use super::classification::ClassificationResult;
use super::ladder::FirstRung;
use super::spec::JobSpec;
use crate::names::JobName;

/// Where a job is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum JobState {
    /// Waits for its turn.
    Queued,
    /// Reads and tokenizes its data.
    Preparing,
    /// Trains.
    Running,
    /// Its version is live.
    Succeeded,
    /// Ended by an error.
    Failed,
    /// Ended by a call of Cancel.
    Cancelled,
    /// Put aside by a call of Pause.
    Paused,
}

impl JobState {
    /// The word in the database.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Queued => "queued",
            Self::Preparing => "preparing",
            Self::Running => "running",
            Self::Succeeded => "succeeded",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
            Self::Paused => "paused",
        }
    }

    /// The state that a word of the database means.
    pub fn parse(word: &str) -> Option<Self> {
        [
            Self::Queued,
            Self::Preparing,
            Self::Running,
            Self::Succeeded,
            Self::Failed,
            Self::Cancelled,
            Self::Paused,
        ]
        .into_iter()
        .find(|state| state.as_str() == word)
    }

    /// Whether nothing follows.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Succeeded | Self::Failed | Self::Cancelled)
    }
}

impl std::fmt::Display for JobState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a job failed: a reason of the error table and a text that names field, value and limit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobFailure {
    /// UPPER_SNAKE constant.
    pub reason: String,
    /// For people.
    pub message: String,
    /// Whether the request was at fault rather than the server.
    pub by_request: bool,
}

/// How far a job is.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Progress {
    /// Steps done, as far as events were stored.
    pub step: u64,
    /// Steps in all.
    pub total_steps: u64,
    /// Passes over the data done.
    pub epoch: f64,
    /// The last step's loss.
    pub loss: Option<f64>,
    /// The last evaluation's loss.
    pub valid_loss: Option<f64>,
    /// The last evaluation's accuracy.
    pub valid_accuracy: Option<f64>,
    /// The last evaluation's perplexity, of raw text.
    pub valid_perplexity: Option<f64>,
    /// The step of the best evaluation.
    pub best_step: Option<u64>,
    /// The loss of what training starts from.
    pub baseline_loss: Option<f64>,
    /// Its accuracy.
    pub baseline_accuracy: Option<f64>,
    /// The step of the last evaluation.
    pub evaluated_step: Option<u64>,
    /// The step of the last diagnosis.
    pub diagnosed_step: Option<u64>,
    /// Tokens so far.
    pub tokens: u64,
    /// Tokens a second over the last steps.
    pub tokens_per_second: f64,
    /// Estimated seconds to the end.
    pub eta_seconds: Option<f64>,
    /// The head that a ladder's first rung published.
    pub first_rung: Option<FirstRung>,
}

/// An evaluation of a job's result, or of what it started from.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Measured {
    /// The step after which it was made.
    pub step: u64,
    /// Its loss.
    pub loss: f64,
    /// Its accuracy; a number has none.
    pub accuracy: Option<f64>,
    /// Mean F1 over labels, of what is kept.
    #[serde(default)]
    pub macro_f1: Option<f64>,
    /// Its perplexity, of raw text.
    pub perplexity: Option<f64>,
}

/// What came of a job and what it cost. Times are those since its last start.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Outcome {
    /// What training started from.
    pub baseline: Option<Measured>,
    /// What the version holds.
    pub result: Option<Measured>,
    /// The step whose weights the version holds.
    pub kept_step: u64,
    /// Evaluations without improvement ended it.
    pub stopped_early: bool,
    /// Numbers that were trained.
    pub trained_parameters: u64,
    /// Bytes of the version's files.
    pub size_bytes: u64,
    /// Bytes that it held at most, beside the base.
    pub peak_bytes: u64,
    /// Seconds in which it held the machine.
    pub held_seconds: f64,
    /// Seconds in which it waited while others had it.
    pub waited_seconds: f64,
    /// Turns.
    pub quanta: u64,
    /// Seconds of the longest.
    pub longest_quantum_seconds: f64,
    /// Passes that it shared with other jobs.
    pub shared_passes: u64,
    /// What training added to the time of running requests' steps, as a share of it.
    pub tpot_impact: f64,
}

/// Counts of a job's data.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DataStats {
    /// Examples to train on.
    pub train_examples: u64,
    /// Examples to measure on.
    pub valid_examples: u64,
    /// Tokens of one pass.
    pub train_tokens: u64,
    /// Targets of one pass: label tokens, or examples.
    pub train_targets: u64,
    /// Names of the head's rows.
    pub labels: Vec<String>,
}

/// What a run may notice about itself.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finding {
    /// Modules without a gradient, by their paths.
    SilentModules(Vec<String>),
    /// A loss that runs away.
    Diverging,
}

/// What happened.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Happening {
    /// The state changed.
    State {
        /// Before; `None` for the first event.
        from: Option<JobState>,
        /// After.
        to: JobState,
        /// Why, in words.
        reason: String,
        /// The error of a failed job.
        error: Option<JobFailure>,
    },
    /// An optimizer step is done.
    Step {
        /// Its number, from 1.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Before clipping.
        grad_norm: f64,
        /// Its learning rate.
        learning_rate: f64,
        /// Its tokens.
        tokens: u64,
    },
    /// An evaluation is done.
    Evaluation {
        /// Steps done.
        step: u64,
        /// Its loss.
        loss: f64,
        /// Its accuracy; regression has none.
        #[serde(default)]
        accuracy: Option<f64>,
        /// Its macro F1, of a head that chooses labels.
        #[serde(default)]
        macro_f1: Option<f64>,
        /// Its perplexity, of raw text.
        perplexity: Option<f64>,
        /// Better than all before.
        best: bool,
    },
    /// The run noticed something about itself.
    Diagnosis {
        /// The step at which.
        step: u64,
        /// What.
        finding: Finding,
        /// The same in words, with the next step.
        message: String,
    },
    /// A checkpoint is durable.
    Checkpoint {
        /// Steps done.
        step: u64,
        /// Its bytes.
        size: u64,
    },
    /// The new version is live.
    Published {
        /// Canonical name.
        version: String,
        /// Digest, hex.
        digest: String,
        /// Aliases that moved.
        aliases: Vec<String>,
        /// The step whose weights it holds.
        step: u64,
    },
}

/// One numbered event.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its number within the job, from 1.
    pub sequence: u64,
    /// Unix milliseconds.
    pub time: i64,
    /// The job's state after it.
    pub state: JobState,
    /// The job's progress after it.
    pub progress: Progress,
    /// What happened.
    pub happening: Happening,
}

/// A durable job.
#[derive(Debug, Clone)]
pub struct Job {
    /// Its name.
    pub name: JobName,
    /// What it does.
    pub spec: JobSpec,
    /// Where it is.
    pub state: JobState,
    /// How far it is.
    pub progress: Progress,
    /// Counts of its data.
    pub stats: DataStats,
    /// Canonical name of the version that it made.
    pub version: Option<String>,
    /// Why it failed.
    pub error: Option<JobFailure>,
    /// What its head is worth, once it has succeeded.
    pub result: Option<ClassificationResult>,
    /// Number of its last event.
    pub last_sequence: u64,
    /// How often it was started.
    pub attempt: u32,
    /// Whether it was told to end.
    pub cancel_asked: bool,
    /// Whether it was told to pause.
    pub pause_asked: bool,
    /// What came of it and what it cost.
    pub outcome: Option<Outcome>,
    /// Unix milliseconds.
    pub create_time: i64,
    /// When it first ran.
    pub start_time: Option<i64>,
    /// When it ended.
    pub end_time: Option<i64>,
}
