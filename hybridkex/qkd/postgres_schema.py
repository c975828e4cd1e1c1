"""The tables of the key store in PostgreSQL."""

from typing import Final

SCHEMA_VERSION: Final = 3
"""Column ``version`` of ``hybridkex_meta``."""

_NOW: Final = "extract(epoch FROM clock_timestamp())"
"""Seconds since the epoch by the database's clock, which all processes share."""

_SCOPE: Final = "current_setting('hybridkex.link', true)"

TABLES: Final = (
    """CREATE TABLE hybridkex_meta (
        single boolean PRIMARY KEY DEFAULT true CHECK (single),
        version integer NOT NULL,
        kme text NOT NULL,
        seal bytea NOT NULL
    )""",
    # Rows that are updated leave room for their new version.
    f"""CREATE TABLE material (
        seq bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        link text NOT NULL,
        key_id text NOT NULL,
        half smallint NOT NULL CHECK (half IN (0, 1)),
        shared boolean NOT NULL,
        created double precision NOT NULL DEFAULT {_NOW},
        sealed bytea NOT NULL,
        holder text,
        held_until timestamptz,
        UNIQUE (link, key_id),
        CHECK ((holder IS NULL) = (held_until IS NULL))
    ) WITH (fillfactor = 70)""",
    "CREATE INDEX material_order ON material (link, half, seq)",
    "CREATE INDEX material_age ON material (created)",
    f"""CREATE TABLE spent (
        link text NOT NULL,
        key_id text NOT NULL,
        at double precision NOT NULL DEFAULT {_NOW},
        PRIMARY KEY (link, key_id)
    )""",
    "CREATE INDEX spent_age ON spent (at)",
    # A key is promised at most once to each SAE, is there until it ends, and ends once.
    f"""CREATE TABLE grants (
        link text NOT NULL,
        key_id text NOT NULL,
        slave text NOT NULL,
        master text NOT NULL,
        created double precision NOT NULL DEFAULT {_NOW},
        sealed bytea,
        ended text CHECK (ended IN ('delivered', 'void', 'expired')),
        blocks integer NOT NULL CHECK (blocks > 0),
        PRIMARY KEY (link, key_id, slave),
        CHECK ((sealed IS NULL) = (ended IS NOT NULL))
    ) WITH (fillfactor = 70)""",
    "CREATE INDEX grants_waiting ON grants (created) WHERE ended IS NULL",
    "CREATE INDEX grants_ended ON grants (created) WHERE ended IS NOT NULL",
    # Changes of the sizes of each link. Their sum is the size. One row for each link would be a
    # lock for which all deliveries had to wait until the commit of the one before.
    """CREATE TABLE stock (
        link text NOT NULL,
        free bigint NOT NULL,
        promised bigint NOT NULL
    )""",
    "CREATE INDEX stock_link ON stock (link)",
    """CREATE FUNCTION material_changed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF TG_OP = 'INSERT' THEN
            INSERT INTO stock SELECT link, count(*), 0 FROM changed GROUP BY link;
        ELSE
            INSERT INTO stock SELECT link, -count(*), 0 FROM changed GROUP BY link;
        END IF;
        RETURN NULL;
    END $$""",
    """CREATE TRIGGER material_added AFTER INSERT ON material
        REFERENCING NEW TABLE AS changed
        FOR EACH STATEMENT EXECUTE FUNCTION material_changed()""",
    """CREATE TRIGGER material_gone AFTER DELETE ON material
        REFERENCING OLD TABLE AS changed
        FOR EACH STATEMENT EXECUTE FUNCTION material_changed()""",
    """CREATE FUNCTION grants_changed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF TG_OP = 'INSERT' THEN
            INSERT INTO stock SELECT link, 0, sum(blocks) FROM changed
                WHERE ended IS NULL GROUP BY link;
        ELSE
            INSERT INTO stock SELECT link, 0, -sum(blocks) FROM changed
                WHERE ended IS NULL GROUP BY link;
        END IF;
        RETURN NULL;
    END $$""",
    """CREATE FUNCTION grants_over() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
        IF OLD.ended IS NOT NULL OR NEW.ended IS NULL THEN
            RAISE 'a key that has ended cannot change' USING ERRCODE = 'check_violation';
        END IF;
        INSERT INTO stock VALUES (OLD.link, 0, -OLD.blocks);
        RETURN NULL;
    END $$""",
    """CREATE TRIGGER grants_added AFTER INSERT ON grants
        REFERENCING NEW TABLE AS changed
        FOR EACH STATEMENT EXECUTE FUNCTION grants_changed()""",
    """CREATE TRIGGER grants_gone AFTER DELETE ON grants
        REFERENCING OLD TABLE AS changed
        FOR EACH STATEMENT EXECUTE FUNCTION grants_changed()""",
    """CREATE TRIGGER grants_over AFTER UPDATE ON grants
        FOR EACH ROW EXECUTE FUNCTION grants_over()""",
    *(
        statement
        for table in ("material", "grants", "spent", "stock")
        for statement in (
            f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
            f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY",
            f"CREATE POLICY of_the_link ON {table} USING (link = {_SCOPE} OR {_SCOPE} = '*')",
        )
    ),
)
"""Statements that create the tables of version 1, in one transaction."""


