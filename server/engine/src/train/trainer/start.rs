//! Where a run starts: given weights; or A uniform, B zero and DoRA's magnitudes those of W, drawn by seed and site so that every
//! site's numbers are its own; or vectors of ones; or deltas of zeros.

use espalier_adapters::config::{
    AdapterConfig, BaseShape, BaseTensor, FullConfig, Ia3Config, LoraConfig, ScaleOn, Site,
};
use espalier_adapters::error::AdapterError;
use espalier_adapters::linear::{BaseSites, row_norms};
use espalier_adapters::ops::Ops;
use espalier_adapters::weights::{
    AdapterWeights, Delta, HiddenLayer, ScoreHead, SiteAdapter, SiteScale,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::plan::{HeadOptions, Method, TrainError, TrainPlan};
use crate::model::Model;

/// Streams of the seed: sites use their number, what is no site a number that no model reaches.
const HEAD_STREAM: u64 = 1 << 40;
const ORDER_STREAM: u64 = 1 << 41;

/// The random numbers of one purpose.
fn stream(seed: u64, stream: u64) -> ChaCha8Rng {
    let mut random = ChaCha8Rng::seed_from_u64(seed);
    random.set_stream(stream);
    random
}

/// The random numbers of an epoch's order.
pub(super) fn order(seed: u64, epoch: u64) -> ChaCha8Rng {
    stream(seed, ORDER_STREAM + epoch)
}

/// The plan's first weights: its own, completed by drawn ones.
pub(super) fn initial(plan: &TrainPlan, model: &Model) -> Result<AdapterWeights, TrainError> {
    let mut weights = match (&plan.init, &plan.adapter) {
        (Some(init), _) if plan.head_only() && adapts(init) => {
            return Err(TrainError::plan(
                "init",
                "adapts modules, but the head is to be trained alone",
            ));
        }
        // What a file stores in 16 bits is trained in 32.
        (Some(init), _) => init.clone().widened(),
        (None, Some(AdapterConfig::Lora(lora))) => drawn(lora, plan.seed, model)?,
        (None, Some(AdapterConfig::Ia3(ia3))) => ones(ia3, model)?,
        (None, Some(AdapterConfig::Full(full))) => zeros(full, model)?,
        (None, None) => AdapterWeights::default(),
    };
    if !adapts(&weights) && !plan.head_only() {
        return Err(TrainError::plan("adapter", "adapts no module of this base"));
    }
    let lora = plan.adapter.as_ref().and_then(AdapterConfig::lora);
    let fits = match &plan.adapter {
        Some(AdapterConfig::Lora(_)) => !weights.sites.is_empty(),
        Some(AdapterConfig::Ia3(_)) => !weights.scales.is_empty(),
        Some(AdapterConfig::Full(_)) => !weights.full.is_empty(),
        None => true,
    };
    if !fits {
        let reason =
            "is another way to adapt than the plan's: go on from a version of the same way";
        return Err(TrainError::plan("init", reason));
    }
    let dora = lora.is_some_and(|lora| lora.use_dora);
    if let Some(((layer, site), _)) = weights
        .sites
        .iter()
        .find(|(_, adapter)| adapter.magnitude.is_some() != dora)
    {
        let (has, set) = if dora { ("no", "false") } else { ("a", "true") };
        let reason = format!(
            "has {has} magnitude at {}: set use_dora to {set} to go on from it",
            site.path(*layer)
        );
        return Err(TrainError::plan("init", reason));
    }
    match &plan.method {
        Method::Lm if weights.head.is_some() => Err(TrainError::plan(
            "init",
            "has a head, but tokens are learnt",
        )),
        Method::Lm => Ok(weights),
        Method::Class {
            labels, options, ..
        } => {
            let head = weights
                .head
                .get_or_insert_with(|| head((labels, options), plan, model));
            if head.labels != *labels {
                return Err(TrainError::plan(
                    "init",
                    "its head has other labels than the plan",
                ));
            }
            let settings = options.settings();
            if head.settings.problem != settings.problem {
                let reason = format!(
                    "its head answers {}, the plan {}",
                    head.settings.problem.as_str(),
                    settings.problem.as_str()
                );
                return Err(TrainError::plan("init", reason));
            }
            let (own, asked) = (head.settings.stack(), settings.stack());
            if own != asked {
                let reason = format!(
                    "its head has {own}, the plan {asked}: ask for the same to go on from it"
                );
                return Err(TrainError::plan("init", reason));
            }
            // What was fitted on the old head's answers does not hold for the new one's.
            head.settings = settings;
            Ok(weights)
        }
    }
}

/// A uniform within `1 / sqrt(in)`, which is PEFT's `kaiming_uniform_(a = sqrt(5))`, B zero, and with DoRA the norms of W's rows.
fn drawn(lora: &LoraConfig, seed: u64, model: &Model) -> Result<AdapterWeights, TrainError> {
    let plans = lora.plan(model.config().layers).map_err(bad_patterns)?;
    let mut weights = AdapterWeights::default();
    for ((layer, site), plan) in plans {
        let (outputs, inputs) = model.ops().dims(model.weight(layer, site));
        let bound = 1.0 / (inputs as f32).sqrt();
        let mut random = stream(seed, (layer * Site::ALL.len() + site.index()) as u64);
        let a = (0..plan.r * inputs)
            .map(|_| random.random_range(-bound..bound))
            .collect();
        let b = vec![0.0; outputs * plan.r];
        let weight = model.weight(layer, site);
        let magnitude = lora
            .use_dora
            .then(|| row_norms(&model.ops().beside(), weight));
        weights.sites.insert(
            (layer, site),
            SiteAdapter {
                r: plan.r,
                scale: plan.scale,
                a,
                b: b.into(),
                magnitude,
            },
        );
    }
    Ok(weights)
}

/// Vectors of ones, which leave the base as it is: PEFT's start.
fn ones(ia3: &Ia3Config, model: &Model) -> Result<AdapterWeights, TrainError> {
    let plan = ia3.plan(model.config().layers).map_err(bad_patterns)?;
    let shape = model.config().base_shape();
    let scale = |((layer, site), on): (_, ScaleOn)| {
        let l = vec![1.0; on.width(shape.dims(site))];
        ((layer, site), SiteScale { on, l })
    };
    Ok(AdapterWeights {
        scales: plan.into_iter().map(scale).collect(),
        ..AdapterWeights::default()
    })
}

/// Deltas of zeros, which leave the base as it is.
fn zeros(full: &FullConfig, model: &Model) -> Result<AdapterWeights, TrainError> {
    let (shape, mut weights) = (model.config().base_shape(), AdapterWeights::default());
    for tensor in full.tensors() {
        if let Some(absent) = tensor.absent(&shape) {
            let reason = format!("{} does not exist: {absent}", tensor.path());
            return Err(TrainError::plan("adapter", reason));
        }
        if tensor.is_matrix() || model.vector(tensor).is_some() {
            weights.full.insert(tensor, nothing(tensor, &shape));
        }
    }
    Ok(weights)
}

fn nothing(tensor: BaseTensor, base: &BaseShape) -> Delta {
    let dims = tensor.shape(base);
    Delta {
        rows: if tensor.is_matrix() { dims[0] } else { 1 },
        values: vec![0.0; dims.iter().product()],
    }
}

/// Whether anything but a head is changed.
fn adapts(weights: &AdapterWeights) -> bool {
    !(weights.sites.is_empty() && weights.scales.is_empty() && weights.full.is_empty())
}

fn bad_patterns(errors: Vec<AdapterError>) -> TrainError {
    let reasons: Vec<String> = errors.iter().map(ToString::to_string).collect();
    TrainError::plan("adapter", reasons.join("; "))
}

/// A head drawn within `1 / sqrt(in)`, hidden layers and their biases too, as torch's `nn.Linear` starts; one layer alone on frozen
/// states has a convex loss, and zero is as good.
fn head(
    (labels, options): (&[String], &HeadOptions),
    plan: &TrainPlan,
    model: &Model,
) -> ScoreHead {
    let drawn = |stream_number: u64, count: usize, bound: f32| -> Vec<f32> {
        let mut random = stream(plan.seed, stream_number);
        let number = |_| bound * random.random_range(-1.0f32..1.0);
        (0..count).map(number).collect()
    };
    let (mut inputs, mut hidden) = (model.config().hidden, Vec::new());
    for (index, outputs) in options.hidden_layers.iter().enumerate() {
        let (bound, first) = (1.0 / (inputs as f32).sqrt(), 1 + 2 * index as u64);
        hidden.push(HiddenLayer {
            weight: drawn(HEAD_STREAM + first, outputs * inputs, bound),
            bias: drawn(HEAD_STREAM + first + 1, *outputs, bound),
        });
        inputs = *outputs;
    }
    let convex = plan.head_only() && hidden.is_empty();
    let bound = if convex {
        0.0
    } else {
        1.0 / (inputs as f32).sqrt()
    };
    ScoreHead {
        labels: labels.to_vec(),
        hidden,
        weight: drawn(HEAD_STREAM, labels.len() * inputs, bound),
        settings: options.settings(),
    }
}
