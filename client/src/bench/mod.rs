//! The load tester behind `espalier bench`: what is sent when, who sends it, what is measured.
//!
//! A [`workload`] turns an index into a request, always the same for one seed. [`schedule`] says
//! when requests are due; [`driver`] sends them at that moment, whatever has become of those
//! before, and counts their latency from it. [`record`] keeps what came back, [`summary`] turns
//! it into figures. Nothing here prints or reads arguments: that is `cli::bench`.

pub(crate) mod quantity;

pub(crate) mod arrival;
pub(crate) mod distribution;
pub(crate) mod popularity;
pub(crate) mod random;
pub(crate) mod schedule;
pub(crate) mod trace;

pub(crate) mod prompt;
pub(crate) mod workload;

pub(crate) mod beside;
pub(crate) mod driver;
pub(crate) mod target;

pub(crate) mod cpu;
pub(crate) mod record;
pub(crate) mod series;

pub(crate) mod compare;
pub(crate) mod histogram_log;
pub(crate) mod objective;
pub(crate) mod report;
pub(crate) mod search;
pub(crate) mod statistics;
pub(crate) mod summary;
