//! The tables of the vocabulary: what a token becomes, and what a state is compared with to become a token; the base's, or in a
//! segment's rows the segment's own.
//!
//! It must not know losses, or how tokens are drawn.

use std::collections::HashMap;
use std::ops::Range;

use super::{AdapterGrads, ResidentAdapter, exact_copy, numbers};
use crate::batch::{Pass, Segment, Thin};
use crate::config::BaseTensor;
use crate::ops::{ALIGNED_ROWS, Buffer, Ops};

/// The embedding table `[vocab, hidden]`, and the output head `[vocab, hidden]` where that is not the same.
#[derive(Debug)]
pub struct Vocabulary<O: Ops> {
    embed: O::Matrix,
    output: Option<O::Matrix>,
}

// === impl Vocabulary ===

impl<O: Ops> Vocabulary<O> {
    /// The tables of a base; without an output of its own the embedding table is the output too.
    pub fn new(embed: O::Matrix, output: Option<O::Matrix>) -> Self {
        Self { embed, output }
    }

    /// The frozen table that is this tensor, if the base has it.
    pub fn matrix(&self, tensor: BaseTensor) -> Option<&O::Matrix> {
        match tensor {
            BaseTensor::Embedding => Some(&self.embed),
            BaseTensor::Output => self.output.as_ref(),
            BaseTensor::Layer(..) | BaseTensor::FinalNorm => None,
        }
    }

    /// The frozen output head.
    pub fn output(&self) -> &O::Matrix {
        self.output.as_ref().unwrap_or(&self.embed)
    }

    /// Which tensor is the output head.
    pub fn output_tensor(&self) -> BaseTensor {
        match self.output {
            Some(_) => BaseTensor::Output,
            None => BaseTensor::Embedding,
        }
    }

    /// The output head that an adapter has in the base's place.
    pub fn own_output<'a>(&self, adapter: &'a ResidentAdapter<O>) -> Option<&'a O::Matrix> {
        adapter.whole.matrix(self.output_tensor())
    }

    /// `x [rows, hidden] = ` the tokens' rows.
    pub fn embed(&self, (ops, segments): (&O, &[Segment<O>]), tokens: &[u32], x: &mut O::Buf) {
        ops.gather(&self.embed, ops.ids(tokens), x.all_mut());
        let (_, width) = ops.dims(&self.embed);
        for (rows, own) in owned(segments, BaseTensor::Embedding) {
            let ids = ops.ids(&tokens[rows.clone()]);
            ops.gather(own, ids, x.part_mut(numbers(rows, width)));
        }
    }

    /// `logits [rows, vocab]`, exact, of states `[rows, hidden]` after the final norm.
    pub fn logits(
        &self,
        (ops, segments): (&O, &[Segment<O>]),
        states: &O::Buf,
        logits: &mut O::Buf,
    ) {
        let (vocab, width) = ops.dims(&self.embed);
        let (mut cuts, mut done) = (Vec::new(), 0);
        for (rows, own) in owned(segments, self.output_tensor()) {
            cuts.extend((done < rows.start).then_some((done..rows.start, self.output())));
            cuts.push((rows.clone(), own));
            done = rows.end;
        }
        let count = states.len() / width;
        cuts.extend((done < count).then_some((done..count, self.output())));
        // From behind: what a product writes before its own rows, the next one writes over.
        for (rows, matrix) in cuts.into_iter().rev() {
            let rows = rows.start / ALIGNED_ROWS * ALIGNED_ROWS..rows.end;
            let states = states.part(numbers(&rows, width));
            ops.matmul(states, matrix, logits.part_mut(numbers(&rows, vocab)));
        }
    }

    /// Whether a segment trains the embedding table.
    pub fn is_embedding_trained(&self, grads: &[Option<AdapterGrads<O>>]) -> bool {
        let trains = |grads: &AdapterGrads<O>| grads.delta(BaseTensor::Embedding).is_some();
        grads.iter().flatten().any(trains)
    }

    /// The gradients of the embedding tables that segments train: each row of `dx [rows, hidden]` onto its token's, in the rows'
    /// order. Where the table is the output too they are complete when they [settle](AdapterGrads::settle).
    pub fn embedding_gradients(
        &self,
        pass: &Pass<'_, O>,
        (tokens, dx): (&[u32], &O::Buf),
        grads: &mut [Option<AdapterGrads<O>>],
        thin: &mut Thin<O>,
    ) {
        let (ops, (vocab, width)) = (pass.ops, pass.ops.dims(&self.embed));
        for (segment, grads) in pass.segments.iter().zip(grads) {
            let Some(grads) = grads else { continue };
            let Some(place) = grads.delta(BaseTensor::Embedding) else {
                continue;
            };
            let Thin {
                direction: exact,
                exact_rows: some,
                ones,
                ..
            } = &mut *thin;
            let from = dx.part(numbers(&segment.rows, width));
            exact_copy(ops, from, (segment.rows.len(), width), (exact, ones));
            for Turn { rows, tokens } in turns(&tokens[segment.rows.clone()]) {
                ops.resize(some, rows.len() * width);
                ops.take_rows(exact.all(), ops.ids(&rows), some.all_mut());
                let table = match self.output {
                    Some(_) => grads.part_mut(place.clone()),
                    None => grads.looked_up(ops, vocab * width),
                };
                ops.add_rows(some.all(), ops.ids(&tokens), table);
            }
        }
    }
}

/// The segments with a tensor of their own: rows and that.
fn owned<O: Ops>(
    segments: &[Segment<O>],
    tensor: BaseTensor,
) -> impl Iterator<Item = (&Range<usize>, &O::Matrix)> {
    segments.iter().filter_map(move |segment| {
        let (adapter, _) = segment.adapters.parts().next()?;
        Some((&segment.rows, adapter.whole.matrix(tensor)?))
    })
}

/// Rows whose tokens all differ, and these.
#[derive(Debug, Default, PartialEq)]
struct Turn {
    rows: Vec<u32>,
    tokens: Vec<u32>,
}

/// The rows of tokens in turns: in the first stands each token's first row, in the next its second.
fn turns(tokens: &[u32]) -> Vec<Turn> {
    let mut turns: Vec<Turn> = Vec::new();
    let mut seen: HashMap<u32, usize> = HashMap::new();
    for (row, token) in tokens.iter().enumerate() {
        let count = seen.entry(*token).or_default();
        if *count == turns.len() {
            turns.push(Turn::default());
        }
        turns[*count].rows.push(row as u32);
        turns[*count].tokens.push(*token);
        *count += 1;
    }
    turns
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_token_stands_twice_in_a_turn_and_each_keeps_its_order() {
        let found = turns(&[7, 2, 7, 7, 3, 2]);
        let of = |rows: &[u32], tokens: &[u32]| Turn {
            rows: rows.to_vec(),
            tokens: tokens.to_vec(),
        };
        let expected = [
            of(&[0, 1, 4], &[7, 2, 3]),
            of(&[2, 5], &[7, 2]),
            of(&[3], &[7]),
        ];
        assert_eq!(found, expected);
        assert_eq!(turns(&[]), []);
    }
}
