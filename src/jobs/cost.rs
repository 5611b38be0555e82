//! The estimated cost of an ensemble, before it is posted.

use serde::Serialize;
use sqlx::PgConnection;
use utoipa::ToSchema;
use uuid::Uuid;

use crate::db::DbError;
use promptweave_domain::job::EnsembleSpec;
use promptweave_domain::specification::Specification as _;

#[derive(Clone, Debug, PartialEq, Serialize, ToSchema)]
pub struct Cost {
    /// The numbers of images (N) and sources (M).
    pub images: u64,
    pub sources: usize,
    /// N · M: how many times an image goes through the backbone forward for `features` and, if the method takes
    /// gradients, forward and backward for `gradients`.
    pub image_passes: u64,
    /// Estimated seconds on one worker, at the speed of the last five ensembles with the same method on this backbone;
    /// null if there are none.
    pub seconds: Option<f64>,
    /// Jobs that wait now, of all projects.
    pub queued: i64,
}

pub async fn estimate(
    conn: &mut PgConnection,
    project_id: Uuid,
    spec: &EnsembleSpec,
) -> Result<Cost, DbError> {
    let row = sqlx::query!(
        r#"
        SELECT
            -- Equal packs may be versions of several datasets.
            (SELECT sum(images::bigint)::bigint
             FROM jsonb_array_elements_text((
                 SELECT v.class_counts->$2 FROM dataset_version v
                 WHERE v.project_id = $1 AND v.digest = $3
                 LIMIT 1
             )) AS images) AS images,
            (SELECT avg(seconds / passes) FROM (
                SELECT extract(epoch FROM finished_at - started_at)::float8 AS seconds,
                       (result->'diagnostics'->>'num_samples')::float8
                           * jsonb_array_length(result->'source_weights') AS passes
                FROM job
                WHERE project_id = $1 AND kind = $4 AND state = 'succeeded'
                  AND spec->'backbone'->>'digest' = $5 AND spec->'solved_from' IS NULL
                  AND coalesce(spec->'objective'->>'method', 'hgprompt_cv') = $6
                ORDER BY id DESC
                LIMIT 5
            ) AS last WHERE passes > 0) AS seconds_a_pass,
            (SELECT count(*) FROM job WHERE state = 'queued') AS "queued!"
        "#,
        project_id,
        spec.target.samples.split.name(),
        spec.target.digest.as_bytes(),
        EnsembleSpec::KIND,
        spec.backbone.digest.to_string(),
        spec.objective.method().to_string(),
    )
    .fetch_one(conn)
    .await?;
    let there = row.images.and_then(|images| u64::try_from(images).ok());
    let images = there
        .unwrap_or(u64::MAX)
        .min(spec.target.samples.max_samples as u64);
    let image_passes = images * spec.sources.len() as u64;
    Ok(Cost {
        images,
        sources: spec.sources.len(),
        image_passes,
        seconds: row
            .seconds_a_pass
            .map(|seconds| seconds * image_passes as f64),
        queued: row.queued,
    })
}
