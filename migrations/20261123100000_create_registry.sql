-- The registry: what prompts, backbones and data sets there are, and what was made from what.
--
-- Conventions of this schema
--   * Every unique key carries `project_id`; until projects have an API there is one, `default`.
--   * Constraints are named <table>_<columns>_{key,fkey,check}: the program maps them to errors by
--     name, so a name is part of the interface.
--   * A sha256 is 32 bytes of bytea; it is written `sha256:<hex>` outside the database.
--   * Ids are UUID v7, made by the program, so they sort by creation time.
--   * Assets are immutable: a version's row is never updated, except for its deprecation.

CREATE TABLE project (
    id         uuid        NOT NULL,
    name       text        NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT project_pkey       PRIMARY KEY (id),
    CONSTRAINT project_name_key   UNIQUE (name),
    CONSTRAINT project_name_check CHECK (name ~ '^[a-z0-9][a-z0-9._-]{0,127}$')
);

-- The id is also a constant of the program (registry::DEFAULT_PROJECT).
INSERT INTO project (id, name) VALUES ('00000000-0000-7000-8000-000000000001', 'default');

-- Small immutable files (prompt files, about 150 KB), so that `pg_dump` alone is a whole backup of
-- them. Large ones (backbones, packed data sets, statistics) are in the blob store by the same kind
-- of key. Shared by all projects: equal bytes are one row.
CREATE TABLE blob (
    sha256     bytea       NOT NULL,
    bytes      bytea       NOT NULL,
    size       bigint      NOT NULL GENERATED ALWAYS AS (octet_length(bytes)) STORED,
    created_at timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT blob_pkey         PRIMARY KEY (sha256),
    CONSTRAINT blob_sha256_check CHECK (octet_length(sha256) = 32)
);
-- Floating-point noise does not compress; do not try on every write.
ALTER TABLE blob ALTER COLUMN bytes SET STORAGE EXTERNAL;

-- A frozen ViT. The weights are in the blob store under `model_sha256`; `digest` says what they
-- *are* (names, shapes and f32 values, whatever the file looks like).
CREATE TABLE backbone (
    id               uuid        NOT NULL,
    project_id       uuid        NOT NULL,
    name             text        NOT NULL,
    digest           bytea       NOT NULL,
    preprocessing_id text        NOT NULL,
    embed_dim        integer     NOT NULL,
    config           jsonb       NOT NULL,
    model_sha256     bytea       NOT NULL,
    model_size       bigint      NOT NULL,
    created_at       timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT backbone_pkey              PRIMARY KEY (id),
    CONSTRAINT backbone_project_id_fkey   FOREIGN KEY (project_id) REFERENCES project (id),
    CONSTRAINT backbone_name_key          UNIQUE (project_id, name),
    -- The same weights with the same preprocessing are one backbone: a prompt finds it by this pair.
    CONSTRAINT backbone_digest_key        UNIQUE (project_id, digest, preprocessing_id),
    CONSTRAINT backbone_name_check        CHECK (name ~ '^[a-z0-9][a-z0-9._-]{0,127}$'),
    CONSTRAINT backbone_digest_check      CHECK (octet_length(digest) = 32),
    CONSTRAINT backbone_model_sha256_check CHECK (octet_length(model_sha256) = 32),
    CONSTRAINT backbone_embed_dim_check   CHECK (embed_dim > 0)
);

-- Labelled images under a name; what they are is in the versions.
CREATE TABLE dataset (
    id          uuid        NOT NULL,
    project_id  uuid        NOT NULL,
    name        text        NOT NULL,
    created_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT dataset_pkey            PRIMARY KEY (id),
    CONSTRAINT dataset_project_id_fkey FOREIGN KEY (project_id) REFERENCES project (id),
    CONSTRAINT dataset_name_key        UNIQUE (project_id, name),
    CONSTRAINT dataset_id_key          UNIQUE (project_id, id),
    CONSTRAINT dataset_name_check      CHECK (name ~ '^[a-z0-9][a-z0-9._-]{0,127}$')
);

CREATE TABLE dataset_version (
    id           uuid        NOT NULL,
    project_id   uuid        NOT NULL,
    dataset_id   uuid        NOT NULL,
    version      integer     NOT NULL,
    -- Of the packed images (a tar in the blob store): key and content address in one.
    digest       bytea       NOT NULL,
    size         bigint      NOT NULL,
    -- Class names in label order.
    classes      jsonb       NOT NULL,
    -- {"train": [12, 9, …], …}: images of each split by class, in label order.
    class_counts jsonb       NOT NULL,
    -- Unreadable images left out when it was packed.
    skipped      integer     NOT NULL,
    created_at   timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT dataset_version_pkey            PRIMARY KEY (id),
    CONSTRAINT dataset_version_dataset_id_fkey FOREIGN KEY (project_id, dataset_id)
                                               REFERENCES dataset (project_id, id),
    CONSTRAINT dataset_version_version_key     UNIQUE (project_id, dataset_id, version),
    CONSTRAINT dataset_version_digest_key      UNIQUE (project_id, dataset_id, digest),
    CONSTRAINT dataset_version_version_check   CHECK (version >= 1),
    CONSTRAINT dataset_version_digest_check    CHECK (octet_length(digest) = 32),
    CONSTRAINT dataset_version_skipped_check   CHECK (skipped >= 0)
);

