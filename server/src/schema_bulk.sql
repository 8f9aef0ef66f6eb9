-- Bulk jobs. The first done lines of the output, output_bytes long, are durable; what lies behind them in the file is cut
-- off at the next start. expire_time is set when the job ends.
CREATE TABLE bulk_jobs (
    id             INTEGER PRIMARY KEY,
    tenant         TEXT NOT NULL REFERENCES tenants (id),
    job            TEXT NOT NULL,
    uid            TEXT NOT NULL,
    operation      TEXT NOT NULL,
    version        TEXT,
    state          TEXT NOT NULL,
    error          TEXT,
    description    TEXT NOT NULL,
    input_bytes    INTEGER NOT NULL,
    input_sha256   TEXT NOT NULL,
    items          INTEGER NOT NULL,
    done           INTEGER NOT NULL,
    failed         INTEGER NOT NULL,
    input_tokens   INTEGER NOT NULL,
    output_tokens  INTEGER NOT NULL,
    output_bytes   INTEGER NOT NULL,
    create_time    INTEGER NOT NULL,
    start_time     INTEGER,
    end_time       INTEGER,
    expire_time    INTEGER,
    UNIQUE (tenant, job)
) STRICT;
CREATE INDEX bulk_jobs_by_state ON bulk_jobs (state, id);
