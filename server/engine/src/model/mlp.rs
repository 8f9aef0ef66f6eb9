//! The MLP half of a block: norm, gate and up, SwiGLU, down.

use espalier_adapters::batch::Pass;
use espalier_adapters::config::{BaseTensor, LayerTensor, Site};
use espalier_adapters::linear::{self, AdapterGrads, LoraLinear, RmsNorm};
use espalier_adapters::ops::{Buffer, Ops};
use espalier_adapters::pace::Stopped;

use super::config::ModelConfig;
use super::decoder::{Activations, Scratch, packed};
use super::stream::Stream;
use super::weights::{ModelWeights, Part, Slot};

/// The MLP of one block.
#[derive(Debug)]
pub(crate) struct Mlp<O: Ops> {
    pub(crate) norm: RmsNorm<O>,
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
            norm: RmsNorm::new(
                ops,
                &weights.layers[layer].mlp_norm,
                config.rms_eps,
                BaseTensor::Layer(layer, LayerTensor::MlpNorm),
                config.hidden,
            ),
        }
    }

    /// Adds `mlp(norm(x))` to the stream. Leaves gate and up in `act`; with `keep`, the stream's sum too.
    pub(crate) fn forward(
        &self,
        pass: &Pass<'_, O>,
        stream: &mut Stream<O>,
        (act, keep): (&mut Activations<O>, bool),
        scratch: &mut Scratch<O>,
    ) -> Result<(), Stopped> {
        let ops = pass.ops;
        stream.norm(pass, &self.norm, &mut scratch.norm);
        if keep {
            stream.keep(ops, &mut act.mid);
        }
        linear::forward(
            pass,
            [&self.gate, &self.up],
            &scratch.norm,
            [&mut act.gate, &mut act.up],
            &mut scratch.thin,
        )?;
        ops.swiglu(act.gate.all(), act.up.all(), scratch.inner.all_mut());
        pass.pace.breathe()?;
        let thin = &mut scratch.thin;
        linear::forward(pass, [&self.down], &scratch.inner, [stream.added()], thin)
    }

    /// Turns `dx`, the gradient of this half's output, into that of its input, and adds the adapters' gradients. Gate and up
    /// in `act` become their gradients.
    pub(crate) fn backward(
        &self,
        pass: &Pass<'_, O>,
        act: &mut Activations<O>,
        dx: &mut O::Buf,
        grads: &mut [Option<AdapterGrads<O>>],
        scratch: &mut Scratch<O>,
    ) -> Result<(), Stopped> {
        let ops = pass.ops;
        let Scratch {
            inner,
            dinner,
            norm,
            dnorm,
            thin,
            ..
        } = scratch;
        ops.swiglu(act.gate.all(), act.up.all(), inner.all_mut());
        pass.pace.breathe()?;
        ops.clear(dinner.all_mut());
        self.down
            .backward(pass, (inner, dx), Some(dinner), grads, thin)?;
        ops.swiglu_backward(act.gate.all_mut(), act.up.all_mut(), dinner.all());
        pass.pace.breathe()?;
        self.norm.forward(pass, &act.mid, norm);
        ops.clear(dnorm.all_mut());
        self.gate
            .backward(pass, (norm, &act.gate), Some(dnorm), grads, thin)?;
        self.up
            .backward(pass, (norm, &act.up), Some(dnorm), grads, thin)?;
        self.norm.gradients(pass, (&act.mid, dnorm), grads, thin);
        self.norm.backward(pass, &act.mid, dnorm, dx);
        Ok(())
    }
}
