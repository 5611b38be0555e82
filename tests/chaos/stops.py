"""A worker is stopped (SIGSTOP) past its lease, another one finishes its job, and the first goes on (SIGCONT): whatever it
was about to do, it writes nothing."""

import os
import signal
import threading
import time

from audit import Audit, write
from stage import Broken, Stage, wait_until

# In the middle of a transaction the row is locked, until the database ends the session: after a minute
# (`idle_in_transaction_session_timeout`, src/db.rs).
IN_A_TRANSACTION = ["claiming", "finishing"]
POINTS = ["claimed", "fetched", "features", "gradients", "verify", "renewing", "storing", "stored"]
SHORT = ["gradients", "stored"]

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
        self.lock = threading.Lock()
        stage.decide = self.decide

    def decide(self, worker, process, point: str, job: str | None) -> str:
        with self.lock:
            if worker and point == self.point and not self.stopped:
                self.stopped = process
                os.kill(process.pid, signal.SIGSTOP)
        return ""

    def go_on(self) -> float:
        at = time.time()
        os.kill(self.stopped.pid, signal.SIGCONT)
        return at


def one(stage: Stage, point: str, seed: int) -> tuple[str, dict, bool]:
    """The job, its result, and whether the stopped worker left it alone."""
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
    # It has noticed, and waits for other work; or it has ended, and another waits in its place.
    query = LATER.format(at=at, pid=stop.stopped.pid)
    idle = lambda: stop.stopped.poll() is not None or any(row["later"] for row in stage.rows(query))  # noqa: E731
    wait_until(idle, 60, f"an idle worker after a stop while {point}")
    after = stage.cluster.sql(stage.database, EVERYTHING.format(job=job))
    return job, result, before == after


def run(stage: Stage, points: list[str], seed: int) -> dict:
    expected, results, stopped_at, overwritten, broken = {}, {}, {}, 0, []
    for number, point in enumerate(points):
        try:
            job, result, alone = one(stage, point, seed * 1000 + number)
        except Broken as error:
            broken.append(str(error))
            continue
        expected[job], results[job], stopped_at[job] = ("succeeded",), result, point
        if not alone:
            overwritten += 1
            broken.append(f"ensemble {job} was changed by a worker that had been stopped while {point}")
    audit = Audit(stage)
    judged = audit.judge(expected, results)
    # The job has to have been taken away from the stopped one, or nothing was shown.
    lost_attempts = {attempt["job_id"] for attempt in audit.attempts if attempt["outcome"] == "lost"}
    for job, point in stopped_at.items():
        if point != "claiming" and job not in lost_attempts:
            broken.append(f"ensemble {job} was never taken from the worker that was stopped while {point}")
    write(stage.folder / "stops.json", stopped_at)
    broken += [f"lost: {it}" for it in judged["lost"]] + [f"twice: {it}" for it in judged["duplicates"]]
    duplicates = len(judged["duplicates"]) + overwritten
    return {"stops": len(points), "jobs": len(expected), "lost": len(judged["lost"]), "duplicates": duplicates, "broken": broken}
