"""A worker is stopped (SIGSTOP) past its lease, another one finishes its job, and the first goes on (SIGCONT): whatever it
was about to do, it writes nothing."""

import os
import signal
import threading
import time

from audit import Audit, write
from stage import MARGIN_S, Broken, Stage, wait_until

# At `finishing`, the job's row is locked until the database ends the session (`worker_pool` in src/config.rs).
POINTS = ["claimed", "fetched", "features", "gradients", "verify", "renewing", "storing", "stored", "finishing"]
SHORT = ["gradients", "stored", "finishing"]

EVERYTHING = """
    SELECT json_build_object(
        'job', to_json(j),
        'events', (SELECT json_agg(e ORDER BY e.seq) FROM job_event e WHERE e.job_id = j.id),
        'attempts', (SELECT json_agg(a ORDER BY a.started_at) FROM job_attempt a WHERE a.job_id = j.id),
        'shards', (SELECT json_agg(s ORDER BY s.phase, s.index) FROM job_shard s WHERE s.job_id = j.id),
        'versions', (SELECT json_agg(v ORDER BY v.id) FROM prompt_version v WHERE v.produced_by_job = j.id),
        'lineage', (SELECT json_agg(l ORDER BY l.parent) FROM lineage l JOIN prompt_version v ON v.id = l.child
                    WHERE v.produced_by_job = j.id))
    FROM job j WHERE j.id = '{job}'
"""
LATER = "SELECT state = 'idle' AND last_seen > to_timestamp({at}) AS later FROM worker WHERE pid = {pid}"


class Stop:
    """Stops the first worker that reaches `point`, once."""

    def __init__(self, stage: Stage, point: str):
        self.stage, self.point = stage, point
        self.stopped = None
        self.at = 0.0
        self.lock = threading.Lock()
        stage.decide = self.decide

    def decide(self, worker, process, point: str, job: str | None) -> str:
        with self.lock:
            if worker and point == self.point and not self.stopped:
                self.stopped, self.at = process, time.time()
                os.kill(process.pid, signal.SIGSTOP)
        return ""

    def go_on(self) -> float:
        at = time.time()
        os.kill(self.stopped.pid, signal.SIGCONT)
        return at


def one(stage: Stage, point: str, seed: int) -> tuple[str, dict, bool, float]:
    """The job, its result, whether the stopped worker left it alone, and when that was stopped."""
    stop = Stop(stage, point)
    try:
        job = stage.new_job(seed)
        ended = stage.api.ended(job, 150)
        if ended["state"] != "succeeded" or not stop.stopped:
            raise Broken(f"stopped while {point}: the ensemble {ended['state']}, {ended['error']}")
        result = stage.api.ok("GET", f"/ensembles/{job}/result")
        before = stage.cluster.sql(stage.database, EVERYTHING.format(job=job))
    finally:
        if stop.stopped:
            at = stop.go_on()
    # It has noticed, and waits for other work; or it has ended, and another worker waits in its place.
    query = LATER.format(at=at, pid=stop.stopped.pid)
    idle = lambda: stop.stopped.poll() is not None or any(row["later"] for row in stage.rows(query))  # noqa: E731
    wait_until(idle, 60, f"an idle worker after a stop while {point}")
    after = stage.cluster.sql(stage.database, EVERYTHING.format(job=job))
    return job, result, before == after, stop.at


def run(stage: Stage, points: list[str], seed: int) -> dict:
    expected, results, stopped_at, overwritten, broken = {}, {}, {}, 0, []
    for number, point in enumerate(points):
        try:
            job, result, alone, stopped = one(stage, point, seed * 1000 + number)
        except Broken as error:
            broken.append(str(error))
            continue
        expected[job], results[job], stopped_at[job] = ("succeeded",), result, (point, stopped)
        if not alone:
            overwritten += 1
            broken.append(f"ensemble {job} was changed by a worker that had been stopped while {point}")
    audit = Audit(stage)
    judged = audit.judge(expected, results)
    limit, seconds = stage.lease_s + MARGIN_S, []
    for job, (point, at) in stopped_at.items():
        # Another worker must have done the job, or nothing was shown.
        again = [it["started"] - at for it in audit.attempts if it["job_id"] == job and it["started"] > at]
        if len(again) != 1:
            broken.append(f"ensemble {job} was claimed {len(again)} times after its worker was stopped while {point}")
        seconds += again
        broken += [f"claimed again {it:.1f} s after a stop while {point}, more than {limit} s" for it in again if it > limit]
    write(stage.folder / "stops.json", stopped_at)
    broken += [f"lost: {it}" for it in judged["lost"]] + [f"twice: {it}" for it in judged["duplicates"]]
    duplicates = len(judged["duplicates"]) + overwritten
    return {"stops": len(points), "jobs": len(expected), "lost": len(judged["lost"]), "duplicates": duplicates,
            "max": max(seconds, default=0.0), "broken": broken}
