//! Sends the messages of the outbox. Any number of processes may do so at once, because each message is claimed by a
//! lease. If a process dies while sending, another sends the message again, so a receiver may get it twice and
//! recognises it by its `webhook-id`.

use std::time::Duration;

use futures::future::join3;
use reqwest::header::{CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue};
use reqwest::{Method, Request, StatusCode};
use sqlx::PgPool;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::db::DbError;
use crate::remote::client::{Client, RemoteError};
use crate::webhooks::outbox::{Claimed, Outcome, Receivers, claim, forget, settle};
use promptweave_domain::error_chain::chain;
use promptweave_domain::webhook::{InvalidSecret, InvalidWebhookUrl, WebhookSecret, WebhookUrl};

/// The longest wait between two looks at the outbox.
const POLL: Duration = Duration::from_secs(1);
const FORGET_EVERY: Duration = Duration::from_secs(3600);
/// The most messages being sent at a time, for either kind of receivers.
const AT_ONCE: usize = 64;
/// The time from the first look-up of a name to the answer's head; the answer's body is not read.
const TIME: Duration = Duration::from_secs(15);

const ID: HeaderName = HeaderName::from_static("webhook-id");
const TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");

/// Why a message was not delivered.
#[derive(Debug, thiserror::Error)]
enum DeliveryError {
    #[error(transparent)]
    Remote(#[from] RemoteError),
    #[error(
        "the receiver answered {0}, and redirects are not followed; register where it leads to"
    )]
    Redirect(StatusCode),
    #[error("the receiver answered {0}")]
    Refused(StatusCode),
    /// A stored URL that only a manual change of the database can have caused.
    #[error("the webhook's URL cannot be read")]
    Url(#[from] InvalidWebhookUrl),
    #[error("the webhook's secret cannot be read")]
    Secret(#[from] InvalidSecret),
}

impl DeliveryError {
    fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Redirect(status) | Self::Refused(status) => Some(*status),
            Self::Remote(_) | Self::Url(_) | Self::Secret(_) => None,
        }
    }
}

/// Delivers until `stop`; messages that are being sent then are interrupted and released.
pub async fn run(pool: PgPool, client: Client, stop: CancellationToken) {
    let deliver = |receivers| deliver(receivers, pool.clone(), client.clone(), stop.clone());
    join3(
        deliver(Receivers::Answering),
        deliver(Receivers::Failing),
        forget_hourly(&pool, &stop),
    )
    .await;
}

async fn deliver(receivers: Receivers, pool: PgPool, client: Client, stop: CancellationToken) {
    let mut on_their_way = JoinSet::new();
    while !stop.is_cancelled() {
        let free = AT_ONCE - on_their_way.len();
        match take(&pool, receivers, free).await {
            Ok(claimed) => {
                for message in claimed {
                    on_their_way.spawn(attempt(
                        message,
                        pool.clone(),
                        client.clone(),
                        stop.clone(),
                    ));
                }
            }
            // Database failures are not logged as errors here; whoever has work for the database does that.
            Err(error) => tracing::debug!(error = chain(&error), "cannot look at the outbox"),
        }
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(POLL) => {}
            Some(_) = on_their_way.join_next() => {}
        }
        while on_their_way.try_join_next().is_some() {}
    }
    while on_their_way.join_next().await.is_some() {}
}

async fn take(pool: &PgPool, receivers: Receivers, free: usize) -> Result<Vec<Claimed>, DbError> {
    if free == 0 {
        return Ok(Vec::new());
    }
    claim(&mut *pool.acquire().await?, receivers, free).await
}

/// Makes one try to deliver a message, and records its outcome.
async fn attempt(message: Claimed, pool: PgPool, client: Client, stop: CancellationToken) {
    let outcome = match stop.run_until_cancelled(send(&message, &client)).await {
        None => Outcome::BrokenOff,
        Some(Ok(status)) => Outcome::Delivered {
            status: status.as_u16(),
        },
        Some(Err(error)) => Outcome::Failed {
            status: error.status().map(|status| status.as_u16()),
            gone: error.status() == Some(StatusCode::GONE),
            error: chain(&error),
        },
    };
    let settled = async { settle(&mut *pool.acquire().await?, &message, &outcome).await };
    let settled = settled.await;
    let (webhook, delivery, attempt) = (message.webhook_id, message.id, message.attempt);
    match (settled, &outcome) {
        (Ok(Some(false)), Outcome::Failed { error, gone, .. }) => {
            tracing::warn!(webhook.id = %webhook, delivery.id = %delivery, attempt, gone, error, "a webhook's message is given up");
        }
        (Ok(_), outcome) => {
            tracing::debug!(webhook.id = %webhook, delivery.id = %delivery, attempt, ?outcome, "tried to deliver");
        }
        // The lease will run out, and the message is sent again.
        (Err(error), _) => {
            tracing::warn!(webhook.id = %webhook, delivery.id = %delivery, error = chain(&error), "cannot write down how a delivery went");
        }
    }
}

/// Sends a message; returns the status if that is a success.
async fn send(message: &Claimed, client: &Client) -> Result<StatusCode, DeliveryError> {
    let url: WebhookUrl = message.url.parse()?;
    let secret: WebhookSecret = message.secret.parse()?;
    let mut request = Request::new(Method::POST, url.url().clone());
    *request.headers_mut() = headers(message, &secret);
    *request.timeout_mut() = Some(TIME);
    *request.body_mut() = Some(message.payload.clone().into());
    let status = client.execute(request).await?.status();
    if status.is_success() {
        Ok(status)
    } else if status.is_redirection() {
        Err(DeliveryError::Redirect(status))
    } else {
        Err(DeliveryError::Refused(status))
    }
}

fn headers(message: &Claimed, secret: &WebhookSecret) -> HeaderMap {
    let id = message.id.to_string();
    let signature = secret.sign(&id, message.timestamp, &message.payload);
    let plain = |text: String| HeaderValue::try_from(text).expect("plain characters");
    HeaderMap::from_iter([
        (CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (ID, plain(id)),
        (TIMESTAMP, message.timestamp.into()),
        (SIGNATURE, plain(signature)),
    ])
}

async fn forget_hourly(pool: &PgPool, stop: &CancellationToken) {
    while stop
        .run_until_cancelled(tokio::time::sleep(FORGET_EVERY))
        .await
        .is_some()
    {
        let forgotten = async { forget(&mut *pool.acquire().await?).await };
        match forgotten.await {
            Ok(deliveries) => tracing::debug!(deliveries, "forgot old deliveries"),
            Err(error) => tracing::debug!(error = chain(&error), "cannot forget old deliveries"),
        }
    }
}
