-- Keys of clients. The secret itself is stored nowhere: a copy of this table opens nothing.

CREATE TABLE api_key (
    -- Also the readable part of the key: pr_<id>_<secret><checksum>.
    id            uuid        NOT NULL,
    project_id    uuid        NOT NULL,
    -- What it is for, in its maker's words.
    name          text        NOT NULL,
    -- Of 256 random bits, which no dictionary holds: salt and slow hashing would add nothing.
    secret_sha256 bytea       NOT NULL,
    scopes        text[]      NOT NULL,
    created_at    timestamptz NOT NULL DEFAULT now(),
    -- Written at most once a minute.
    last_used_at  timestamptz,
    -- Revoked keys stay, so that what they did can be told apart later.
    revoked_at    timestamptz,
    CONSTRAINT api_key_pkey                PRIMARY KEY (id),
    CONSTRAINT api_key_id_key              UNIQUE (project_id, id),
    CONSTRAINT api_key_project_id_fkey     FOREIGN KEY (project_id) REFERENCES project (id),
    CONSTRAINT api_key_name_check          CHECK (char_length(name) BETWEEN 1 AND 128),
    CONSTRAINT api_key_secret_sha256_check CHECK (octet_length(secret_sha256) = 32),
    CONSTRAINT api_key_scopes_check        CHECK (
        cardinality(scopes) >= 1 AND scopes <@ ARRAY['read', 'write', 'run', 'admin']
    )
);
