//! `tiny:SEED`: a random Llama that is built in, so that tests and first steps need no file. It has everything a real one has
//! (grouped heads, a tied head, a byte-level tokenizer with merges, a chat template) and starts in milliseconds.

use std::collections::BTreeMap;

use espalier_adapters::gguf::{Array, Metadata, Value};
use espalier_adapters::text::{Tokenizer, byte_spelling};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::config::{Family, ModelConfig, RopeConfig, RopeScaling};
use super::dtype::Dtype;
use super::error::ModelError;
use super::load::{self, LoadedModel, Parts, ReadWeights};
use super::weights::{Part, Slot};

const CONTROL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
const BOS: u64 = 1;
const EOS: u64 = 2;

/// Frequent pairs of English; each part is a byte or an earlier pair.
const MERGES: [&str; 33] = [
    "Ġ t", "h e", "Ġ a", "i n", "r e", "o n", "Ġt he", "e r", "Ġ s", "a t", "Ġ w", "Ġ o", "e n",
    "i t", "i s", "e s", "o r", "a n", "Ġ c", "Ġ b", "Ġ f", "in g", "e d", "a l", "Ġ p", "a r",
    "Ġt o", "Ġ m", "Ġa n", "Ġan d", "Ġ in", "l e", "Ġ h",
];

const CHATML: &str = "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}";

pub(super) fn load(spec: &str, seed: &str, dtype: Dtype) -> Result<LoadedModel, ModelError> {
    let seed: u64 = seed.parse().map_err(|_| ModelError::Spec {
        spec: spec.to_owned(),
        rule: "the seed must be a whole number from 0 to 18446744073709551615".to_owned(),
    })?;
    let metadata = tokenizer_metadata(spec);
    let tokenizer = Tokenizer::from_gguf(&metadata).map_err(|source| ModelError::Text {
        file: spec.to_owned(),
        source,
    })?;
    let mut config = config(tokenizer.vocab_size());
    let read = weights(spec, &mut config, seed, dtype)?;
    load::finish(Parts {
        file: spec.to_owned(),
        name: format!("tiny-{seed}"),
        config,
        read,
        tokenizer,
        jinja: Some(CHATML.to_owned()),
        stop_ids: vec![EOS as u32],
    })
}

fn config(vocab: usize) -> ModelConfig {
    ModelConfig {
        family: Family::Llama,
        layers: 2,
        hidden: 64,
        intermediate: 160,
        heads: 4,
        kv_heads: 2,
        head_dim: 16,
        vocab,
        rms_eps: 1e-5,
        rope: RopeConfig {
            theta: 10_000.0,
            scaling: RopeScaling::None,
        },
        context_length: 2048,
        tie_embeddings: true,
        qkv_bias: false,
        qk_norm: false,
        sliding_window: None,
    }
}

/// Uniform values in a range that keeps activations near one through any number of layers. The embedding is small beside what the
/// blocks add, or else, tied to the head, it would make every token predict itself.
fn weights(
    spec: &str,
    config: &mut ModelConfig,
    seed: u64,
    dtype: Dtype,
) -> Result<ReadWeights, ModelError> {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    let slots = Slot::all(config);
    let mut read = ReadWeights::new(config, dtype, &slots);
    for slot in slots {
        let shape = slot.shape(config);
        let (centre, spread) = match slot {
            Slot::Norm | Slot::Layer(_, Part::AttnNorm | Part::MlpNorm) => (1.0, 0.1),
            Slot::Embed => (0.0, 0.35),
            _ => (
                0.0,
                (3.0 / shape.last().copied().unwrap_or(1) as f32).sqrt(),
            ),
        };
        let count: usize = shape.iter().product();
        let values: Vec<f32> = (0..count)
            .map(|_| centre + spread * (2.0 * random.random::<f32>() - 1.0))
            .collect();
        read.add(config, slot, &slot.hf(), values.into())
            .map_err(|finding| ModelError::Weights {
                file: spec.to_owned(),
                findings: vec![finding],
            })?;
    }
    Ok(read)
}

/// The tokenizer in the words of a GGUF, so that it is built by the code that builds everybody's.
pub(super) fn tokenizer_metadata(file: &str) -> Metadata {
    let mut tokens: Vec<String> = CONTROL.map(str::to_owned).to_vec();
    tokens.extend((0..=255u8).map(|byte| byte_spelling(byte).to_string()));
    let merges = MERGES.map(str::to_owned).to_vec();
    tokens.extend(merges.iter().map(|merge| merge.replace(' ', "")));
    let mut kinds = vec![1; tokens.len()];
    kinds[..CONTROL.len()].fill(3);
    let values = [
        ("tokenizer.ggml.model", Value::String("gpt2".to_owned())),
        ("tokenizer.ggml.pre", Value::String("gpt-2".to_owned())),
        (
            "tokenizer.ggml.tokens",
            Value::Array(Array::Strings(tokens)),
        ),
        (
            "tokenizer.ggml.merges",
            Value::Array(Array::Strings(merges)),
        ),
        (
            "tokenizer.ggml.token_type",
            Value::Array(Array::Ints(kinds)),
        ),
        ("tokenizer.ggml.bos_token_id", Value::Unsigned(BOS)),
        ("tokenizer.ggml.eos_token_id", Value::Unsigned(EOS)),
        ("tokenizer.ggml.add_bos_token", Value::Bool(false)),
        ("tokenizer.chat_template", Value::String(CHATML.to_owned())),
    ];
    let values: BTreeMap<String, Value> = values
        .into_iter()
        .map(|(key, value)| (key.to_owned(), value))
        .collect();
    Metadata::new(file, values)
}