-- A prompt asset's name and description; what was published under it is in the versions.
CREATE TABLE prompt (
    id          uuid        NOT NULL,
    project_id  uuid        NOT NULL,
    name        text        NOT NULL,
    description text        NOT NULL DEFAULT '',
    -- {"key": "value", …}
    tags        jsonb       NOT NULL DEFAULT '{}',
    created_at  timestamptz NOT NULL DEFAULT now(),
    CONSTRAINT prompt_pkey            PRIMARY KEY (id),
    CONSTRAINT prompt_project_id_fkey FOREIGN KEY (project_id) REFERENCES project (id),
    CONSTRAINT prompt_name_key        UNIQUE (project_id, name),
    CONSTRAINT prompt_id_key          UNIQUE (project_id, id),
    CONSTRAINT prompt_name_check      CHECK (name ~ '^[a-z0-9][a-z0-9._-]{0,127}$'),
    CONSTRAINT prompt_tags_check      CHECK (jsonb_typeof(tags) = 'object')
);

CREATE TABLE prompt_version (
    id               uuid        NOT NULL,
    project_id       uuid        NOT NULL,
    prompt_id        uuid        NOT NULL,
    version          integer     NOT NULL,
    sha256           bytea       NOT NULL,
    -- How it came to be: `uploaded`, `tuned` (by `promptweave tune`) or `composed` (by an ensemble).
    origin           text        NOT NULL,
    num_tokens       integer     NOT NULL,
    embed_dim        integer     NOT NULL,
    -- `shallow`: tokens at the input alone; `deep`: at every block.
    depth            text        NOT NULL,
    -- Of the stored tensor: `f32`, `f16` or `bf16`.
    dtype            text        NOT NULL,
    -- What the prompt was trained for; null where neither the file nor the client said.
    backbone_digest  bytea,
    preprocessing_id text,
    -- An unsigned 64-bit number, which bigint does not hold.
    init_seed        numeric(20, 0),
    task             text,
    classes          jsonb,
    training         jsonb,
    -- At most one version per job: what makes a job's result impossible to publish twice.
    produced_by_job  uuid,
    created_at       timestamptz NOT NULL DEFAULT now(),
    -- Deprecated versions are not chosen by a bare name; they stay readable for ever.
    deprecated_at    timestamptz,
    CONSTRAINT prompt_version_pkey                  PRIMARY KEY (id),
    CONSTRAINT prompt_version_prompt_id_fkey        FOREIGN KEY (project_id, prompt_id)
                                                    REFERENCES prompt (project_id, id),
    CONSTRAINT prompt_version_sha256_fkey           FOREIGN KEY (sha256) REFERENCES blob (sha256),
    CONSTRAINT prompt_version_version_key           UNIQUE (project_id, prompt_id, version),
    CONSTRAINT prompt_version_sha256_key            UNIQUE (project_id, prompt_id, sha256),
    CONSTRAINT prompt_version_produced_by_job_key   UNIQUE (project_id, produced_by_job),
    CONSTRAINT prompt_version_id_key                UNIQUE (project_id, id),
    CONSTRAINT prompt_version_version_check         CHECK (version >= 1),
    CONSTRAINT prompt_version_origin_check          CHECK (origin IN ('uploaded', 'tuned', 'composed')),
    CONSTRAINT prompt_version_depth_check           CHECK (depth IN ('shallow', 'deep')),
    CONSTRAINT prompt_version_dtype_check           CHECK (dtype IN ('f32', 'f16', 'bf16')),
    CONSTRAINT prompt_version_num_tokens_check      CHECK (num_tokens > 0),
    CONSTRAINT prompt_version_embed_dim_check       CHECK (embed_dim > 0),
    CONSTRAINT prompt_version_init_seed_check       CHECK (init_seed BETWEEN 0 AND 18446744073709551615),
    CONSTRAINT prompt_version_backbone_digest_check CHECK (octet_length(backbone_digest) = 32)
);
-- "Which prompts fit this backbone?"
CREATE INDEX prompt_version_backbone_digest_idx ON prompt_version (project_id, backbone_digest);

-- child = Σ weight · parent: which versions a composed prompt was made of, and how strongly.
CREATE TABLE lineage (
    project_id uuid             NOT NULL,
    child      uuid             NOT NULL,
    parent     uuid             NOT NULL,
    weight     double precision NOT NULL,
    CONSTRAINT lineage_pkey         PRIMARY KEY (project_id, child, parent),
    CONSTRAINT lineage_child_fkey   FOREIGN KEY (project_id, child)
                                    REFERENCES prompt_version (project_id, id),
    CONSTRAINT lineage_parent_fkey  FOREIGN KEY (project_id, parent)
                                    REFERENCES prompt_version (project_id, id),
    CONSTRAINT lineage_weight_check CHECK (weight BETWEEN 0 AND 1),
    CONSTRAINT lineage_self_check   CHECK (child <> parent)
);
-- "What was made from this one?"
CREATE INDEX lineage_parent_idx ON lineage (project_id, parent);
