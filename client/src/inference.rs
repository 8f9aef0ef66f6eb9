//! The calls of InferenceService.

use futures::{Stream, StreamExt};
use tokio::sync::oneshot;
use tonic::transport::Channel;

use crate::{
    client::{Client, MAX_REPLY_BYTES, Repeat, Replies, until},
    error::Error,
    v1::{self, inference_service_client::InferenceServiceClient},
};

fn stub(channel: Channel) -> InferenceServiceClient<Channel> {
    InferenceServiceClient::new(channel).max_decoding_message_size(MAX_REPLY_BYTES)
}

impl Client {
    /// Continues a raw text.
    pub async fn generate(
        &self,
        request: v1::GenerateRequest,
    ) -> Result<v1::GenerateResponse, Error> {
        let call = |channel, request| async move { stub(channel).generate(request).await };
        self.unary(self.timeouts().generate, Repeat::Safe, request, call)
            .await
    }

    /// Continues a raw text, streamed.
    pub async fn stream_generate(
        &self,
        request: v1::GenerateRequest,
    ) -> Result<Replies<v1::GenerateChunk>, Error> {
        let call = |channel, request| async move { stub(channel).stream_generate(request).await };
        self.streaming(Some(self.timeouts().generate), request, call)
            .await
    }

    /// Answers a chat.
    pub async fn chat(&self, request: v1::ChatRequest) -> Result<v1::ChatResponse, Error> {
        let call = |channel, request| async move { stub(channel).chat(request).await };
        self.unary(self.timeouts().generate, Repeat::Safe, request, call)
            .await
    }

    /// Answers a chat, streamed.
    pub async fn stream_chat(
        &self,
        request: v1::ChatRequest,
    ) -> Result<Replies<v1::ChatChunk>, Error> {
        let call = |channel, request| async move { stub(channel).stream_chat(request).await };
        self.streaming(Some(self.timeouts().generate), request, call)
            .await
    }

    /// Chooses among labels.
    pub async fn classify(
        &self,
        request: v1::ClassifyRequest,
    ) -> Result<v1::ClassifyResponse, Error> {
        let call = |channel, request| async move { stub(channel).classify(request).await };
        self.unary(self.timeouts().inference, Repeat::Safe, request, call)
            .await
    }

    /// Turns texts into vectors.
    pub async fn embed(&self, request: v1::EmbedRequest) -> Result<v1::EmbedResponse, Error> {
        let call = |channel, request| async move { stub(channel).embed(request).await };
        self.unary(self.timeouts().inference, Repeat::Safe, request, call)
            .await
    }

    /// Log-probabilities of continuations.
    pub async fn score(&self, request: v1::ScoreRequest) -> Result<v1::ScoreResponse, Error> {
        let call = |channel, request| async move { stub(channel).score(request).await };
        self.unary(self.timeouts().inference, Repeat::Safe, request, call)
            .await
    }

    /// Text or chat to token ids.
    pub async fn tokenize(
        &self,
        request: v1::TokenizeRequest,
    ) -> Result<v1::TokenizeResponse, Error> {
        let call = |channel, request| async move { stub(channel).tokenize(request).await };
        self.unary(self.timeouts().inference, Repeat::Safe, request, call)
            .await
    }

    /// Token ids to text.
    pub async fn detokenize(
        &self,
        request: v1::DetokenizeRequest,
    ) -> Result<v1::DetokenizeResponse, Error> {
        let call = |channel, request| async move { stub(channel).detokenize(request).await };
        self.unary(self.timeouts().inference, Repeat::Safe, request, call)
            .await
    }

    /// Many Generates over one stream, at a lower priority than single calls: each item's answer under its key, in order
    /// of completion. Never made again by itself: send what has no reply over a new stream. Dropping the replies ends the call,
    /// whether or not items are still to come.
    pub async fn batch_generate(
        &self,
        items: impl Stream<Item = v1::BatchGenerateRequest> + Send + 'static,
    ) -> Result<Replies<v1::BatchGenerateResponse>, Error> {
        let (items, tie) = tied(items);
        let request = self.request(items, None);
        let replies = stub(self.channel()).batch_generate(request).await?;
        Ok(tie.hold(until(replies.into_inner(), None)))
    }

    /// Many Classifies over one stream, as [`Client::batch_generate`].
    pub async fn batch_classify(
        &self,
        items: impl Stream<Item = v1::BatchClassifyRequest> + Send + 'static,
    ) -> Result<Replies<v1::BatchClassifyResponse>, Error> {
        let (items, tie) = tied(items);
        let request = self.request(items, None);
        let replies = stub(self.channel()).batch_classify(request).await?;
        Ok(tie.hold(until(replies.into_inner(), None)))
    }
}

/// What keeps a call's items coming: without it the transport would hold the call open for items that nobody wants answered.
struct Tie(oneshot::Sender<()>);

/// Items that end when their tie is gone.
fn tied<I>(items: impl Stream<Item = I> + Send + 'static) -> (impl Stream<Item = I> + Send, Tie) {
    let (sender, gone) = oneshot::channel();
    (items.take_until(gone), Tie(sender))
}

// === impl Tie ===

impl Tie {
    /// Replies that take the tie with them.
    fn hold<R: Send + 'static>(self, replies: Replies<R>) -> Replies<R> {
        replies
            .inspect(move |_| {
                let _ = &self.0;
            })
            .boxed()
    }
}
