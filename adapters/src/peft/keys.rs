//! Names of tensors in PEFT's adapter files, and what each one is.
//!
//! Source: `get_peft_model_state_dict` of PEFT 0.21: the adapter's name is left out, a magnitude has no `.weight`, a saved
//! module no `modules_to_save`. This file must not know shapes or values.

use super::full;
use crate::config::{BaseTensor, Site};
use crate::head::MAX_HIDDEN_LAYERS;

/// Before a module's path in the base, for causal models and sequence classifiers alike.
const PREFIX: &str = "base_model.model.";

/// The head's tensor.
pub(super) const SCORE: &str = "base_model.model.score.weight";

/// Before the number of a layer below the head, which PEFT has no name for.
const HIDDEN: &str = "base_model.model.score.hidden.";

/// A tensor of a hidden layer of a head.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum HiddenPart {
    /// [out, in].
    Weight,
    /// [out].
    Bias,
}

impl HiddenPart {
    pub(super) const ALL: [Self; 2] = [Self::Weight, Self::Bias];

    const fn suffix(self) -> &'static str {
        match self {
            Self::Weight => "weight",
            Self::Bias => "bias",
        }
    }
}

/// The name of a hidden layer's tensor.
pub(super) fn hidden_name(layer: usize, part: HiddenPart) -> String {
    format!("{HIDDEN}{layer}.{}", part.suffix())
}

/// One spelling for one layer: there are too few to need two digits.
fn hidden(name: &str) -> Option<Key> {
    let all = (0..MAX_HIDDEN_LAYERS).flat_map(|layer| HiddenPart::ALL.map(|part| (layer, part)));
    let mut all = all.filter(|(layer, part)| hidden_name(*layer, *part) == name);
    all.next().map(|(layer, part)| Key::Hidden(layer, part))
}

/// A tensor's part in the adaptation of a site.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Part {
    /// [r, in].
    A,
    /// [out, r].
    B,
    /// [out].
    Magnitude,
    /// (IA)3's vector: [out, 1], or [1, in] of a feedforward module.
    Scale,
}

impl Part {
    const ALL: [Self; 4] = [Self::A, Self::B, Self::Magnitude, Self::Scale];

    const fn suffix(self) -> &'static str {
        match self {
            Self::A => "lora_A.weight",
            Self::B => "lora_B.weight",
            Self::Magnitude => "lora_magnitude_vector",
            Self::Scale => "ia3_l",
        }
    }
}

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Key {
    /// One part of what changes one site.
    Site(usize, Site, Part),
    /// The delta of a whole tensor.
    Whole(BaseTensor),
    /// The classification head.
    Score,
    /// A layer below it.
    Hidden(usize, HiddenPart),
    /// Something PEFT writes and we cannot honour: (what it is, what to do).
    Unsupported(&'static str, &'static str),
    /// Nothing PEFT writes for this family of models: what to do.
    Unknown(&'static str),
}

/// The name of a site's tensor.
pub(super) fn name(layer: usize, site: Site, part: Part) -> String {
    format!("{PREFIX}{}.{}", site.path(layer), part.suffix())
}

/// What a tensor's name stands for.
pub(super) fn classify(name: &str) -> Key {
    let whole = || full::tensor(name).map(Key::Whole);
    site(name).or_else(whole).unwrap_or_else(|| match name {
        SCORE => Key::Score,
        _ => hidden(name).unwrap_or_else(|| refuse(name)),
    })
}

fn site(name: &str) -> Option<Key> {
    let rest = name.strip_prefix(PREFIX)?.strip_prefix("model.layers.")?;
    let (number, rest) = rest.split_once('.')?;
    // One spelling for one layer: no sign, no leading zero, or two names could mean one tensor.
    let canonical = number == "0" || number.len() <= 6 && !number.starts_with('0');
    let layer = number
        .bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| number.parse().ok())??;
    let (block, rest) = rest.split_once('.')?;
    let (module, suffix) = rest.split_once('.')?;
    let site = Site::from_module(module).filter(|s| canonical && s.block() == block)?;
    let part = Part::ALL.into_iter().find(|p| p.suffix() == suffix)?;
    Some(Key::Site(layer, site, part))
}

