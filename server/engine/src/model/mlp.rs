//! The MLP half of a block: norm, gate and up, SwiGLU, down.

use espalier_adapters::batch::Pass;
use espalier_adapters::config::Site;
use espalier_adapters::linear::{self, AdapterGrads, LoraLinear};
use espalier_adapters::ops::Ops;
use espalier_adapters::pace::Stopped;

use super::config::ModelConfig;
use super::decoder::{Activations, Scratch, packed};
use super::norm::RmsNorm;
use super::weights::{ModelWeights, Part, Slot};

/// The MLP of one block.
#[derive(Debug)]
pub(crate) struct Mlp<O: Ops> {
    norm: RmsNorm<O::T>,
    pub(crate) gate: LoraLinear<O>,
    pub(crate) up: LoraLinear<O>,
    pub(crate) down: LoraLinear<O>,
}

impl<O: Ops> Mlp<O> {
    pub(crate) fn new(
        ops: &O,
        config: &ModelConfig,
        layer: usize,
        weights: &mut ModelWeights,
    ) -> Self {
        let mut linear = |site: Site, part: Part| {
            let weight = packed(ops, config, weights, Slot::Layer(layer, part));
            LoraLinear::new(ops, weight, None, (layer, site))
        };
        Self {
            gate: linear(Site::Gate, Part::Gate),
            up: linear(Site::Up, Part::Up),
            down: linear(Site::Down, Part::Down),
            norm: RmsNorm::new(&weights.layers[layer].mlp_norm, config.rms_eps),
        }
    }

    /// `x += mlp(norm(x))`. Leaves gate and up in `act`.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, O>,
        x: &mut [O::T],
        act: &mut Activations<O::T>,
        scratch: &mut Scratch<O::T>,
    ) -> Result<(), Stopped> {
        self.norm.forward(pass.ops, x, &mut scratch.norm);
        linear::forward(
            pass,
            [&self.gate, &self.up],
            &scratch.norm,
            [&mut act.gate, &mut act.up],
            &mut scratch.thin,
        )?;
        pass.ops.swiglu(&act.gate, &act.up, &mut scratch.inner);
        pass.pace.breathe()?;
        let thin = &mut scratch.thin;
        linear::forward(
            pass,
            [&self.down],
            &scratch.inner,
            [&mut scratch.norm],
            thin,
        )?;
        pass.ops.add(&scratch.norm, x);
        Ok(())
    }

    /// Turns `dx`, the gradient of this half's output, into that of its input, and adds the adapters' gradients. Gate and up
    /// in `act` become their gradients.
    pub(crate) fn backward(
        &self,
        pass: &Pass<'_, O>,
        act: &mut Activations<O::T>,
        dx: &mut [O::T],
        grads: &mut [Option<AdapterGrads<O::T>>],
        scratch: &mut Scratch<O::T>,
    ) -> Result<(), Stopped> {
        let zero = <O::T as Default>::default();
        let Scratch {
            inner,
            dinner,
            norm,
            dnorm,
            thin,
            ..
        } = scratch;
        pass.ops.swiglu(&act.gate, &act.up, inner);
        pass.pace.breathe()?;
        dinner.fill(zero);
        self.down
            .backward(pass, (inner, dx), Some(dinner), grads, thin)?;
        pass.ops.swiglu_backward(&mut act.gate, &mut act.up, dinner);
        pass.pace.breathe()?;
        self.norm.forward(pass.ops, &act.mid, norm);
        dnorm.fill(zero);
        self.gate
            .backward(pass, (norm, &act.gate), Some(dnorm), grads, thin)?;
        self.up
            .backward(pass, (norm, &act.up), Some(dnorm), grads, thin)?;
        self.norm.backward(pass.ops, &act.mid, dnorm, dx);
        Ok(())
    }
}
