//! The ways to train beside LoRA, between the wire and the job service.

use espalier_proto::v1;

use crate::jobs::{WayRequest, WaySpec};
use crate::status::Refusal;

/// What a job trains in LoRA's place, if anything; at most one way may be named.
pub(super) fn request(spec: &mut v1::TrainingSpec) -> Result<Option<WayRequest>, Refusal> {
    let Some(ia3) = spec.ia3.take() else {
        return Ok(None);
    };
    if spec.lora.is_some() {
        let why = "lora is set too: an adapter is trained in one way, so leave one of them out";
        return Err(Refusal::invalid_field("spec.ia3", why));
    }
    Ok(Some(WayRequest::Ia3 {
        target_modules: ia3.target_modules,
        feedforward_modules: ia3.feedforward_modules,
    }))
}

/// The same of a job, for the wire.
pub(super) fn ia3_reply(way: Option<&WaySpec>) -> Option<v1::Ia3Config> {
    let WaySpec::Ia3(spec) = way?;
    Some(v1::Ia3Config {
        target_modules: spec.target_modules.clone(),
        feedforward_modules: spec.feedforward_modules.clone(),
    })
}
