-- How a version is kept in memory: what its owner may change, unlike all else about a version. No row is the default: not
-- pinned, merged when it pays.

CREATE TABLE version_serving (
    adapter      INTEGER NOT NULL,
    number       INTEGER NOT NULL,
    pinned       INTEGER NOT NULL,
    merge_policy TEXT NOT NULL,
    PRIMARY KEY (adapter, number),
    FOREIGN KEY (adapter, number) REFERENCES versions (adapter, number) ON DELETE CASCADE
) STRICT, WITHOUT ROWID;
