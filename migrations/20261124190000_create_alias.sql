-- Aliases: movable names of a prompt's versions, and what happened to them.

-- Counts the changes of what the prompt's resource shows: its ETag.
ALTER TABLE prompt ADD COLUMN revision bigint NOT NULL DEFAULT 1;

CREATE TABLE alias (
    project_id uuid        NOT NULL,
    prompt_id  uuid        NOT NULL,
    name       text        NOT NULL,
    version    integer     NOT NULL,
    -- A protected alias is neither moved nor deleted until it is unprotected.
    protected  boolean     NOT NULL DEFAULT false,
    -- Of the last event: the alias's ETag. It goes on counting when an alias is deleted and made
    -- again, so that an old ETag never fits a new alias.
    seq        integer     NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT alias_pkey         PRIMARY KEY (project_id, prompt_id, name),
    CONSTRAINT alias_version_fkey FOREIGN KEY (project_id, prompt_id, version)
                                  REFERENCES prompt_version (project_id, prompt_id, version),
    -- Reads neither as a number nor as a digest.
    CONSTRAINT alias_name_check   CHECK (
        name ~ '^[a-z0-9][a-z0-9._-]{0,127}$' AND name !~ '^[0-9]+$' AND name !~ '^sha256'
    )
);

-- Who did what to an alias. Written in the transaction that did it, which holds the prompt's row, so
-- that numbers have no gaps; never deleted, even when the alias is.
CREATE TABLE alias_event (
    project_id   uuid        NOT NULL,
    prompt_id    uuid        NOT NULL,
    alias        text        NOT NULL,
    seq          integer     NOT NULL,
    at           timestamptz NOT NULL DEFAULT now(),
    kind         text        NOT NULL,
    -- Null before it was created, and after it was deleted.
    from_version integer,
    to_version   integer,
    request_id   text        NOT NULL,
    -- The API key it came with; null where the server asks for none.
    key_id       uuid,
    CONSTRAINT alias_event_pkey           PRIMARY KEY (project_id, prompt_id, alias, seq),
    CONSTRAINT alias_event_prompt_id_fkey FOREIGN KEY (project_id, prompt_id)
                                          REFERENCES prompt (project_id, id),
    CONSTRAINT alias_event_seq_check      CHECK (seq >= 1),
    CONSTRAINT alias_event_kind_check
        CHECK (kind IN ('created', 'moved', 'protected', 'unprotected', 'deleted')),
    CONSTRAINT alias_event_version_check  CHECK (
        (kind = 'created') = (from_version IS NULL) AND (kind = 'deleted') = (to_version IS NULL)
    )
);
