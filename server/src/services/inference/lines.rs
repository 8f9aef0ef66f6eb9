//! The lines of bulk jobs as inference requests: checked as far as the engine's door when the job is created, answered when
//! it runs. This file must not know where lines come from.

use espalier_proto::v1;

use super::{InferenceService, Labelling};
use crate::convert::bulk::{BulkRequest, BulkResponse};
use crate::services::Call;
use crate::status::Refusal;

impl InferenceService {
    /// The version that a target names now, by its canonical name; `None` is the base model.
    pub(crate) async fn version_of(
        &self,
        call: &Call,
        target: v1::InferenceTarget,
    ) -> Result<Option<String>, Refusal> {
        let held = self.asker.resolve(call, Some(target)).await?;
        match held.versions.as_slice() {
            [] => Ok(None),
            [(version, weight)] if *weight == 1.0 => Ok(Some(version.name.to_string())),
            _ => {
                let why = "a bulk job takes one adapter of weight 1; mixtures are for single calls and batch streams";
                Err(Refusal::invalid_field("metadata.target.adapters", why))
            }
        }
    }

    /// Whether a line would be taken, overload and drain aside.
    pub(crate) async fn check(&self, call: &Call, request: BulkRequest) -> Result<(), Refusal> {
        let plan = match request {
            BulkRequest::Generate(message) => self.plan_generate(call, message).await?,
            BulkRequest::Chat(message) => self.plan_chat(call, message).await?,
            BulkRequest::Classify(message) => {
                let Labelling { held, id, kind, .. } = self.plan_classify(call, message).await?;
                return self.asker.check(call, &held, &id, kind);
            }
        };
        self.asker.check(call, &plan.held, &plan.id, plan.kind())
    }

    /// Answers a line.
    pub(crate) async fn answer(
        &self,
        call: &Call,
        request: BulkRequest,
    ) -> Result<BulkResponse, Refusal> {
        Ok(match request {
            BulkRequest::Generate(message) => {
                BulkResponse::Generate(self.answer_generate(call, message).await?)
            }
            BulkRequest::Chat(message) => {
                BulkResponse::Chat(self.answer_chat(call, message).await?)
            }
            BulkRequest::Classify(message) => {
                BulkResponse::Classify(self.answer_classify(call, message).await?)
            }
        })
    }
}
