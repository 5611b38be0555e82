-- One more kind of job: a prediction, for the images of a dataset, by a prompt with a head or an ensemble. It publishes
-- nothing, and leaves a table as a file.

-- The file that a job leaves in the blob store: the statistics of an ensemble, the table of a prediction.
ALTER TABLE job RENAME COLUMN statistics_digest TO file_digest;
ALTER TABLE job RENAME COLUMN statistics_deleted_at TO file_deleted_at;
ALTER TABLE job RENAME CONSTRAINT job_statistics_digest_check TO job_file_digest_check;
ALTER INDEX job_statistics_digest_idx RENAME TO job_file_digest_idx;

ALTER TABLE job
    DROP CONSTRAINT job_kind_check,
    ADD CONSTRAINT job_kind_check   CHECK (kind IN ('ensemble', 'tuning', 'ranking', 'prediction')),
    DROP CONSTRAINT job_result_check,
    ADD CONSTRAINT job_result_check CHECK (
        (state = 'succeeded') = (result IS NOT NULL)
        AND (state = 'succeeded' AND kind IN ('ensemble', 'prediction')) = (file_digest IS NOT NULL)
    );

ALTER TABLE webhook
    DROP CONSTRAINT webhook_event_types_check,
    ADD CONSTRAINT webhook_event_types_check CHECK (
        cardinality(event_types) >= 1
        AND event_types <@ ARRAY[
            'ensemble.succeeded', 'ensemble.failed', 'ensemble.cancelled',
            'tuning.succeeded', 'tuning.failed', 'tuning.cancelled',
            'ranking.succeeded', 'ranking.failed', 'ranking.cancelled',
            'prediction.succeeded', 'prediction.failed', 'prediction.cancelled'
        ]
    );
