-- Watching a job, trying it again, and not computing twice what was computed.

ALTER TABLE job
    -- When the phase in work began: with `progress_at`, how fast it goes.
    ADD COLUMN phase_started_at timestamptz,
    -- The job that this one repeats, to see whether the answer is the same.
    ADD COLUMN replay_of uuid,
    ADD CONSTRAINT job_replay_of_fkey FOREIGN KEY (project_id, replay_of) REFERENCES job (project_id, id);

-- `retry_requested`: somebody put a failed or cancelled job back into the queue.
ALTER TABLE job_event
    DROP CONSTRAINT job_event_kind_check,
    ADD CONSTRAINT job_event_kind_check CHECK (kind IN (
        'queued', 'started', 'phase', 'retried', 'lost', 'released', 'retry_requested',
        'cancel_requested', 'cancelled', 'failed', 'succeeded'
    ));
