-- What a classification job's head is worth on its validation rows; written when the job succeeds.
ALTER TABLE jobs ADD COLUMN result TEXT;