fn refuse(name: &str) -> Key {
    let contains = |part: &str| name.contains(part);
    if name.ends_with(".lora_B.bias") {
        Key::Unsupported("a bias on B", "train with lora_bias=False")
    } else if contains("lora_embedding_") {
        Key::Unsupported(
            "LoRA on the embedding",
            "leave embed_tokens out of target_modules",
        )
    } else if contains("lm_head.lora_") {
        Key::Unsupported(
            "LoRA on the output head",
            "leave lm_head out of target_modules",
        )
    } else if contains("embed_tokens.") || contains("lm_head.") {
        let next = "train without them in modules_to_save, and do not resize the vocabulary";
        Key::Unsupported("a saved embedding or output head", next)
    } else if contains(".classifier.") || contains(".score.bias") || contains(".score.dense") {
        let next = "use a model whose head is one linear layer 'score' without bias";
        Key::Unsupported("a head other than one 'score' matrix", next)
    } else if contains("modules_to_save.") || contains(".default.") {
        Key::Unknown(
            "this looks like a training checkpoint: write the adapter with save_pretrained",
        )
    } else if contains("ia3_l") {
        Key::Unknown(
            "(IA)3 is supported on q, k, v, o, gate, up and down projections of the decoder's layers",
        )
    } else if contains("lora_A") || contains("lora_B") || contains("lora_magnitude") {
        Key::Unknown(
            "LoRA is supported on q, k, v, o, gate, up and down projections of the decoder's layers",
        )
    } else if !name.starts_with(PREFIX) {
        Key::Unknown(
            "tensors of an adapter begin with 'base_model.model.': write it with save_pretrained",
        )
    } else {
        Key::Unknown("remove it, or train without what it belongs to")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_read_back_as_what_they_were_written_for() {
        for site in Site::ALL {
            for part in Part::ALL {
                for layer in [0, 7, 10, 123_456] {
                    assert_eq!(
                        classify(&name(layer, site, part)),
                        Key::Site(layer, site, part)
                    );
                }
            }
        }
        assert_eq!(classify(SCORE), Key::Score);
        let golden = "base_model.model.model.layers.29.mlp.down_proj.lora_magnitude_vector";
        assert_eq!(classify(golden), Key::Site(29, Site::Down, Part::Magnitude));
    }

    #[test]
    fn other_spellings_of_a_layer_or_block_are_not_names() {
        for name in [
            "base_model.model.model.layers.01.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.+1.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.1234567.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.1.mlp.q_proj.lora_A.weight",
            "base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight",
            "base_model.model.model.layers.1.self_attn.q_proj.lora_magnitude_vector.weight",
            "model.layers.1.self_attn.q_proj.lora_A.weight",
            "base_model.model.model.layers.1.self_attn.q_proj",
            "",
        ] {
            assert!(matches!(classify(name), Key::Unknown(_)), "{name}");
        }
    }

    #[test]
    fn what_peft_writes_and_we_do_not_honour_is_named() {
        for (name, what) in [
            (
                "base_model.model.model.layers.1.self_attn.q_proj.lora_B.bias",
                "bias",
            ),
            (
                "base_model.model.model.embed_tokens.lora_embedding_A",
                "embedding",
            ),
            ("base_model.model.lm_head.lora_A.weight", "output head"),
            (
                "base_model.model.model.embed_tokens.weight",
                "saved embedding",
            ),
            ("base_model.model.classifier.weight", "head other"),
        ] {
            let key = classify(name);
            assert!(
                matches!(key, Key::Unsupported(found, _) if found.contains(what)),
                "{name}: {key:?}"
            );
        }
    }
}