def _differ(columns: str) -> str:
    names = columns.split()
    old, new = (", ".join(f"{row}.{name}" for name in names) for row in ("OLD", "NEW"))
    return f"({old}) IS DISTINCT FROM ({new})"


SINCE: Final = {
    2: (
        # A move of another store's keys into this one: the two stores' IDs, and whether it is
        # complete.
        "ALTER TABLE hybridkex_meta ADD COLUMN id uuid NOT NULL DEFAULT gen_random_uuid()",
        "ALTER TABLE hybridkex_meta ADD COLUMN source text",
        "ALTER TABLE hybridkex_meta ADD COLUMN moved boolean NOT NULL DEFAULT false",
        # The sealing keys; the generation tells every transaction whether they have changed.
        "ALTER TABLE hybridkex_meta ADD COLUMN generation integer NOT NULL DEFAULT 0",
        "ALTER TABLE hybridkex_meta ADD COLUMN former bytea[] NOT NULL DEFAULT '{}'",
        "ALTER TABLE hybridkex_meta ADD COLUMN retired bytea[] NOT NULL DEFAULT '{}'",
        "ALTER TABLE hybridkex_meta ADD COLUMN changed timestamptz NOT NULL DEFAULT 'epoch'",
        # A promise that is encrypted anew stays the same.
        """CREATE OR REPLACE FUNCTION grants_over() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF (OLD.link, OLD.key_id, OLD.slave, OLD.master, OLD.created, OLD.blocks)
                IS DISTINCT FROM
                (NEW.link, NEW.key_id, NEW.slave, NEW.master, NEW.created, NEW.blocks) THEN
                RAISE 'a promise cannot change' USING ERRCODE = 'check_violation';
            END IF;
            IF OLD.ended IS NOT NULL THEN
                RAISE 'a key that has ended cannot change' USING ERRCODE = 'check_violation';
            END IF;
            IF NEW.ended IS NOT NULL THEN
                INSERT INTO stock VALUES (OLD.link, 0, -OLD.blocks);
            END IF;
            RETURN NULL;
        END $$""",
        # What one process does for all: when it is due again.
        """CREATE TABLE hybridkex_jobs (
            job text PRIMARY KEY,
            due timestamptz NOT NULL
        )""",
    ),
    3: (
        # To find rows by their IDs, the planner would scan all rows of a link through an index that
        # begins with the link, as long as its statistics say that the table is small.
        "ALTER TABLE material DROP CONSTRAINT material_link_key_id_key, ADD UNIQUE (key_id, link)",
        "ALTER TABLE spent DROP CONSTRAINT spent_pkey, ADD PRIMARY KEY (key_id, link)",
        "ALTER TABLE grants DROP CONSTRAINT grants_pkey, ADD PRIMARY KEY (key_id, link, slave)",
        # A row keeps its identity. A promise ends once. A key is delivered to its own SAE only.
        """CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            RAISE 'a row of % cannot change so', TG_TABLE_NAME USING ERRCODE = 'check_violation';
        END $$""",
        *(
            f"CREATE TRIGGER {name} BEFORE UPDATE ON {table} FOR EACH ROW WHEN ({condition})"
            " EXECUTE FUNCTION refuse_change()"
            for name, table, condition in (
                ("material_fixed", "material", _differ("link key_id half shared created")),
                ("spent_fixed", "spent", _differ("link key_id")),
                ("grants_fixed", "grants", _differ("link key_id slave master created blocks")),
                ("grants_final", "grants", "OLD.ended IS NOT NULL"),
                (
                    "grants_own",
                    "grants",
                    "NEW.ended = 'delivered' AND"
                    " OLD.slave IS DISTINCT FROM current_setting('hybridkex.sae', true)",
                ),
            )
        ),
        "DROP TRIGGER grants_over ON grants",
        "DROP FUNCTION grants_over",
        """CREATE FUNCTION grants_over() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO stock SELECT link, 0, sum(change) FROM (
                SELECT link, -blocks AS change FROM was WHERE ended IS NULL
                UNION ALL SELECT link, blocks FROM now WHERE ended IS NULL
            ) AS changes GROUP BY link HAVING sum(change) != 0;
            RETURN NULL;
        END $$""",
        """CREATE TRIGGER grants_over AFTER UPDATE ON grants
            REFERENCING OLD TABLE AS was NEW TABLE AS now
            FOR EACH STATEMENT EXECUTE FUNCTION grants_over()""",
    ),
}
"""The statements that each later version adds, in the same transaction."""
