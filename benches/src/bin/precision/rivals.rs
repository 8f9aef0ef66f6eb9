//! Our products beside candle's, plain and quantised, and with `--python` beside the libraries of `blas.py`: 1 and 512 rows by the model's largest projections, from weights that no cache holds.

use std::hint::black_box;
use std::process::Command;

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{Device, Module, Tensor};
use espalier_adapters::ops::{self, Cpu, Ops, Weight, WeightKind};
use espalier_benches::turns::last_json_line;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::{Args, Fallible, PROMPT, median, seconds};

/// Weights in turn, so that they come from memory as they do in a model and not from a cache.
const COLD_BYTES: usize = 128 << 20;

/// A product by weight number `turn`.
type Product<'a> = Box<dyn FnMut(usize) + 'a>;

/// Products of 1 and 512 rows with the model's largest projections, ours and candle's in turn.
pub(crate) fn table(args: &Args) -> Fallible<()> {
    println!("| weight, rows | path | ms | GB/s | GOP/s |");
    println!("|---|---|---|---|---|");
    for (outputs, inputs) in [(1536, 576), (576, 1536)] {
        for rows in [1, PROMPT] {
            products(args, outputs, inputs, rows)?;
        }
    }
    Ok(())
}

fn products(args: &Args, outputs: usize, inputs: usize, rows: usize) -> Fallible<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(3);
    let mut random =
        |len: usize| -> Vec<f32> { (0..len).map(|_| rng.random_range(-1.0..1.0)).collect() };
    let (weight, x) = (random(outputs * inputs), random(rows * inputs));
    let theirs_x = Tensor::from_slice(&x, (rows, inputs), &Device::Cpu)?;
    let theirs_weight = Tensor::from_slice(&weight, (outputs, inputs), &Device::Cpu)?;
    let ops = Cpu::default();
    let mut paths: Vec<(String, usize, Product<'_>)> = Vec::new();
    for kind in [
        WeightKind::F32,
        WeightKind::Bf16,
        WeightKind::F16,
        WeightKind::Q8_0,
    ] {
        let kept = Weight::F32(weight.clone()).rounded(kind, inputs);
        let one = ops.pack_weight(&kept, outputs, inputs);
        let bytes = ops.bytes(&one);
        let copies: Vec<_> = (0..(COLD_BYTES / bytes).max(1))
            .map(|_| one.clone())
            .collect();
        let (x, mut y) = (&x, vec![0.0; rows * outputs]);
        let run = move |turn: usize| ops.matmul(x, &copies[turn % copies.len()], &mut y);
        paths.push((format!("ours, {kind}"), bytes, Box::new(run)));
    }
    let bytes = 4 * outputs * inputs;
    let copies = (0..(COLD_BYTES / bytes).max(1))
        .map(|_| theirs_weight.copy())
        .collect::<Result<Vec<_>, _>>()?;
    let input = &theirs_x;
    let run = move |turn: usize| {
        let product = copies[turn % copies.len()]
            .t()
            .and_then(|weight| input.matmul(&weight));
        black_box(product.is_ok());
    };
    paths.push(("candle, f32".to_owned(), bytes, Box::new(run)));
    for kind in [GgmlDType::Q8_0, GgmlDType::Q4_1] {
        let one = QTensor::quantize(&theirs_weight, kind)?;
        let bytes = one.storage_size_in_bytes();
        let copies = (0..(COLD_BYTES / bytes).max(1))
            .map(|_| QMatMul::from_qtensor(QTensor::quantize(&theirs_weight, kind)?))
            .collect::<Result<Vec<_>, _>>()?;
        let run = move |turn: usize| {
            black_box(copies[turn % copies.len()].forward(input).is_ok());
        };
        paths.push((format!("candle, {kind:?}"), bytes, Box::new(run)));
    }
    let mut times: Vec<Vec<f64>> = paths.iter().map(|_| Vec::new()).collect();
    let repeats = if rows == 1 { 200 } else { 8 };
    for round in 0..args.rounds {
        for ((_, _, run), times) in paths.iter_mut().zip(&mut times) {
            let all = seconds(|| (0..repeats).for_each(|i| run(round * repeats + i)));
            times.push(all / repeats as f64);
        }
    }
    let line = |name: &str, bytes: usize, time: f64| {
        println!(
            "| [{outputs}, {inputs}] x {rows} | {name} | {:.3} | {:.1} | {:.0} |",
            time * 1e3,
            bytes as f64 / time * 1e-9,
            2.0 * (rows * inputs * outputs) as f64 / time * 1e-9
        );
    };
    for ((name, bytes, _), times) in paths.iter().zip(&times) {
        line(name, *bytes, median(times));
    }
    if let Some(python) = &args.python {
        let mut command = Command::new(python);
        command.arg(&args.blas);
        let numbers = [outputs, inputs, rows, repeats, args.rounds, ops::threads()];
        command.args(numbers.map(|number| number.to_string()));
        let found = last_json_line(command)?;
        for (name, time) in found.as_object().into_iter().flatten() {
            let time = time.as_f64().ok_or("blas.py prints seconds")?;
            line(&format!("{name}, f32"), bytes, time);
        }
    }
    Ok(())
}
