"""The tables ``steps`` and ``requests`` as SQL says them: what the export must make, from the tables of events."""

from __future__ import annotations

STEPS = """
WITH planned AS (SELECT process, step, number FROM step_scheduled),
updated AS (
  SELECT p.number, e.dur_ns AS update_ns, e.started_ns + e.dur_ns AS updated_ns,
         e.num_output_tokens
  FROM step_updated e
  ASOF JOIN planned p ON p.step = e.step AND p.process = e.process AND p.number <= e.number),
ran AS (
  SELECT p.number, max(e.dur_ns) AS execute_ns,
         max(e.forward_dur_ns) AS forward_ns, max(e.num_tokens_padded) AS num_tokens_padded
  FROM step_executed e ASOF JOIN planned p ON p.step = e.step AND p.number <= e.number
  GROUP BY ALL),
sampled AS (
  SELECT p.number, max(e.dur_ns) AS sample_ns
  FROM step_sampled e ASOF JOIN planned p ON p.step = e.step AND p.number <= e.number
  GROUP BY ALL),
variants AS (
  SELECT p.number, string_agg(DISTINCT e.variant, ', ' ORDER BY e.variant) AS variant
  FROM attention_planned e ASOF JOIN planned p ON p.step = e.step AND p.number <= e.number
  GROUP BY ALL),
evictions AS (
  SELECT p.number, count(*) AS num_evicted
  FROM block_evicted e
  ASOF JOIN planned p ON p.process = e.process AND p.number >= e.number
  GROUP BY ALL),
refusals AS (
  SELECT p.number, count(*) AS num_refused
  FROM slots_refused e
  ASOF JOIN planned p ON p.process = e.process AND p.number >= e.number
  GROUP BY ALL),
preemptions AS (
  SELECT p.number, count(*) AS num_preempted
  FROM request_preempted e
  ASOF JOIN planned p ON p.process = e.process AND p.number >= e.number
  GROUP BY ALL)
SELECT s.number, s.process, s.step, s.at_ns,
       s.dur_ns AS schedule_ns, execute_ns, forward_ns, sample_ns, update_ns,
       updated_ns - s.started_ns AS wall_ns,
       len(s.requests) AS num_requests,
       coalesce(list_sum(s.num_tokens), 0)::BIGINT AS num_tokens,
       -- A request that joins, or computes several tokens, is in its prefill. Most steps have none.
       CASE WHEN len(s.new) + len(s.resumed) = 0 AND list_max(s.num_tokens) <= 1 THEN 0
            ELSE coalesce(list_sum(list_filter(s.num_tokens, lambda n, i:
                   n - coalesce(s.num_spec_tokens[s.requests[i]], 0) > 1
                   OR list_contains(s.new, s.requests[i])
                   OR list_contains(s.resumed, s.requests[i]))), 0) END::BIGINT AS num_prefill_tokens,
       coalesce(list_sum(s.num_tokens), 0)::BIGINT - num_prefill_tokens AS num_decode_tokens,
       num_tokens_padded,
       list_sum(num_output_tokens)::BIGINT AS num_output_tokens,
       s.num_running, s.num_waiting, s.num_free_blocks,
       len(s.new) AS num_new, len(s.resumed) AS num_resumed,
       coalesce(num_preempted, 0) AS num_preempted, coalesce(num_refused, 0) AS num_refused,
       coalesce(num_evicted, 0) AS num_evicted, variant
FROM step_scheduled s
LEFT JOIN updated USING (number)
LEFT JOIN ran USING (number)
LEFT JOIN sampled USING (number)
LEFT JOIN variants USING (number)
LEFT JOIN evictions USING (number)
LEFT JOIN refusals USING (number)
LEFT JOIN preemptions USING (number)
ORDER BY s.number
"""

REQUESTS = """
WITH planned AS (SELECT process, step, number FROM step_scheduled),
updated AS (
  SELECT p.number, e.started_ns + e.dur_ns AS updated_ns, e.num_output_tokens
  FROM (FROM step_updated WHERE num_output_tokens IS NOT NULL) e
  ASOF JOIN planned p ON p.step = e.step AND p.process = e.process AND p.number <= e.number),
each_step AS (
  SELECT unnest(requests) AS request, unnest(num_tokens) AS num_tokens, step, at_ns
  FROM step_scheduled),
ran AS (
  SELECT request, min(step) AS first_step, max(step) AS last_step, count(*) AS num_steps,
         min(at_ns) AS scheduled_ns, sum(num_tokens)::BIGINT AS num_computed_tokens
  FROM each_step GROUP BY request),
each_output AS (
  SELECT unnest(s.requests) AS request, unnest(u.num_output_tokens) AS num_outputs, updated_ns
  FROM step_scheduled s JOIN updated u USING (number)),
answered AS (
  SELECT request, min(updated_ns) AS first_output_ns
  FROM each_output WHERE num_outputs > 0 GROUP BY request),
hits AS (
  SELECT request, arg_min(num_hit_tokens, number) AS num_hit_tokens,
         sum(num_hit_tokens)::BIGINT - arg_min(num_hit_tokens, number) AS num_resume_hit_tokens
  FROM slots_allocated GROUP BY request),
refused AS (SELECT request, count(*) AS num_refusals FROM slots_refused GROUP BY request),
preempted AS (
  SELECT request, count(*) AS num_preemptions,
         sum(num_computed_tokens)::BIGINT AS num_lost_tokens
  FROM request_preempted GROUP BY request)
SELECT a.request, a.request_id AS name, a.number AS arrived_event, a.at_ns AS arrived_ns,
       a.num_prompt_tokens, a.max_tokens, a.priority, a.lora, a.salted,
       first_step, scheduled_ns, scheduled_ns - a.at_ns AS queued_ns,
       first_output_ns, first_output_ns - a.at_ns AS first_token_ns,
       last_step, num_steps, num_computed_tokens,
       num_hit_tokens, num_resume_hit_tokens,
       coalesce(num_refusals, 0) AS num_refusals,
       coalesce(p.num_preemptions, 0) AS num_preemptions,
       coalesce(num_lost_tokens, 0) AS num_lost_tokens,
       f.number AS finished_event, f.at_ns AS finished_ns, f.at_ns - a.at_ns AS total_ns,
       f.reason, f.num_output_tokens
FROM request_arrived a
LEFT JOIN request_finished f USING (request)
LEFT JOIN ran USING (request)
LEFT JOIN answered USING (request)
LEFT JOIN hits USING (request)
LEFT JOIN refused USING (request)
LEFT JOIN preempted p USING (request)
ORDER BY a.number
"""
