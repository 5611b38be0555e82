-- Webhooks (standardwebhooks.com): who is told when an ensemble ends, and the outbox of what they are told.
--
--   a job ends ─► one row a webhook, in the same transaction ─► pending ─┬─► delivered
--                                                                 ▲ │    └─► failed: every try was in vain
--                                                                 └─┘ lease ran out, or tried again later

CREATE TABLE webhook (
    id            uuid        NOT NULL,
    project_id    uuid        NOT NULL,
    url           text        NOT NULL,
    description   text        NOT NULL DEFAULT '',
    event_types   text[]      NOT NULL,
    -- `whsec_…`, as it is: every message is signed with it. It opens nothing here; who has it can forge
    -- messages to this one receiver.
    secret        text        NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    -- Of the first try in vain since the last that was not.
    failing_since timestamptz,
    -- Since when nothing is sent or written for it: its owner said so, or its receiver (410).
    disabled_at   timestamptz,
    CONSTRAINT webhook_pkey              PRIMARY KEY (id),
    CONSTRAINT webhook_id_key            UNIQUE (project_id, id),
    CONSTRAINT webhook_project_id_fkey   FOREIGN KEY (project_id) REFERENCES project (id),
    CONSTRAINT webhook_url_check         CHECK (char_length(url) BETWEEN 1 AND 2048),
    CONSTRAINT webhook_description_check CHECK (char_length(description) <= 512),
    CONSTRAINT webhook_event_types_check CHECK (
        cardinality(event_types) >= 1
        AND event_types <@ ARRAY['ensemble.succeeded', 'ensemble.failed', 'ensemble.cancelled']
    )
);

-- The outbox. Goes with its webhook; what was delivered or given up is deleted after 30 days.
CREATE TABLE webhook_delivery (
    -- The receiver sees it as `webhook-id`, the same in every try.
    id              uuid        NOT NULL,
    project_id      uuid        NOT NULL,
    webhook_id      uuid        NOT NULL,
    -- None of a `webhook.test`.
    job_id          uuid,
    event_type      text        NOT NULL,
    -- The body, byte by byte as it is signed and sent: json keeps it so, jsonb would not.
    payload         json        NOT NULL,
    state           text        NOT NULL DEFAULT 'pending',
    -- Tries begun since it was written, or since somebody asked for it once more.
    attempt         integer     NOT NULL DEFAULT 0,
    -- Not before; the pause after a try in vain is stored here.
    next_at         timestamptz NOT NULL DEFAULT now(),
    -- Who is sending it. After that time it is anybody's again: sent twice, perhaps, and never lost.
    lease_token     uuid,
    lease_until     timestamptz,
    -- Of the last try.
    last_attempt_at timestamptz,
    last_status     integer,
    last_error      text,
    created_at      timestamptz NOT NULL DEFAULT now(),
    finished_at     timestamptz,
    CONSTRAINT webhook_delivery_pkey              PRIMARY KEY (id),
    CONSTRAINT webhook_delivery_webhook_id_fkey   FOREIGN KEY (project_id, webhook_id)
        REFERENCES webhook (project_id, id) ON DELETE CASCADE,
    CONSTRAINT webhook_delivery_job_id_fkey       FOREIGN KEY (project_id, job_id)
        REFERENCES job (project_id, id),
    CONSTRAINT webhook_delivery_state_check       CHECK (state IN ('pending', 'delivered', 'failed')),
    CONSTRAINT webhook_delivery_attempt_check     CHECK (attempt >= 0),
    CONSTRAINT webhook_delivery_lease_check       CHECK (
        (lease_token IS NULL) = (lease_until IS NULL) AND (lease_token IS NULL OR state = 'pending')
    ),
    CONSTRAINT webhook_delivery_finished_at_check CHECK ((state = 'pending') = (finished_at IS NULL))
);
-- What is due of a webhook, the longest due first.
CREATE INDEX webhook_delivery_pending_idx     ON webhook_delivery (webhook_id, next_at, id) WHERE state = 'pending';
CREATE INDEX webhook_delivery_webhook_id_idx  ON webhook_delivery (webhook_id, id);
CREATE INDEX webhook_delivery_finished_at_idx ON webhook_delivery (finished_at) WHERE state <> 'pending';
