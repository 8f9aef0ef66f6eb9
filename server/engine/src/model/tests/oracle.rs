//! Every family against candle-transformers' model of the same random weights.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor};
use candle_nn::{Activation, VarBuilder};
use candle_transformers::models::{llama, mistral, qwen2, qwen3};
use espalier_adapters::ops::Reference;

use super::*;

fn builder(config: &ModelConfig, weights: &ModelWeights) -> VarBuilder<'static> {
    let mut tensors: HashMap<String, Tensor> = weights
        .tensors(config)
        .map(|(name, shape, values)| {
            (
                name,
                Tensor::from_slice(values, shape, &Device::Cpu).unwrap(),
            )
        })
        .collect();
    if config.tie_embeddings {
        let embed = tensors["model.embed_tokens.weight"].clone();
        tensors.insert("lm_head.weight".to_owned(), embed);
    }
    VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu)
}

/// The last logits of a prompt, by candle.
fn candle_logits(config: &ModelConfig, weights: &ModelWeights, ids: &[u32]) -> Vec<f32> {
    let vb = builder(config, weights);
    let input = Tensor::new(ids, &Device::Cpu)
        .unwrap()
        .unsqueeze(0)
        .unwrap();
    let logits = match config.family {
        Family::Llama => llama_logits(config, vb, &input),
        Family::Mistral => {
            let config = mistral::Config {
                vocab_size: config.vocab,
                hidden_size: config.hidden,
                intermediate_size: config.intermediate,
                num_hidden_layers: config.layers,
                num_attention_heads: config.heads,
                head_dim: Some(config.head_dim),
                num_key_value_heads: config.kv_heads,
                hidden_act: Activation::Silu,
                max_position_embeddings: config.context_length,
                rms_norm_eps: f64::from(config.rms_eps),
                rope_theta: f64::from(config.rope.theta),
                // candle lets a token see `window` tokens before itself; transformers, and we, count itself in.
                sliding_window: config.sliding_window.map(|window| window - 1),
                use_flash_attn: false,
            };
            mistral::Model::new(&config, vb).unwrap().forward(&input, 0)
        }
        Family::Qwen2 => {
            let config = qwen2::Config {
                vocab_size: config.vocab,
                hidden_size: config.hidden,
                intermediate_size: config.intermediate,
                num_hidden_layers: config.layers,
                num_attention_heads: config.heads,
                num_key_value_heads: config.kv_heads,
                max_position_embeddings: config.context_length,
                sliding_window: config.context_length,
                max_window_layers: config.layers,
                tie_word_embeddings: config.tie_embeddings,
                rope_theta: f64::from(config.rope.theta),
                rms_norm_eps: f64::from(config.rms_eps),
                use_sliding_window: false,
                hidden_act: Activation::Silu,
            };
            qwen2::ModelForCausalLM::new(&config, vb)
                .unwrap()
                .forward(&input, 0)
        }
        Family::Qwen3 => {
            let config = qwen3::Config {
                vocab_size: config.vocab,
                hidden_size: config.hidden,
                intermediate_size: config.intermediate,
                num_hidden_layers: config.layers,
                num_attention_heads: config.heads,
                head_dim: config.head_dim,
                attention_bias: false,
                num_key_value_heads: config.kv_heads,
                max_position_embeddings: config.context_length,
                sliding_window: None,
                max_window_layers: config.layers,
                tie_word_embeddings: config.tie_embeddings,
                rope_theta: f64::from(config.rope.theta),
                rms_norm_eps: f64::from(config.rms_eps),
                use_sliding_window: false,
                hidden_act: Activation::Silu,
            };
            qwen3::ModelForCausalLM::new(&config, vb)
                .unwrap()
                .forward(&input, 0)
        }
    };
    logits.unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

fn llama_logits(
    config: &ModelConfig,
    vb: VarBuilder<'_>,
    input: &Tensor,
) -> candle_core::Result<Tensor> {
    let rope_scaling = match config.rope.scaling {
        RopeScaling::Llama3 {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_context_length,
        } => Some(llama::Llama3RopeConfig {
            factor,
            low_freq_factor,
            high_freq_factor,
            original_max_position_embeddings: original_context_length,
            rope_type: llama::Llama3RopeType::Llama3,
        }),
        _ => None,
    };
    let theirs = llama::Config {
        hidden_size: config.hidden,
        intermediate_size: config.intermediate,
        vocab_size: config.vocab,
        num_hidden_layers: config.layers,
        num_attention_heads: config.heads,
        num_key_value_heads: config.kv_heads,
        use_flash_attn: false,
        rms_norm_eps: f64::from(config.rms_eps),
        rope_theta: config.rope.theta,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling,
        max_position_embeddings: config.context_length,
        tie_word_embeddings: config.tie_embeddings,
    };
    let mut cache = llama::Cache::new(false, DType::F32, &theirs, &Device::Cpu)?;
    llama::Llama::load(vb, &theirs)?.forward(input, 0, &mut cache)
}

fn check<O: Ops<T = f32>>(on: &Under<O>, config: &ModelConfig) {
    let weights = random_weights(config, 5);
    let ids = random_ids(config, 40, 6);
    let (fast, plain) = (on.model(config, 5), random_model(config, 5));
    let ours = on.logits(&fast, &ids, None);
    let reference = Under::<Reference<f32>>::default().logits(&plain, &ids, None);
    assert!(
        distance(&ours, &reference) < on.tolerance,
        "{:?}: fast and plain operations",
        config.family
    );
    for len in [1, 2, 6, 7, 23, 40] {
        let theirs = candle_logits(config, &weights, &ids[..len]);
        let ours = &ours[(len - 1) * config.vocab..len * config.vocab];
        let off = distance(ours, &theirs);
        assert!(
            off < on.tolerance,
            "{:?} after {len} tokens: off by {off}",
            config.family
        );
    }
}

#[test]
fn every_family() {
    every_family_is_candles(&host());
}

pub(crate) fn every_family_is_candles<O: Ops<T = f32>>(on: &Under<O>) {
    for family in FAMILIES {
        check(on, &(on.sizes)(family));
    }
}

#[test]
fn heads_tied_and_not_and_llama_3_rope() {
    let on = host();
    let tied = small(Family::Llama);
    check(
        &on,
        &ModelConfig {
            tie_embeddings: false,
            ..tied.clone()
        },
    );
    check(
        &on,
        &ModelConfig {
            tie_embeddings: true,
            ..small(Family::Qwen2)
        },
    );
    let scaling = RopeScaling::Llama3 {
        factor: 8.0,
        low_freq_factor: 1.0,
        high_freq_factor: 4.0,
        original_context_length: 64,
    };
    let rope = RopeConfig {
        theta: 500.0,
        scaling,
    };
    let head = ModelConfig {
        heads: 3,
        kv_heads: 1,
        head_dim: 8,
        rope,
        ..tied
    };
    check(&on, &head);
    let plain = ModelConfig {
        rope: RopeConfig {
            theta: 500.0,
            scaling: RopeScaling::None,
        },
        ..head.clone()
    };
    let ids = random_ids(&head, 40, 6);
    let (scaled, plain) = (on.model(&head, 5), on.model(&plain, 5));
    let (scaled, plain) = (
        on.logits(&scaled, &ids, None),
        on.logits(&plain, &ids, None),
    );
    assert!(distance(&scaled, &plain) > 1e-2, "scaling changes nothing");
}

#[test]
fn a_window_hides_what_lies_before_it() {
    windows_hide_what_lies_before_them(&host());
}

pub(crate) fn windows_hide_what_lies_before_them<O: Ops>(on: &Under<O>) {
    let config = (on.sizes)(Family::Mistral);
    let open = ModelConfig {
        sliding_window: None,
        ..config.clone()
    };
    let ids = random_ids(&config, 20, 1);
    let (narrow, wide) = (on.model(&config, 2), on.model(&open, 2));
    let (narrow, wide) = (on.logits(&narrow, &ids, None), on.logits(&wide, &ids, None));
    let split = config.sliding_window.unwrap() * config.vocab;
    assert_eq!(
        narrow[..split],
        wide[..split],
        "inside the window both are the same"
    );
    assert!(distance(&narrow[split..], &wide[split..]) > 1e-2);
}
