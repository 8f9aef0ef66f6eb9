//! What a run notices about itself while it can still be told: modules that learn nothing, a loss that runs away.
//!
//! Pure functions of numbers that a step has anyway. It must not know what is done about a finding.

use espalier_adapters::config::Site;

/// Gradients below this share of the loss, or of the largest module's, are what rounding leaves of zeros.
const SILENT: f64 = 1e-6;

/// A loss is high when it is above the first one by this factor and by one nat.
const HIGH: f64 = 1.5;

/// So many steps in a row with a high loss are a finding, once.
const HIGH_STEPS: u64 = 3;

/// Something that is worth a look.
#[derive(Clone, Debug, PartialEq)]
pub enum Diagnosis {
    /// The first step gave these modules no gradient: they will not learn.
    SilentModules {
        /// Paths in the base, in its order.
        modules: Vec<String>,
        /// Modules that are trained.
        of: usize,
    },
    /// The loss has been high for some steps.
    Diverging {
        /// Of this step.
        loss: f64,
        /// Of the first step.
        first_loss: f64,
    },
}

impl std::fmt::Display for Diagnosis {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::SilentModules { modules, of } => write!(
                f,
                "{} of {of} trained modules got no gradient, {} among them: they learn nothing from these rows; leave them \
                 out of target_modules, or look whether the rows have more than one token",
                modules.len(),
                modules.first().map_or("", String::as_str),
            ),
            Self::Diverging { loss, first_loss } => write!(
                f,
                "the loss is {loss:.3} and was {first_loss:.3} at the first step: it diverges; a lower learning_rate or a \
                 longer warmup may help"
            ),
        }
    }
}

/// Whether a gradient is no more than what rounding leaves of none.
pub(super) fn is_none(grad_norm: f64, loss: f64) -> bool {
    grad_norm <= SILENT * loss
}

/// Modules whose gradient is silent beside the largest, given the norm of each.
pub(super) fn silent(norms: &[((usize, Site), f64)]) -> Option<Diagnosis> {
    let largest = norms.iter().map(|(_, norm)| *norm).fold(0.0, f64::max);
    let silent = norms.iter().filter(|(_, norm)| *norm <= SILENT * largest);
    let modules: Vec<String> = silent.map(|((layer, site), _)| site.path(*layer)).collect();
    (!modules.is_empty()).then_some(Diagnosis::SilentModules {
        modules,
        of: norms.len(),
    })
}

/// Counts steps in a row with a high loss; a finding when there are enough.
pub(super) fn diverging(high_steps: &mut u64, loss: f64, first_loss: f64) -> Option<Diagnosis> {
    let high = loss > HIGH * first_loss && loss > first_loss + 1.0;
    *high_steps = if high { *high_steps + 1 } else { 0 };
    (*high_steps == HIGH_STEPS).then_some(Diagnosis::Diverging { loss, first_loss })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_module_is_silent_beside_others_only() {
        let norms = [
            ((0, Site::Q), 1e-9),
            ((0, Site::V), 0.5),
            ((1, Site::K), 0.0),
            ((1, Site::Down), 1e-5),
        ];
        let Some(Diagnosis::SilentModules { modules, of }) = silent(&norms) else {
            panic!("two modules are silent");
        };
        assert_eq!(of, 4);
        assert_eq!(
            modules,
            [
                "model.layers.0.self_attn.q_proj",
                "model.layers.1.self_attn.k_proj"
            ]
        );
        assert_eq!(silent(&norms[1..2]), None);
    }

    #[test]
    fn a_loss_diverges_when_it_stays_high_and_is_told_once() {
        let losses = [2.0, 3.5, 3.5, 1.0, 3.2, 3.3, 3.4, 9.0, 2.9, 4.0];
        let mut high = 0;
        let found: Vec<usize> = (0..losses.len())
            .filter(|i| diverging(&mut high, losses[*i], 2.0).is_some())
            .collect();
        assert_eq!(found, [6]);
        // Half as much again of little is still little.
        assert!((0..9).all(|_| diverging(&mut high, 0.9, 0.1).is_none()));
    }
}
