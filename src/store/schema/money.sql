-- Who paid: stays when its job is removed.
CREATE TABLE payers (
    n INTEGER PRIMARY KEY,
    job TEXT NOT NULL UNIQUE,
    uid INTEGER NOT NULL,
    policy TEXT NOT NULL,
    batch TEXT,
    labels_json TEXT NOT NULL
);
INSERT INTO payers (job, uid, policy, labels_json) SELECT id, uid, policy, labels_json FROM jobs ORDER BY n;
-- A request belongs to the day on which its money was set aside, whenever it was settled.
ALTER TABLE ledger ADD COLUMN day TEXT NOT NULL DEFAULT '';
ALTER TABLE ledger ADD COLUMN credential TEXT NOT NULL DEFAULT '';
ALTER TABLE ledger ADD COLUMN provider TEXT NOT NULL DEFAULT '';
UPDATE ledger SET day = date(created_ms / 1000, 'unixepoch', 'localtime');
ALTER TABLE job_costs ADD COLUMN web_searches INTEGER NOT NULL DEFAULT 0;
ALTER TABLE model_costs ADD COLUMN web_searches INTEGER NOT NULL DEFAULT 0;
-- What was spent, one row a request: stays when its job is removed.
CREATE TABLE charges (
    id INTEGER PRIMARY KEY,
    payer INTEGER NOT NULL REFERENCES payers (n),
    at_ms INTEGER NOT NULL,
    day TEXT NOT NULL,
    model TEXT NOT NULL,
    credential TEXT NOT NULL,
    provider TEXT NOT NULL,
    charged_micro INTEGER NOT NULL CHECK (charged_micro >= 0),
    input INTEGER NOT NULL, output INTEGER NOT NULL, cache_read INTEGER NOT NULL,
    cache_write_5m INTEGER NOT NULL, cache_write_1h INTEGER NOT NULL, web_searches INTEGER NOT NULL
);
INSERT INTO charges (payer, at_ms, day, model, credential, provider, charged_micro, input, output, cache_read,
                     cache_write_5m, cache_write_1h, web_searches)
    SELECT payers.n, created_ms, day, model, '', '', coalesce(charged_micro, 0),
           coalesce(usage_json ->> 'input', 0), coalesce(usage_json ->> 'output', 0),
           coalesce(usage_json ->> 'cache_read', 0), coalesce(usage_json ->> 'cache_write_5m', 0),
           coalesce(usage_json ->> 'cache_write_1h', 0), 0
    FROM ledger JOIN payers ON payers.job = ledger.job WHERE status = 'settled' ORDER BY ledger.id;
CREATE INDEX charges_by_time ON charges (at_ms);
CREATE INDEX charges_by_payer ON charges (payer);
-- Jobs of one user that share a budget. The first job with the name decides how much; NULL: no limit.
CREATE TABLE batches (
    uid INTEGER NOT NULL,
    name TEXT NOT NULL,
    limit_micro INTEGER,
    PRIMARY KEY (uid, name)
) WITHOUT ROWID;
-- Running sums of every budget, written with each reservation and settlement, so that a decision reads one row
-- for each budget. Keys: a job's id, uid/name of a batch, day/uid, day, month.
CREATE TABLE budget_sums (
    scope TEXT NOT NULL,
    key TEXT NOT NULL,
    charged_micro INTEGER NOT NULL CHECK (charged_micro >= 0),
    reserved_micro INTEGER NOT NULL CHECK (reserved_micro >= 0),
    PRIMARY KEY (scope, key)
) WITHOUT ROWID;
INSERT INTO budget_sums
    SELECT 'job', job, sum(coalesce(charged_micro, 0)), sum(iif(status = 'open', reserved_micro, 0))
    FROM ledger GROUP BY job;
INSERT INTO budget_sums
    SELECT 'user_day', day || '/' || payers.uid, sum(coalesce(charged_micro, 0)),
           sum(iif(status = 'open', reserved_micro, 0))
    FROM ledger JOIN payers ON payers.job = ledger.job GROUP BY payers.uid, day;
INSERT INTO budget_sums
    SELECT 'day', day, sum(coalesce(charged_micro, 0)), sum(iif(status = 'open', reserved_micro, 0))
    FROM ledger GROUP BY day;
INSERT INTO budget_sums
    SELECT 'month', substr(day, 1, 7), sum(coalesce(charged_micro, 0)),
           sum(iif(status = 'open', reserved_micro, 0))
    FROM ledger GROUP BY substr(day, 1, 7);
