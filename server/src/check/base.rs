//! The base that is measured, where it lives, how large the measurements on it are, and adapters for it.

use std::error::Error;
use std::sync::Arc;

use espalier_adapters::config::Site;
use espalier_adapters::ops::{Backend, Ops, Uniform, WeightKind};
use espalier_adapters::weights::{AdapterWeights, Numbers, SiteAdapter};
use espalier_engine::device;
use espalier_engine::model::{BaseSites, Dtype, Model, load_as};
use half::bf16;

use crate::config::Config;

/// The rank of adapters, on all projections.
pub(super) const RANK: usize = 16;

/// A base on its device.
pub(super) struct Base {
    pub(super) model: Arc<Model>,
    pub(super) name: String,
    pub(super) dtype: Dtype,
    pub(super) scale: &'static Scale,
}

/// How large the measurements are.
pub(super) struct Scale {
    /// The shape where none is named.
    shape: &'static str,
    /// Sequences of a decode step.
    pub(super) rows: &'static [usize],
    /// Adapters among them.
    pub(super) adapters: &'static [usize],
    /// Tokens of each sequence before the step.
    pub(super) context: usize,
    /// Tokens of a prompt pass.
    pub(super) prompt: usize,
    /// Steps of a measurement, and those before it that do not count.
    pub(super) steps: usize,
    pub(super) warm_up: usize,
    /// Examples of an optimizer step, and tokens of each.
    pub(super) examples: usize,
    pub(super) example_tokens: usize,
    pub(super) train_steps: usize,
    /// Bytes that are copied to find the bandwidth.
    pub(super) copied: usize,
    /// The side of the matrices whose product finds the rate.
    pub(super) side: usize,
}

const GPU: Scale = Scale {
    shape: "llama-3.1-8b",
    rows: &[1, 16, 64, 256],
    adapters: &[0, 1, 8, 16, 32, 64],
    context: 1024,
    prompt: 4096,
    steps: 20,
    warm_up: 5,
    examples: 4,
    example_tokens: 1024,
    train_steps: 5,
    copied: 2 << 30,
    side: 8192,
};

const PROCESSOR: Scale = Scale {
    shape: "smollm2-135m",
    rows: &[1, 4, 16],
    adapters: &[0, 1, 4, 16],
    context: 128,
    prompt: 512,
    steps: 5,
    warm_up: 1,
    examples: 4,
    example_tokens: 64,
    train_steps: 2,
    copied: 64 << 20,
    side: 1024,
};

// === impl Base ===

impl Base {
    /// Opens the device and loads what the configuration names.
    pub(super) fn open(config: &Config) -> Result<Self, Box<dyn Error>> {
        let server = &config.server;
        let (ops, dtype) = device::open(server.device, server.dtype.0, server.deterministic)?;
        let scale = match &ops {
            Backend::Cpu(_) => &PROCESSOR,
            Backend::Cuda(_) => &GPU,
        };
        let spec = match (server.model.as_str(), server.synthetic.as_str()) {
            ("", "") => format!("synthetic:{}", scale.shape),
            ("", shape) => format!("synthetic:{shape}"),
            (model, _) => model.to_owned(),
        };
        let loaded = load_as(&spec, dtype)?;
        let model = Model::new(ops, loaded.config, loaded.weights)?;
        Ok(Base {
            model: Arc::new(model),
            name: loaded.name,
            dtype,
            scale,
        })
    }

    /// Device and model in a line.
    pub(super) fn about(&self) -> String {
        let (device, name) = (device::about(self.model.ops()), &self.name);
        let bytes = self.model.bytes() as f64 / f64::from(1 << 30);
        format!("{device}, {name} in {} ({bytes:.2} GiB)", self.dtype)
    }

    /// Bytes that the device still has; a processor's memory is the operator's business.
    pub(super) fn free_bytes(&self) -> Option<usize> {
        match self.model.ops() {
            Backend::Cpu(_) => None,
            Backend::Cuda(cuda) => cuda.free_bytes().ok(),
        }
    }

    /// Parameters that every token is multiplied by: all projections and the head.
    pub(super) fn multiplied(&self) -> usize {
        let config = self.model.config();
        let shape = config.base_shape();
        let sites = Site::ALL.map(|site| shape.dims(site));
        let layer: usize = sites.iter().map(|(inputs, outputs)| inputs * outputs).sum();
        config.layers * layer + config.vocab * config.hidden
    }

    /// Bytes of weights that every step reads: all but an embedding that is no head as well.
    pub(super) fn read_bytes(&self) -> usize {
        let (ops, config) = (self.model.ops(), self.model.config());
        let gathered = match config.tie_embeddings {
            true => 0,
            false => ops.bytes(self.model.head()),
        };
        self.model.bytes() - gathered
    }

    /// Bytes of a token's keys and values.
    pub(super) fn token_bytes(&self) -> usize {
        let config = self.model.config();
        2 * config.layers * config.kv_width() * self.model.ops().working_bytes()
    }

    /// What training may keep for the backward pass: as configured, else by the rule of the server's plan.
    pub(super) fn activation_bytes(&self, config: &Config) -> usize {
        match config.training.training_activation_bytes.as_usize() {
            0 => self.free_bytes().map_or(512 << 20, |free| free / 10),
            bytes => bytes,
        }
    }

    /// An adapter on all projections, in bf16 as trainers save it.
    pub(super) fn adapter(&self, seed: u64) -> AdapterWeights {
        adapter(&self.model, seed, 0.02)
    }
}

/// Random numbers of at most `bound` on every projection.
pub(super) fn adapter(model: &Model, seed: u64, bound: f32) -> AdapterWeights {
    let base = model.config().base_shape();
    let mut drawn = seed << 32;
    let mut numbers = |len: usize| {
        drawn += 1;
        let numbers = Uniform {
            kind: WeightKind::F32,
            len,
            seed: drawn,
            bound,
        };
        Numbers::Bf16(numbers.numbers().map(bf16::from_f32).collect())
    };
    let sites = (0..base.layers).flat_map(|layer| Site::ALL.map(|site| (layer, site)));
    let sites = sites.map(|(layer, site)| {
        let (inputs, outputs) = base.dims(site);
        let adapter = SiteAdapter {
            r: RANK,
            scale: 2.0,
            a: numbers(RANK * inputs),
            b: numbers(outputs * RANK),
            magnitude: None,
        };
        ((layer, site), adapter)
    });
    AdapterWeights {
        sites: sites.collect(),
        ..AdapterWeights::default()
    }
}

/// Random tokens.
pub(super) fn tokens(vocab: usize, seed: u64, len: usize) -> Vec<u32> {
    let drawn = Uniform {
        kind: WeightKind::F32,
        len,
        seed,
        bound: 1.0,
    };
    let token = |x: f32| (((x + 1.0) / 2.0 * vocab as f32) as u32).min(vocab as u32 - 1);
    drawn.numbers().map(token).collect()
}
