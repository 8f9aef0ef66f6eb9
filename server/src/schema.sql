-- The first version of the schema. Later versions are further files applied in order; this one is never edited after a release.
-- Times are Unix milliseconds. JSON columns are read whole by the code that wrote them and never queried into.

CREATE TABLE tenants (
    id           TEXT PRIMARY KEY,
    display_name TEXT NOT NULL,
    create_time  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- A key with no tenant is a service or admin key. Only the hash of the secret is kept.
CREATE TABLE api_keys (
    id            TEXT PRIMARY KEY,
    tenant        TEXT REFERENCES tenants (id) ON DELETE CASCADE,
    role          TEXT NOT NULL,
    tenants       TEXT NOT NULL,
    secret_sha256 BLOB NOT NULL,
    display_name  TEXT NOT NULL,
    create_time   INTEGER NOT NULL,
    expire_time   INTEGER,
    revoke_time   INTEGER
) STRICT, WITHOUT ROWID;
CREATE INDEX api_keys_by_tenant ON api_keys (tenant, id);

-- next_version only ever grows, so that a number is never given twice. revision is the etag.
CREATE TABLE adapters (
    id           INTEGER PRIMARY KEY,
    tenant       TEXT NOT NULL REFERENCES tenants (id),
    adapter      TEXT NOT NULL,
    uid          TEXT NOT NULL,
    description  TEXT NOT NULL,
    next_version INTEGER NOT NULL,
    revision     INTEGER NOT NULL,
    create_time  INTEGER NOT NULL,
    update_time  INTEGER NOT NULL,
    UNIQUE (tenant, adapter)
) STRICT;

-- Everything but state and error is written once.
CREATE TABLE versions (
    adapter     INTEGER NOT NULL REFERENCES adapters (id) ON DELETE CASCADE,
    number      INTEGER NOT NULL,
    uid         TEXT NOT NULL,
    state       TEXT NOT NULL,
    error       TEXT,
    digest      BLOB NOT NULL,
    size        INTEGER NOT NULL,
    base_name   TEXT NOT NULL,
    base_digest TEXT NOT NULL,
    profile     TEXT NOT NULL,
    summary     TEXT NOT NULL,
    report      TEXT NOT NULL,
    provenance  TEXT NOT NULL,
    metrics     TEXT NOT NULL,
    create_time INTEGER NOT NULL,
    PRIMARY KEY (adapter, number)
) STRICT, WITHOUT ROWID;
CREATE INDEX versions_by_digest ON versions (digest);

CREATE TABLE aliases (
    adapter INTEGER NOT NULL REFERENCES adapters (id) ON DELETE CASCADE,
    alias   TEXT NOT NULL,
    number  INTEGER NOT NULL,
    PRIMARY KEY (adapter, alias),
    FOREIGN KEY (adapter, number) REFERENCES versions (adapter, number)
) STRICT, WITHOUT ROWID;
CREATE INDEX aliases_by_version ON aliases (adapter, number);

CREATE TABLE datasets (
    tenant      TEXT NOT NULL REFERENCES tenants (id),
    dataset     TEXT NOT NULL,
    uid         TEXT NOT NULL,
    digest      BLOB NOT NULL,
    size        INTEGER NOT NULL,
    shape       TEXT NOT NULL,
    create_time INTEGER NOT NULL,
    PRIMARY KEY (tenant, dataset)
) STRICT, WITHOUT ROWID;
CREATE INDEX datasets_by_digest ON datasets (digest);

-- spec is the frozen, fully defaulted description of the work; data its rows' digest (kept even when the dataset is deleted).
CREATE TABLE jobs (
    id            INTEGER PRIMARY KEY,
    tenant        TEXT NOT NULL REFERENCES tenants (id),
    job           TEXT NOT NULL,
    uid           TEXT NOT NULL,
    state         TEXT NOT NULL,
    error         TEXT,
    spec          TEXT NOT NULL,
    stats         TEXT NOT NULL,
    adapter       INTEGER REFERENCES adapters (id) ON DELETE SET NULL,
    from_version  TEXT,
    train_digest  BLOB NOT NULL,
    valid_digest  BLOB,
    version       TEXT,
    progress      TEXT NOT NULL,
    next_seq      INTEGER NOT NULL,
    attempt       INTEGER NOT NULL,
    cancel_asked  INTEGER NOT NULL,
    create_time   INTEGER NOT NULL,
    start_time    INTEGER,
    end_time      INTEGER,
    update_time   INTEGER NOT NULL,
    UNIQUE (tenant, job)
) STRICT;
CREATE INDEX jobs_by_state ON jobs (state, id);

CREATE TABLE job_events (
    job  INTEGER NOT NULL REFERENCES jobs (id) ON DELETE CASCADE,
    seq  INTEGER NOT NULL,
    time INTEGER NOT NULL,
    body TEXT NOT NULL,
    PRIMARY KEY (job, seq)
) STRICT, WITHOUT ROWID;

-- At most one row a job: the newest checkpoint. Its bytes are stored before the row is written.
CREATE TABLE checkpoints (
    job         INTEGER PRIMARY KEY REFERENCES jobs (id) ON DELETE CASCADE,
    step        INTEGER NOT NULL,
    digest      BLOB NOT NULL,
    size        INTEGER NOT NULL,
    create_time INTEGER NOT NULL
) STRICT;

-- Idempotency: the first use of a request id fixes payload and resource.
CREATE TABLE requests (
    tenant         TEXT NOT NULL,
    method         TEXT NOT NULL,
    request_id     TEXT NOT NULL,
    payload_sha256 BLOB NOT NULL,
    resource       TEXT NOT NULL,
    create_time    INTEGER NOT NULL,
    PRIMARY KEY (tenant, method, request_id)
) STRICT, WITHOUT ROWID;
