//! What each format does to the model's answers: KL divergence, agreement and loss beside f32 over a text, with and without adapters.

use std::path::Path;
use std::sync::Arc;

use espalier_adapters::peft;
use espalier_adapters::text::Tokenizer;
use espalier_engine::model::{Dtype, Model, ResidentAdapter, load_as};
use serde_json::Value;

use super::{Args, Fallible, Side, best, logits};

/// Tokens of one piece of text.
const PIECE: usize = 256;

/// Sums over positions of one format beside f32.
#[derive(Clone, Default)]
struct Quality {
    positions: usize,
    divergence: f64,
    agreed: usize,
    loss: f64,
}

pub(crate) fn table(args: &Args) -> Fallible<()> {
    let tokenizer = load_as(&args.model, Dtype::Stored)?.tokenizer;
    let pieces = pieces(&tokenizer, args)?;
    println!(
        "{} pieces of {PIECE} tokens of {}",
        pieces.len(),
        args.text.display()
    );
    println!(
        "| dtype | adapter | matrices, MiB | KL to f32, nats | same top token | loss | loss beside f32 |"
    );
    println!("|---|---|---|---|---|---|---|");
    let mut exact = Side::load(&args.model, Dtype::F32)?;
    for dtype in &args.dtypes {
        let mut side = Side::load(&args.model, *dtype)?;
        let bytes = side.model.bytes() as f64 / f64::from(1 << 20);
        for adapter in std::iter::once(None).chain(args.adapter.iter().map(Some)) {
            let (resident, of_exact) = match adapter {
                None => (None, None),
                Some(dir) => (
                    Some(resident(dir, &side.model)?),
                    Some(resident(dir, &exact.model)?),
                ),
            };
            let (mut own, mut base) = (Quality::default(), Quality::default());
            for ids in &pieces {
                let wanted = exact.states(ids, 0, of_exact.as_ref());
                let found = side.states(ids, 0, resident.as_ref());
                compare(&exact, &side, ids, (&wanted, &found), (&mut base, &mut own));
            }
            let n = own.positions as f64;
            println!(
                "| {dtype} | {} | {bytes:.1} | {:.5} | {:.2} % | {:.4} | {:+.4} |",
                adapter
                    .and_then(|dir| dir.file_name())
                    .map_or("none".into(), |name| name.to_string_lossy()),
                own.divergence / n,
                100.0 * own.agreed as f64 / n,
                own.loss / n,
                (own.loss - base.loss) / n,
            );
        }
    }
    Ok(())
}

fn resident(dir: &Path, model: &Model) -> Fallible<Arc<ResidentAdapter>> {
    let limits = peft::Limits::default();
    let artifact = peft::from_dir(dir, &limits)?;
    let (_, weights, _) = peft::read(&artifact, &model.config().base_shape(), &limits)
        .map_err(|report| format!("{}: {report:?}", dir.display()))?;
    Ok(Arc::new(ResidentAdapter::build(&weights, model)?))
}

/// Adds one piece's positions: `f32` beside the format, position by position.
fn compare(
    exact: &Side,
    side: &Side,
    ids: &[u32],
    (wanted, found): (&[f32], &[f32]),
    (base, own): (&mut Quality, &mut Quality),
) {
    const ROWS: usize = 32;
    let config = exact.model.config();
    let rows = ids.len() - 1;
    for first in (0..rows).step_by(ROWS) {
        let count = ROWS.min(rows - first);
        let part = first * config.hidden..(first + count) * config.hidden;
        let p = logits(&exact.model, &wanted[part.clone()]);
        let q = logits(&side.model, &found[part]);
        let both = p
            .chunks_exact(config.vocab)
            .zip(q.chunks_exact(config.vocab));
        for (i, (p, q)) in both.enumerate() {
            let label = ids[first + i + 1] as usize;
            let (p_total, q_total) = (log_total(p), log_total(q));
            for (p, q) in p.iter().zip(q) {
                let (p, q) = (f64::from(*p) - p_total, f64::from(*q) - q_total);
                own.divergence += p.exp() * (p - q);
            }
            own.positions += 1;
            own.agreed += usize::from(best(p) == best(q));
            own.loss += q_total - f64::from(q[label]);
            base.loss += p_total - f64::from(p[label]);
        }
    }
}

/// The logarithm of the sum of exponentials.
fn log_total(logits: &[f32]) -> f64 {
    let highest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let total: f64 = logits.iter().map(|x| (f64::from(*x) - highest).exp()).sum();
    highest + total.ln()
}

/// Instructions with their outputs, one after the other, cut in pieces.
fn pieces(tokenizer: &Tokenizer, args: &Args) -> Fallible<Vec<Vec<u32>>> {
    let text = std::fs::read_to_string(&args.text)
        .map_err(|error| format!("{}: {error}", args.text.display()))?;
    let mut all = String::new();
    for line in text.lines() {
        let row: Value = serde_json::from_str(line)?;
        let fields = [
            &row["instruction"],
            &row["instances"][0]["input"],
            &row["instances"][0]["output"],
        ];
        for field in fields.into_iter().filter_map(Value::as_str) {
            all.push_str(field);
            all.push('\n');
        }
        all.push('\n');
    }
    let ids = tokenizer.encode(&all)?;
    Ok(ids
        .chunks_exact(PIECE)
        .take(args.pieces)
        .map(<[u32]>::to_vec)
        .collect())
}
