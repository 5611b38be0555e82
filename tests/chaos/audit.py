"""What the database says when all is over: whether every job ended as it should, once."""

import json
import pathlib

from stage import Broken, Stage

JOBS = """
    SELECT j.id, j.state, j.attempt, j.error->>'code' AS error,
           (SELECT count(*) FROM prompt_version v WHERE v.produced_by_job = j.id) AS versions,
           (SELECT count(*) FROM job_event e WHERE e.job_id = j.id AND e.kind = 'succeeded') AS successes,
           (SELECT count(*) FROM job_event e WHERE e.job_id = j.id AND e.kind = 'cancelled') AS cancellations,
           (SELECT count(*) FROM job_attempt a WHERE a.job_id = j.id AND a.outcome = 'succeeded') AS good_attempts,
           (SELECT count(*) FROM job_attempt a WHERE a.job_id = j.id AND a.outcome IS NULL) AS open_attempts,
           (SELECT json_agg(w->'weight' ORDER BY (w->>'weight')::float8)
            FROM jsonb_array_elements(j.result->'source_weights') w) AS weights,
           (SELECT json_agg(l.weight ORDER BY l.weight) FROM lineage l
            JOIN prompt_version v ON v.id = l.child WHERE v.produced_by_job = j.id) AS lineage
    FROM job j ORDER BY j.id
"""
ATTEMPTS = """
    SELECT a.job_id, w.pid, a.outcome, a.attempt,
           extract(epoch FROM a.started_at)::float8 AS started, extract(epoch FROM a.ended_at)::float8 AS ended
    FROM job_attempt a JOIN worker w ON w.id = a.worker_id ORDER BY a.job_id, a.started_at
"""
EVENTS = "SELECT job_id, seq, kind, extract(epoch FROM at)::float8 AS at, data FROM job_event ORDER BY job_id, seq"


class Audit:
    """Reads a stage's database, and writes it to its folder."""

    def __init__(self, stage: Stage):
        self.jobs = {row["id"]: row for row in stage.rows(JOBS)}
        self.attempts = stage.rows(ATTEMPTS)
        write(stage.folder / "jobs.json", list(self.jobs.values()))
        write(stage.folder / "attempts.json", self.attempts)
        write(stage.folder / "events.json", stage.rows(EVENTS))

    def judge(self, expected: dict[str, tuple[str, ...]], results: dict[str, dict]) -> dict:
        """How many of the acknowledged jobs are lost, and results there twice. `expected` has the states that each may
        end in, `results` the answers that clients were given."""
        lost, duplicates = [], []
        for job, states in expected.items():
            row = self.jobs.get(job)
            if not row or row["state"] not in states or row["open_attempts"]:
                lost.append({"job": job, "expected": states, "found": row})
        for job, row in self.jobs.items():
            once = 1 if row["state"] == "succeeded" else 0
            counts = (row["versions"], row["successes"], row["good_attempts"])
            if row["state"] not in ("succeeded", "failed", "cancelled") and job not in expected:
                lost.append({"job": job, "expected": "an end", "found": row})
            if any(count > once for count in counts) or row["cancellations"] > 1:
                duplicates.append(row)
            elif once and (counts != (1, 1, 1) or not same(row["weights"], row["lineage"])):
                lost.append({"job": job, "expected": "a whole result", "found": row})
        for job, result in results.items():
            weights = sorted(it["weight"] for it in result["source_weights"])
            if not same(weights, self.jobs[job]["weights"]):
                duplicates.append({"job": job, "answered": weights, "found": self.jobs[job]})
        return {"jobs": len(expected), "lost": lost, "duplicates": duplicates}

    def reclaims(self, kills: list[dict]) -> list[dict]:
        """Of every kill that took a job from its worker: how long until the job was at work again, or had ended."""
        found = []
        for kill in kills:
            for number, attempt in enumerate(self.attempts):
                held = attempt["pid"] == kill["pid"] and attempt["started"] <= kill["at"]
                if not held or (attempt["ended"] or kill["at"] + 1) <= kill["at"]:
                    continue
                later = self.attempts[number + 1 : number + 2]
                again = later[0]["started"] if later and later[0]["job_id"] == attempt["job_id"] else None
                # A job that was asked to be cancelled is not claimed again.
                over = attempt["ended"] if self.jobs[attempt["job_id"]]["state"] == "cancelled" else None
                if (until := again or over) is None:
                    raise Broken(f"job {attempt['job_id']} was not claimed again after {kill}")
                found.append({"job": attempt["job_id"], "point": kill["point"], "seconds": until - kill["at"]})
        return found


def same(some: list[float] | None, others: list[float] | None) -> bool:
    return bool(some) and bool(others) and len(some) == len(others) and all(abs(a - b) < 1e-9 for a, b in zip(some, others))


def percentile(values: list[float], share: float) -> float:
    """The smallest that so large a share of the values does not exceed."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, max(0, -int(-share * len(ordered) // 1) - 1))] if ordered else 0.0


def write(path: pathlib.Path, what):
    path.write_text(json.dumps(what, indent=1) + "\n")
