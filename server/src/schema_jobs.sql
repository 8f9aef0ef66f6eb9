-- Jobs that can be put aside, and what came of those that have ended.

ALTER TABLE jobs ADD COLUMN pause_asked INTEGER NOT NULL DEFAULT 0;
ALTER TABLE jobs ADD COLUMN outcome TEXT;

-- What a job that has not ended needs must stay.
CREATE VIEW unfinished_jobs AS SELECT * FROM jobs WHERE state IN ('queued', 'preparing', 'running', 'paused');
