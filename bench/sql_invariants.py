"""The invariants of ``vllm-trace check`` as SQL over the tables of ``export --to parquet``.

What ``check`` is measured against: the same rules, asked of DuckDB on one core. For one engine
whose KV-cache groups grow at the end (no sliding window, no drafts), which is what a query can say
without keeping state. Not here, because each is a queue or a sequence to be played through:
``evict-head``, ``refusal-needed``, ``kv-events``. Less than ``check`` says: ``slot-mapping`` and
``worker-table`` compare with the manager's table where ``check`` has the worker's own row for the
first, ``tables-grow`` does not see a row that becomes shorter.

    .venv/bin/python -m bench.sql_invariants FOLDER
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from vllm_trace.export.derived import connect

SHARED = {
    # Reference counts as the events state them, block by block.
    "refs": """
        SELECT process, number, place, block, ref_cnt, what, coalesce(lag(ref_cnt) OVER (
                 PARTITION BY process, block ORDER BY number, place), 0) AS before
        FROM (SELECT process, number, generate_subscripts(blocks, 1) AS place,
                     unnest(blocks) AS block, 1 AS ref_cnt, 'taken' AS what FROM blocks_taken
              UNION ALL
              SELECT process, number, generate_subscripts(blocks, 1), unnest(blocks),
                     unnest(ref_cnts), 'touched' FROM blocks_touched
              UNION ALL
              SELECT process, number, generate_subscripts(blocks, 1), unnest(blocks),
                     unnest(ref_cnts), 'freed' FROM blocks_freed)
        WHERE block <> 0""",
    # When a request's table went away.
    "dropped": """
        SELECT process, request, number FROM request_freed
        UNION ALL SELECT process, request, number FROM request_finished
        UNION ALL SELECT process, request, number FROM request_preempted""",
    # Each growth of a table, with the life of the request that it belongs to.
    "grown": """
        SELECT a.*, d.number AS dropped
        FROM slots_allocated a
        ASOF LEFT JOIN dropped d
          ON d.process = a.process AND d.request = a.request AND d.number > a.number""",
    # Block by block: the tables.
    "places": """
        SELECT b.*, d.number AS dropped
        FROM blocks b
        ASOF LEFT JOIN dropped d
          ON d.process = b.process AND d.request = b.request AND d.number > b.from_event""",
    # Request by request: what a step computes, and where it ends.
    "plans": """
        WITH each_one AS (
          SELECT process, number, step, unnest(requests) AS request, unnest(num_tokens) AS count
          FROM step_scheduled),
        lives AS (
          SELECT e.*, d.number AS dropped FROM each_one e
          ASOF LEFT JOIN dropped d
            ON d.process = e.process AND d.request = e.request AND d.number > e.number),
        hits AS (
          SELECT process, request, dropped, max(num_hit_tokens) AS hit FROM grown GROUP BY ALL)
        SELECT l.process, l.number, l.step, l.request, l.count, l.dropped,
               (coalesce(hit, 0) + sum(count) OVER (
                  PARTITION BY l.process, l.request, l.dropped ORDER BY l.number))::BIGINT AS ends
        FROM lives l LEFT JOIN hits h
          ON h.process = l.process AND h.request = l.request
         AND h.dropped IS NOT DISTINCT FROM l.dropped""",
    # Request by request: what a worker ran.
    "batches": """
        SELECT process, number, step, "group", block_size, slots,
               unnest(requests) AS request, unnest(query_lens) AS count,
               unnest(seq_lens) AS ends,
               unnest(list_transform(range(len(requests)),
                 lambda i: coalesce(list_sum(query_lens[1:i]), 0)))::BIGINT AS first
        FROM slots_mapped""",
}
"""Name → what several rules need, made once."""

RULES = {
    "blocks-conserved": """
        WITH changes AS (
          SELECT process, number, 0 AS free, sum(CASE what
                   WHEN 'freed' THEN -(ref_cnt = 0)::INT
                   ELSE (ref_cnt = 1)::INT END) AS used FROM refs GROUP BY ALL),
        told AS (
          SELECT process, number, num_free_blocks AS free FROM slots_allocated
          UNION ALL SELECT process, number, num_free_blocks FROM slots_refused
          UNION ALL SELECT process, number, num_free_blocks FROM request_preempted
          UNION ALL SELECT process, number, num_free_blocks FROM step_scheduled),
        summed AS (
          SELECT process, number, sum(used) OVER (PARTITION BY process ORDER BY number) AS used
          FROM changes)
        SELECT count(*) FROM told t
        ASOF LEFT JOIN summed s ON s.process = t.process AND s.number <= t.number
        ASOF JOIN engine_configured e ON e.process = t.process AND e.number <= t.number
        WHERE t.free + coalesce(s.used, 0) + 1 <> e.num_blocks""",
    "single-owner": """
        SELECT count(*) FROM refs WHERE what = 'taken' AND before > 0""",
    "ref-counts": """
        WITH changes AS (
          SELECT process, block, number, ref_cnt - before AS delta FROM refs WHERE what <> 'taken'
          UNION ALL
          SELECT process, block, number, 1 FROM refs WHERE what = 'taken'
          UNION ALL SELECT process, block, from_event, -1 FROM places
          UNION ALL SELECT process, block, dropped, 1 FROM places WHERE dropped IS NOT NULL),
        balances AS (
          SELECT process, block, number, lead(number) OVER w AS upto, sum(delta) OVER w AS balance
          FROM (SELECT process, block, number, sum(delta) AS delta FROM changes GROUP BY ALL)
          WINDOW w AS (PARTITION BY process, block ORDER BY number))
        SELECT (SELECT count(*) FROM refs
                WHERE (what = 'touched' AND ref_cnt <> before + 1)
                   OR (what = 'freed' AND ref_cnt <> before - 1))
             + (SELECT count(*) FROM (FROM balances WHERE balance <> 0) b
                ASOF JOIN step_scheduled s ON s.process = b.process AND s.number >= b.number
                WHERE s.number < coalesce(b.upto, s.number + 1))""",
    "freed-once": """
        SELECT count(*) FROM refs WHERE what = 'freed' AND before <= 0""",
    "freed-tail-first": """
        WITH given AS (
          SELECT p.process, p.request, p.dropped, f.number, f.place, "group", position
          FROM refs f JOIN places p
            ON p.process = f.process AND p.block = f.block AND p.to_event = f.number
          WHERE f.what = 'freed' AND p.ended <> 'window')
        SELECT count(*) FROM (
          SELECT position - lag(position) OVER w AS step, "group" - lag("group") OVER w AS groups
          FROM given WINDOW w AS (PARTITION BY process, request, dropped ORDER BY number, place))
        WHERE groups < 0 OR (groups = 0 AND step > 0)""",
    "nothing-held": """
        SELECT count(*) FROM places
        WHERE dropped IS NOT NULL AND (to_event IS NULL OR to_event > dropped)""",
    "null-block": """
        SELECT (SELECT count(*) FROM blocks_taken WHERE list_contains(blocks, 0))
             + (SELECT count(*) FROM blocks_cached WHERE list_contains(blocks, 0))
             + (SELECT count(*) FROM block_evicted WHERE block = 0)
             + (SELECT count(*) FROM prefix_looked_up WHERE list_contains(flatten(blocks), 0))
             + (SELECT count(*) FROM slots_allocated WHERE list_contains(flatten(blocks), 0))
             + (SELECT count(*) FROM slots_mapped
                WHERE list_min(list_filter(slots, lambda s: s >= 0)) < block_size)""",
    "hit-cached": """
        WITH states AS (
          SELECT process, number, unnest(blocks) AS block, true AS hashed FROM blocks_cached
          UNION ALL SELECT process, number, block, false FROM block_evicted
          UNION ALL SELECT r.process, r.number, b.block, false
          FROM prefix_reset r, (SELECT DISTINCT process, block FROM refs) b
          WHERE r.ok AND r.process = b.process),
        wanted AS (
          SELECT process, number, unnest(flatten(blocks)) AS block, true AS hashed
          FROM prefix_looked_up WHERE num_hit_tokens > 0
          UNION ALL SELECT process, number, unnest(blocks), false FROM blocks_taken)
        SELECT count(*) FROM wanted w
        ASOF LEFT JOIN states s
          ON s.process = w.process AND s.block = w.block AND s.number < w.number
        WHERE w.block <> 0 AND coalesce(s.hashed, false) <> w.hashed""",
    "hash-chain": """
        WITH told AS (
          SELECT request, 0 AS number, block_hashes AS hashes FROM request_arrived
          UNION ALL SELECT request, number, new_hashes FROM prefix_looked_up),
        known AS (
          SELECT request, first + generate_subscripts(hashes, 1) - 1 AS position,
                 unnest(hashes) AS hash
          FROM (SELECT request, hashes, coalesce(sum(len(hashes)) OVER (
                         PARTITION BY request ORDER BY number
                         ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS first
                FROM told)),
        cached AS (
          SELECT process, number, request, "first" + generate_subscripts(blocks, 1) - 1 AS position,
                 unnest(blocks) AS block, unnest(hashes) AS hash
          FROM blocks_cached),
        hits AS (
          SELECT process, number, request, generate_subscripts(line, 1) - 1 AS position,
                 unnest(line) AS block
          FROM (SELECT process, number, request, unnest(blocks) AS line FROM prefix_looked_up
                WHERE num_hit_tokens > 0))
        SELECT (SELECT count(*) FROM cached c JOIN known k USING (request, position)
                WHERE k.hash <> c.hash)
             + (SELECT count(*) FROM hits h
                ASOF JOIN cached c
                  ON c.process = h.process AND c.block = h.block AND c.number < h.number
                JOIN known k ON k.request = h.request AND k.position = h.position
                WHERE k.hash <> c.hash)
             + (SELECT count(*) FROM prefix_looked_up
                WHERE num_hit_tokens > 0 AND num_hit_tokens >= num_tokens)""",
    "preempt-needed": """
        WITH running AS (
          SELECT r.process, r.number FROM slots_refused r
          ASOF JOIN grown g
            ON g.process = r.process AND g.request = r.request AND g.number < r.number
          WHERE coalesce(g.dropped, r.number + 1) > r.number),
        bounds AS (
          SELECT process, number FROM request_preempted
          UNION ALL SELECT process, number FROM step_scheduled
          UNION ALL SELECT process, 0 FROM trace),
        resets AS (
          SELECT s.process, s.number FROM prefix_reset r
          ASOF JOIN step_scheduled s ON s.process = r.process AND s.number > r.number)
        SELECT count(*) FROM request_preempted p
        ASOF JOIN bounds b ON b.process = p.process AND b.number < p.number
        ASOF LEFT JOIN running r ON r.process = p.process AND r.number < p.number
        ASOF LEFT JOIN step_scheduled s ON s.process = p.process AND s.number > p.number
        WHERE coalesce(r.number, -1) < b.number
          AND s.number NOT IN (SELECT number FROM resets)""",
    "token-budget": """
        WITH limits AS (
          SELECT number, process,
                 least(coalesce((settings->>'max_num_scheduled_tokens')::BIGINT, 9223372036854775807),
                       coalesce((settings->>'max_num_batched_tokens')::BIGINT, 9223372036854775807)) AS tokens,
                 coalesce((settings->>'max_num_seqs')::BIGINT, 9223372036854775807) AS seqs,
                 coalesce((settings->>'max_model_len')::BIGINT, 9223372036854775807) AS longest
          FROM engine_configured)
        SELECT (SELECT count(*) FROM step_scheduled s
                ASOF JOIN limits l ON l.process = s.process AND l.number <= s.number
                WHERE list_sum(s.num_tokens) > tokens OR len(s.num_tokens) > seqs
                   OR s.num_running > seqs)
             + (SELECT count(*) FROM plans p
                ASOF JOIN limits l ON l.process = p.process AND l.number <= p.number
                WHERE p.ends > longest)""",
    "kernel-variant": """
        WITH planned AS (
          SELECT p.*, numbers['reduction_splits'] AS splits,
                 numbers['seq_threshold_3D'] AS threshold FROM attention_planned p)
        SELECT (SELECT count(*) FROM planned
                WHERE (splits IS NOT NULL AND split_part(variant, '/', -1)
                         <> CASE WHEN splits > 0 THEN 'split-kv' ELSE 'whole' END)
                   OR (threshold IS NOT NULL AND variant <> CASE
                         WHEN numbers['max_query_len'] = 1
                          AND coalesce(numbers['num_seqs'], 0) <= threshold
                         THEN '3D' ELSE '2D' END))
             + (SELECT count(*) FROM planned p JOIN slots_mapped m USING (process, step, "group")
                WHERE len(m.requests) > 0 AND (
                      numbers['num_actual_tokens'] < len(m.slots)
                   OR numbers['max_query_len'] < list_max(m.query_lens)
                   OR numbers['max_seq_len'] < list_max(m.seq_lens)
                   OR (splits IS NOT NULL AND (
                         numbers['num_actual_tokens'] <> len(m.slots)
                      OR numbers['max_query_len'] <> list_max(m.query_lens)
                      OR numbers['max_seq_len'] <> list_max(m.seq_lens)))))""",
    "table-covers": """
        WITH tables AS (
          SELECT process, number, request, dropped, sum(
                   coalesce(len(hit_blocks[1]), 0) + coalesce(len(blocks[1]), 0)) OVER (
                   PARTITION BY process, request, dropped ORDER BY number) AS held
          FROM grown),
        steps AS (
          SELECT process, number, coalesce(lag(number) OVER (
                   PARTITION BY process ORDER BY number), 0) AS last FROM step_scheduled)
        SELECT count(*) FROM plans p
        ASOF LEFT JOIN tables t
          ON t.process = p.process AND t.request = p.request AND t.number < p.number
        JOIN steps s ON s.number = p.number
        ASOF JOIN engine_configured e ON e.process = p.process AND e.number <= p.number
        WHERE t.held IS NULL OR t.dropped IS DISTINCT FROM p.dropped
           OR p.ends > t.held * e.block_size
           OR (t.number > s.last AND t.held > ceil(
                 (p.ends + coalesce((e.settings->>'num_lookahead_tokens')::BIGINT, 0))
                 / e.block_size))""",
    "tables-grow": """
        WITH cells AS (
          SELECT c.process, c.number, c.step, c.request, c."group",
                 c."first" + generate_subscripts(c.blocks, 1) - 1 AS position,
                 unnest(c.blocks) AS block FROM table_changed c),
        lives AS (
          SELECT c.*, p.dropped FROM cells c
          LEFT JOIN plans p ON p.step = c.step AND p.request = c.request)
        SELECT (SELECT count(*) FROM (
                  SELECT block <> lag(block) OVER (
                    PARTITION BY process, request, "group", position, dropped ORDER BY number) AS other
                  FROM lives) WHERE other)
             + (SELECT count(*) FROM (
                  SELECT num_hit_tokens > 0 AND row_number() OVER (
                    PARTITION BY process, request, dropped ORDER BY number) > 1 AS again
                  FROM grown) WHERE again)""",
    "worker-table": """
        WITH ran AS (
          SELECT b.process, b.number, b.step, b.request, b."group", b.ends, p.number AS planned,
                 b.block_size, m.kernel_block_size
          FROM batches b JOIN slots_mapped m USING (number)
          JOIN plans p ON p.step = b.step AND p.request = b.request),
        cells AS (
          SELECT c.process, c.number, c.request, c."group",
                 c."first" + generate_subscripts(c.blocks, 1) - 1 AS position,
                 unnest(c.blocks) AS block FROM table_changed c),
        wanted AS (
          SELECT r.process, r.number, r.request, r."group", l.block, l.position,
                 r.block_size // r.kernel_block_size AS parts
          FROM ran r JOIN places l
            ON l.request = r.request AND l."group" = r."group" AND l.from_event < r.planned
           AND coalesce(l.dropped, r.planned + 1) > r.planned
           AND l.from_step = r.step AND l.position * r.block_size < r.ends)
        SELECT count(*) FROM wanted w
        ASOF LEFT JOIN cells c
          ON c.process = w.process AND c.request = w.request AND c."group" = w."group"
         AND c.position = w.position * w.parts AND c.number < w.number
        WHERE c.block IS NULL OR c.block // w.parts <> w.block""",
    "slot-mapping": """
        WITH tokens AS (
          SELECT b.process, b.step, b.request, b."group", b.block_size, p.number AS planned,
                 ends - b.count + k AS position, slots[first + k + 1] AS slot
          FROM (SELECT *, unnest(range(count)) AS k FROM batches) b
          JOIN (SELECT step, request, number FROM plans) p
            ON p.step = b.step AND p.request = b.request)
        SELECT count(*) FROM tokens t
        ASOF LEFT JOIN places l
          ON l.request = t.request AND l."group" = t."group"
         AND l.position = t.position // t.block_size AND l.from_event < t.planned
        WHERE l.block IS NULL OR t.slot IS NULL
           OR t.slot <> l.block * t.block_size + t.position % t.block_size""",
    "positions-advance": """
        WITH steps AS (SELECT DISTINCT process, "group", step FROM slots_mapped),
        due AS (
          SELECT s.process, s."group", p.step, p.request, p.count, p.ends
          FROM plans p JOIN steps s USING (step))
        SELECT count(*) FROM due d
        FULL JOIN batches b
          ON b.process = d.process AND b."group" = d."group" AND b.step = d.step
         AND b.request = d.request
        WHERE d.request IS NULL OR b.request IS NULL OR b.count <> d.count OR b.ends <> d.ends""",
    "slots-distinct": """
        SELECT count(*) FROM (
          SELECT list_filter(slots, lambda s: s >= 0) AS written FROM slots_mapped)
        WHERE len(list_distinct(written)) <> len(written)""",
}


def run(parquet_folder: Path | str, memory: str = "4GB") -> dict[str, int]:
    """How often each rule is broken in the tables of a trace, by the ids of ``check --list``."""
    return {rule: number for rule, (number, _) in measured(parquet_folder, memory).items()}


def measured(parquet_folder: Path | str, memory: str = "4GB") -> dict[str, tuple[int, float]]:
    """(violations, CPU seconds) of each rule; what they share is in the first."""
    found: dict[str, tuple[int, float]] = {}
    with connect(parquet_folder, memory) as database:
        began = time.process_time()
        for name, query in SHARED.items():
            database.execute(f"CREATE TEMP TABLE {name} AS {query}")
        for rule, query in RULES.items():
            ((number,),) = database.execute(query).fetchall()
            now = time.process_time()
            found[rule] = (int(number), now - began)
            began = now
    return found


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1]), indent=1))
