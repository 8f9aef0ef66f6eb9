//! The ways to train beside LoRA, between the wire and the job service.

use espalier_proto::v1;

use crate::jobs::{WayRequest, WaySpec};
use crate::status::Refusal;

/// What a job trains in LoRA's place, if anything; at most one way may be named.
pub(super) fn request(spec: &mut v1::TrainingSpec) -> Result<Option<WayRequest>, Refusal> {
    let named = [
        ("lora", spec.lora.is_some()),
        ("ia3", spec.ia3.is_some()),
        ("unfreeze", spec.unfreeze.is_some()),
    ];
    let named: Vec<&str> = named.iter().filter(|n| n.1).map(|n| n.0).collect();
    if let [first, .., last] = named[..] {
        let why = format!(
            "{first} is set too: an adapter is trained in one way, so leave one of them out"
        );
        return Err(Refusal::invalid_field(format!("spec.{last}"), why));
    }
    let ia3 = spec.ia3.take().map(|ia3| WayRequest::Ia3 {
        target_modules: ia3.target_modules,
        feedforward_modules: ia3.feedforward_modules,
    });
    let unfreeze = spec.unfreeze.take().map(|unfreeze| WayRequest::Unfreeze {
        whole_model: unfreeze.whole_model,
        last_layers: unfreeze.last_layers,
        layers: unfreeze.layers,
        modules: unfreeze.modules,
    });
    Ok(ia3.or(unfreeze))
}

/// (IA)3 of a job, for the wire.
pub(super) fn ia3_reply(way: Option<&WaySpec>) -> Option<v1::Ia3Config> {
    let WaySpec::Ia3(spec) = way? else {
        return None;
    };
    Some(v1::Ia3Config {
        target_modules: spec.target_modules.clone(),
        feedforward_modules: spec.feedforward_modules.clone(),
    })
}

/// What a job unfreezes, for the wire.
pub(super) fn unfreeze_reply(way: Option<&WaySpec>) -> Option<v1::UnfreezeConfig> {
    let WaySpec::Unfreeze(spec) = way? else {
        return None;
    };
    Some(v1::UnfreezeConfig {
        whole_model: false,
        last_layers: None,
        layers: spec.layers.clone(),
        modules: spec.modules.clone(),
    })
}
