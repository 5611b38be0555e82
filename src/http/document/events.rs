//! The document's schemas of job events: one for each kind, and one for streams of them.

use utoipa::openapi::content::ContentBuilder;
use utoipa::openapi::schema::{Discriminator, SchemaFormat};
use utoipa::openapi::{
    KnownFormat, Object, ObjectBuilder, OneOfBuilder, OpenApi, Ref, RefOr, Schema, Type,
};
use utoipa::{OpenApi as _, ToSchema};
use uuid::Uuid;

use crate::http::jobs::JobProgress;
use crate::http::openapi::operations;
use crate::jobs::events::JobEvent;
use promptweave_domain::job::JobError;
use promptweave_domain::phase::Phase;
use promptweave_domain::sharding::Estimate;
use promptweave_domain::tuning::Epoch;
use promptweave_domain::words::EventKind;

const STREAM: &str = "text/event-stream";

#[derive(utoipa::OpenApi)]
#[openapi(components(schemas(
    AttemptBegun,
    AttemptEnded,
    AttemptFailed,
    Estimate,
    Epoch,
    JobProgress,
    JobStreamEvent,
    NothingMore,
    PhaseBegun,
    ShardOf
)))]
struct Schemas;

/// The data of an event kind that has none.
#[derive(ToSchema)]
struct NothingMore {}

#[derive(ToSchema)]
#[expect(dead_code, reason = "it exists for the API document alone")]
struct AttemptBegun {
    /// The attempt, counted from 1.
    attempt: i32,
    /// The worker that makes this attempt.
    worker: Uuid,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "it exists for the API document alone")]
struct PhaseBegun {
    phase: Phase,
}

/// A shard of a phase, and the worker that computed it.
#[derive(ToSchema)]
#[expect(dead_code, reason = "it exists for the API document alone")]
struct ShardOf {
    phase: Phase,
    index: usize,
    /// The number of shards of the phase.
    count: usize,
    worker: Uuid,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "it exists for the API document alone")]
struct AttemptFailed {
    attempt: i32,
    error: JobError,
}

#[derive(ToSchema)]
#[expect(dead_code, reason = "it exists for the API document alone")]
struct AttemptEnded {
    /// The attempt; left out if none was in progress.
    #[schema(nullable = false)]
    attempt: Option<i32>,
}

/// One event of the stream that `Accept: text/event-stream` asks for. `event` and `id` are lines of their own, and
/// `data` is JSON in one line.
#[derive(ToSchema)]
#[serde(untagged)]
#[expect(dead_code, reason = "it exists for the API document alone")]
enum JobStreamEvent {
    Told(StreamedEvent),
    Progress(StreamedProgress),
}

/// An event of the job.
#[derive(ToSchema)]
#[expect(dead_code, reason = "it exists for the API document alone")]
struct StreamedEvent {
    /// `seq` of the event, for `Last-Event-ID`.
    id: String,
    event: EventKind,
    data: JobEvent,
}

/// The job's progress, sent between two events.
#[derive(ToSchema)]
#[expect(dead_code, reason = "it exists for the API document alone")]
struct StreamedProgress {
    event: ProgressEvent,
    data: JobProgress,
}

/// The name of progress events in the stream.
#[derive(ToSchema)]
#[serde(rename_all = "snake_case")]
#[expect(dead_code, reason = "it exists for the API document alone")]
enum ProgressEvent {
    Progress,
}

/// The schema name of the data of an event kind.
fn data(kind: EventKind) -> &'static str {
    match kind {
        EventKind::Queued | EventKind::RetryRequested | EventKind::CancelRequested => "NothingMore",
        EventKind::Started => "AttemptBegun",
        EventKind::Phase => "PhaseBegun",
        EventKind::Shard | EventKind::ShardLost => "ShardOf",
        EventKind::Estimate => "Estimate",
        EventKind::Epoch => "Epoch",
        EventKind::Retried | EventKind::Lost | EventKind::Failed => "AttemptFailed",
        EventKind::Released | EventKind::Cancelled | EventKind::Succeeded => "AttemptEnded",
    }
}

/// Makes `JobEvent` a choice of one schema for each kind, and adds the schemas of streams.
pub(super) fn describe(document: &mut OpenApi) {
    document.merge(Schemas::openapi());
    let schemas = &mut document.components.get_or_insert_default().schemas;
    let mut events = OneOfBuilder::new().description(Some("Something that happened to a job"));
    let mut discriminator = Discriminator::new("kind");
    for kind in EventKind::ALL {
        let name = format!("{kind:?}Event");
        schemas.insert(name.clone(), event(*kind).into());
        let reference = Ref::from_schema_name(&name);
        let location = reference.ref_location.clone();
        discriminator
            .mapping
            .insert(kind.name().to_owned(), location);
        events = events.item(reference);
    }
    let events = events.discriminator(Some(discriminator)).build();
    schemas.insert("JobEvent".to_owned(), RefOr::T(Schema::OneOf(events)));
    let stream = ContentBuilder::new()
        .schema(Some(Ref::from_schema_name("JobStreamEvent")))
        .build();
    for (_, _, operation) in operations(document) {
        for response in operation.responses.responses.values_mut() {
            if let RefOr::T(response) = response
                && let Some(content) = response.content.get_mut(STREAM)
            {
                *content = RefOr::T(stream.clone());
            }
        }
    }
}

fn event(kind: EventKind) -> Object {
    let number = ObjectBuilder::new()
        .schema_type(Type::Integer)
        .format(Some(SchemaFormat::KnownFormat(KnownFormat::Int32)))
        .description(Some("Counted from 1 within the job"))
        .build();
    let at = ObjectBuilder::new()
        .schema_type(Type::String)
        .format(Some(SchemaFormat::KnownFormat(KnownFormat::DateTime)))
        .build();
    let kind_of = ObjectBuilder::new()
        .schema_type(Type::String)
        .enum_values(Some([kind.name()]))
        .build();
    ObjectBuilder::new()
        .property("seq", number)
        .property("at", at)
        .property("kind", kind_of)
        .property("data", Ref::from_schema_name(data(kind)))
        .required("seq")
        .required("at")
        .required("kind")
        .required("data")
        .build()
}
