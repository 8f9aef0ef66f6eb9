//! What the device can do at best, measured with the operations that the model uses: copying, and multiplying matrices.

use std::time::Instant;

use espalier_adapters::ops::{Backend, Buffer, Ops, Uniform, Weight, WeightKind};
use espalier_engine::model::BaseSites;
use serde_json::json;

use super::base::Base;
use super::report::Report;

/// Bytes and operations a second.
#[derive(Clone, Copy, Default)]
pub(super) struct Ceilings {
    /// Bytes read and bytes written, together.
    pub(super) bandwidth: f64,
    /// Multiplications and additions.
    pub(super) products: f64,
}

/// Of so many tries the best counts.
const TRIES: usize = 8;

impl Ceilings {
    pub(super) fn measure(base: &Base, report: &Report) -> Self {
        let (ops, scale) = (base.model.ops(), base.scale);
        let mut found = Self::default();
        report.row(json!({"ceiling": "copy", "bytes": scale.copied}), || {
            found.bandwidth = bandwidth(ops, scale.copied);
            Ok(json!({"rate": found.bandwidth * 1e-9, "unit": "GB/s read and written"}))
        });
        report.row(json!({"ceiling": "product", "side": scale.side}), || {
            found.products = products(ops, scale.side);
            let bits = 8 * ops.working_bytes();
            Ok(json!({"rate": found.products * 1e-12, "unit": format!("TFLOP/s, {bits} bits")}))
        });
        found
    }
}

fn bandwidth(ops: &Backend, bytes: usize) -> f64 {
    let (mut from, mut to) = (ops.working(), ops.working());
    for buffer in [&mut from, &mut to] {
        ops.resize(buffer, bytes / ops.working_bytes());
        ops.clear(buffer.all_mut());
    }
    let seconds = best(ops, &mut || ops.copy(from.all(), to.all_mut()));
    2.0 * bytes as f64 / seconds
}

fn products(ops: &Backend, side: usize) -> f64 {
    let uniform = Uniform {
        kind: match ops.working_bytes() {
            2 => WeightKind::Bf16,
            _ => WeightKind::F32,
        },
        len: side * side,
        seed: 1,
        bound: 1.0,
    };
    let weight = ops.pack_weight(&Weight::Uniform(uniform), side, side);
    let (mut x, mut y) = (ops.working(), ops.working());
    ops.resize(&mut x, side * side);
    ops.resize(&mut y, side * side);
    let numbers: Vec<f32> = uniform.numbers().collect();
    ops.write(&numbers, x.all_mut());
    let seconds = best(ops, &mut || ops.matmul(x.all(), &weight, y.all_mut()));
    2.0 * (side as f64).powi(3) / seconds
}

/// Seconds of one run, the best of several.
fn best(ops: &Backend, run: &mut dyn FnMut()) -> f64 {
    run();
    ops.wait();
    let seconds = (0..TRIES).map(|_| {
        let began = Instant::now();
        run();
        ops.wait();
        began.elapsed().as_secs_f64()
    });
    seconds.fold(f64::INFINITY, f64::min)
}
