-- Two more kinds of job in the one queue: a tuning trains a prompt and publishes it, a ranking scores prompts for a
-- target and publishes none. Neither leaves statistics, nor is it shared between workers.

ALTER TABLE job
    DROP CONSTRAINT job_kind_check,
    ADD CONSTRAINT job_kind_check   CHECK (kind IN ('ensemble', 'tuning', 'ranking')),
    DROP CONSTRAINT job_phase_check,
    ADD CONSTRAINT job_phase_check  CHECK (
        phase IN ('features', 'heads', 'gradients', 'solve', 'verify', 'select', 'tune')
    ),
    DROP CONSTRAINT job_result_check,
    ADD CONSTRAINT job_result_check CHECK (
        (state = 'succeeded') = (result IS NOT NULL)
        AND (state = 'succeeded' AND kind = 'ensemble') = (statistics_digest IS NOT NULL)
    );

-- `epoch`: one of a tuning is over, with its losses.
ALTER TABLE job_event
    DROP CONSTRAINT job_event_kind_check,
    ADD CONSTRAINT job_event_kind_check CHECK (kind IN (
        'queued', 'started', 'phase', 'shard', 'shard_lost', 'estimate', 'epoch', 'retried', 'lost', 'released',
        'retry_requested', 'cancel_requested', 'cancelled', 'failed', 'succeeded'
    ));

-- How far a tuning is, for the next attempt, on whatever machine that is. Gone with the end of the job.
CREATE TABLE job_checkpoint (
    job_id uuid  NOT NULL,
    -- `tuning`, or `pair-<n>` of a grid, which is a tuning of its own.
    name   text  NOT NULL,
    -- Its file in the blob store.
    digest bytea NOT NULL,
    CONSTRAINT job_checkpoint_pkey         PRIMARY KEY (job_id, name),
    CONSTRAINT job_checkpoint_job_id_fkey  FOREIGN KEY (job_id) REFERENCES job (id),
    CONSTRAINT job_checkpoint_digest_check CHECK (octet_length(digest) = 32)
);
CREATE INDEX job_checkpoint_digest_idx ON job_checkpoint (digest);

-- `start`: the prompt that a tuning began with; `source`: one that a composed prompt is a sum of.
ALTER TABLE lineage
    DROP CONSTRAINT lineage_role_check,
    ADD CONSTRAINT lineage_role_check CHECK (role IN ('source', 'start'));

ALTER TABLE webhook
    DROP CONSTRAINT webhook_event_types_check,
    ADD CONSTRAINT webhook_event_types_check CHECK (
        cardinality(event_types) >= 1
        AND event_types <@ ARRAY[
            'ensemble.succeeded', 'ensemble.failed', 'ensemble.cancelled',
            'tuning.succeeded', 'tuning.failed', 'tuning.cancelled',
            'ranking.succeeded', 'ranking.failed', 'ranking.cancelled'
        ]
    );
