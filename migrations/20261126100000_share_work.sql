-- A job's work is shared: `features` and `gradients` are cut into shards of samples, which whoever is idle takes beside
-- the worker that has the job, and which outlast an attempt. Small jobs have none.

-- One a phase, until now, that said nothing which the job's own row does not.
DELETE FROM job_shard;

ALTER TABLE job_shard
    -- Of the phase.
    ADD COLUMN count       integer NOT NULL,
    -- What its numbers are computed with: version, kind of device, precision. Others do not belong with them.
    ADD COLUMN arithmetic  text    NOT NULL,
    -- Who computes it, or did.
    ADD COLUMN worker_id   uuid,
    -- How much of it is done, from 0 to 1, and when that last moved.
    ADD COLUMN done        double precision NOT NULL DEFAULT 0,
    ADD COLUMN progress_at timestamptz,
    -- Its file in the blob store.
    ADD COLUMN digest      bytea,
    ADD CONSTRAINT job_shard_worker_id_fkey FOREIGN KEY (worker_id) REFERENCES worker (id),
    ADD CONSTRAINT job_shard_count_check    CHECK (index < count),
    ADD CONSTRAINT job_shard_done_check     CHECK (done BETWEEN 0 AND 1),
    ADD CONSTRAINT job_shard_digest_check   CHECK (
        (state = 'succeeded') = (digest IS NOT NULL) AND coalesce(octet_length(digest), 32) = 32
    ),
    DROP CONSTRAINT job_shard_phase_check,
    ADD CONSTRAINT job_shard_phase_check    CHECK (phase IN ('features', 'gradients')),
    -- Taken by who has the job, it has the job's token, and its lease is the job's: `lease_until` is null.
    DROP CONSTRAINT job_shard_lease_check,
    ADD CONSTRAINT job_shard_lease_check    CHECK (
        (state = 'running') = (lease_token IS NOT NULL)
        AND (lease_until IS NULL OR lease_token IS NOT NULL)
    );
CREATE INDEX job_shard_queued_idx  ON job_shard (job_id) WHERE state = 'queued';
CREATE INDEX job_shard_running_idx ON job_shard (lease_until) WHERE state = 'running';
CREATE INDEX job_shard_token_idx   ON job_shard (lease_token) WHERE state = 'running';
CREATE INDEX job_shard_digest_idx  ON job_shard (digest) WHERE state = 'succeeded';

-- `shard`: one is there; `shard_lost`: who computed it was not heard of; `estimate`: α by what is there.
ALTER TABLE job_event
    DROP CONSTRAINT job_event_kind_check,
    ADD CONSTRAINT job_event_kind_check CHECK (kind IN (
        'queued', 'started', 'phase', 'shard', 'shard_lost', 'estimate', 'retried', 'lost', 'released',
        'retry_requested', 'cancel_requested', 'cancelled', 'failed', 'succeeded'
    ));
