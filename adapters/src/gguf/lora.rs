//! An adapter as the GGUF file that llama.cpp loads beside a base (`--lora`), or the reason why it has no such form.
//!
//! Source of the form: `convert_lora_to_gguf.py` and `llama-adapter.cpp` of ggml-org/llama.cpp. Three things are not as in PEFT's
//! files. Rows of B of q and k stand where the base's own rows stand. One alpha holds for the whole file, over each tensor's own
//! rank, so that what rsLoRA and `alpha_pattern` say otherwise is multiplied into B. An alpha of zero means a factor of one.

use super::write::{NewTensor, NewValue, write};
use crate::config::{AdapterConfig, LoraConfig, Site};
use crate::weights::{AdapterWeights, ScoreHead, SiteAdapter};

/// What the file must know of the base that it is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoraBase {
    /// `general.architecture` of the base's own GGUF: `llama`, `qwen2`.
    pub architecture: &'static str,
    /// Whether the rows of q and k are in [`half_of_pair`]'s order there.
    pub paired_rows: bool,
    /// Width of a head.
    pub head_dim: usize,
}

/// A part of an adapter that a GGUF adapter cannot hold.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{subject}: a GGUF adapter cannot hold {what}; {next_step}")]
pub struct NotInGguf {
    /// Module or field.
    pub subject: String,
    /// What it is.
    pub what: String,
    /// What to do instead.
    pub next_step: &'static str,
}

const MERGE_INSTEAD: &str = "export it merged (espalierd merge), or as PEFT";

/// Where Hugging Face has the row that stands at `row` in a GGUF of the Llama kind, whose rope turns neighbours and not halves of a
/// head: `LlamaModel.permute` of llama.cpp's converter, read backwards.
#[must_use]
pub const fn half_of_pair(row: usize, head_dim: usize) -> usize {
    let (head, at) = (row / head_dim, row % head_dim);
    head * head_dim + (at % 2) * (head_dim / 2) + at / 2
}

/// The bytes of the file: an f32 tensor for each A and B, whatever type they are stored in here. `name` is for people.
///
/// # Errors
/// [`NotInGguf`] for a head, DoRA's magnitudes, (IA)3's vectors, and an adapter that has no low-rank part at all.
pub fn write_lora(
    name: &str,
    config: &AdapterConfig,
    weights: &AdapterWeights,
    base: &LoraBase,
) -> Result<Vec<u8>, NotInGguf> {
    refuse(weights)?;
    let alpha = config.lora().map_or(1.0, file_alpha);
    let mut tensors = Vec::with_capacity(2 * weights.sites.len());
    for (&(layer, site), adapter) in &weights.sites {
        let stem = format!("blk.{layer}.{}.weight", site_name(site));
        let (inputs, outputs) = (adapter.a.len() / adapter.r, adapter.b.len() / adapter.r);
        tensors.push(NewTensor {
            name: format!("{stem}.lora_a"),
            shape: vec![adapter.r, inputs],
            values: adapter.a.to_f32().into_owned(),
        });
        tensors.push(NewTensor {
            name: format!("{stem}.lora_b"),
            shape: vec![outputs, adapter.r],
            values: file_b(site, adapter, alpha, base),
        });
    }
    let metadata = [
        ("general.architecture", NewValue::Text(base.architecture)),
        ("general.type", NewValue::Text("adapter")),
        ("adapter.type", NewValue::Text("lora")),
        ("general.name", NewValue::Text(name)),
        ("adapter.lora.alpha", NewValue::F32(alpha)),
        ("general.quantization_version", NewValue::U32(2)),
    ];
    let mut bytes = Vec::new();
    // Memory has no way to refuse a write.
    let written = write(&mut bytes, &metadata, &tensors);
    debug_assert!(written.is_ok(), "a GGUF could not be written to memory");
    Ok(bytes)
}

fn refuse(weights: &AdapterWeights) -> Result<(), NotInGguf> {
    let refused = |subject: String, what: String, next_step| {
        Err(NotInGguf {
            subject,
            what,
            next_step,
        })
    };
    // By name, so that a new part does not compile before it has been thought of here.
    let AdapterWeights {
        sites,
        scales,
        full,
        head,
    } = weights;
    if let Some(ScoreHead { labels, .. }) = head {
        let what = format!("a classification head ({} labels)", labels.len());
        return refused("score".to_owned(), what, MERGE_INSTEAD);
    }
    if let Some((layer, site)) = scales.keys().next() {
        let what = "a vector of (IA)3, which multiplies what the base makes".to_owned();
        return refused(site.path(*layer), what, MERGE_INSTEAD);
    }
    if let Some(tensor) = full.keys().next() {
        let what = "a whole tensor that was unfrozen".to_owned();
        return refused(tensor.path(), what, MERGE_INSTEAD);
    }
    for (&(layer, site), adapter) in sites {
        // By name, so that a new part of a site does not compile before it has been thought of here.
        let SiteAdapter {
            r: _,
            scale: _,
            a: _,
            b: _,
            magnitude,
        } = adapter;
        if magnitude.is_some() {
            let what = "a DoRA magnitude, which scales rows of the base itself".to_owned();
            return refused(site.path(layer), what, MERGE_INSTEAD);
        }
    }
    if sites.is_empty() {
        let what = "an adapter without low-rank weights".to_owned();
        return refused(
            "target_modules".to_owned(),
            what,
            "there is nothing to export",
        );
    }
    Ok(())
}

/// The alpha of the whole file: the one that leaves B as it is wherever no pattern says otherwise. llama.cpp multiplies by alpha / r.
/// What f32 cannot hold, or would be read as "none", is left to B.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "ranks are far below 2^52, and the file holds an f32"
)]
fn file_alpha(config: &LoraConfig) -> f32 {
    let r = config.r as f64;
    let alpha = config.lora_alpha * if config.use_rslora { r.sqrt() } else { 1.0 };
    match alpha as f32 {
        alpha if alpha.is_normal() => alpha,
        _ => 1.0,
    }
}

/// B as the file holds it: in the base's row order, times what the site's factor has over alpha / r.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "ranks are far below 2^52, and the file holds f32 numbers"
)]
fn file_b(site: Site, adapter: &SiteAdapter, alpha: f32, base: &LoraBase) -> Vec<f32> {
    let read = f64::from(alpha) / adapter.r as f64;
    let extra = f64::from(adapter.scale) / read;
    // A factor of one but for the rounding of alpha and scale would only cost B its last bits.
    let one = (extra - 1.0).abs() < 2.0 * f64::from(f32::EPSILON);
    let times = |x: &f32| {
        if one {
            *x
        } else {
            (extra * f64::from(*x)) as f32
        }
    };
    let b = adapter.b.to_f32();
    let paired = base.paired_rows && matches!(site, Site::Q | Site::K);
    let row = |at: usize| {
        let from = if paired {
            half_of_pair(at, base.head_dim)
        } else {
            at
        };
        b[from * adapter.r..][..adapter.r].iter().map(times)
    };
    (0..b.len() / adapter.r).flat_map(row).collect()
}

/// The module's name in a GGUF, below `blk.N.`.
pub(super) const fn site_name(site: Site) -> &'static str {
    match site {
        Site::Q => "attn_q",
        Site::K => "attn_k",
        Site::V => "attn_v",
        Site::O => "attn_output",
        Site::Gate => "ffn_gate",
        Site::Up => "ffn_up",
        Site::Down => "ffn_down",
    }
}
