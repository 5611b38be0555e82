"""Several workers share every job, and die (kill -9) in the middle of it: who has the job, and who helps. No shard is stored
twice, none is missing, and the jobs end as if nothing had happened."""

import collections
import os
import random
import signal
import threading
import time

from audit import Audit, write
from stage import Broken, Stage, Unreachable

# The points at which an owner dies, and those at which a helper does.
OF_THE_JOB = ["features", "gradients", "shard_putting", "finishing"]
OF_A_SHARD = ["features", "gradients", "shard_claimed", "shard_giving"]
# The most kills of one job's owners; fewer than its attempts.
MOST_OF_ONE_JOB = 3
# Four shards in each of two phases, as in engine.rs.
SHARDS = 8

STORED = """
    SELECT job_id, count(*) AS stored, count(DISTINCT (data->>'phase', data->>'index')) AS different,
           count(DISTINCT data->>'worker') AS workers
    FROM job_event WHERE kind = 'shard' GROUP BY job_id
"""


class Shared:
    def __init__(self, stage: Stage, count: int, seed: int):
        self.stage, self.count, self.random = stage, count, random.Random(seed)
        # Whether a process owns the job, and which.
        self.at_work: dict[int, tuple[bool, str]] = {}
        self.hits: collections.Counter[str] = collections.Counter()
        self.kills: list[dict] = []
        self.dead: set[int] = set()
        self.expected: dict[str, tuple[str, ...]] = {}
        self.results: dict[str, dict] = {}
        self.failures: list[str] = []
        self.seeds = iter(range(1, 1_000_000))
        self.lock = threading.Lock()
        stage.decide = self.decide

    def decide(self, worker, process, point: str, job: str | None) -> str:
        with self.lock:
            if worker is None or process.pid in self.dead:
                return ""
            if point in ("claimed", "shard_claimed"):
                self.at_work[process.pid] = (point == "claimed", job)
            has_job, job = self.at_work.get(process.pid, (False, None))
            deadly = point in (OF_THE_JOB if has_job else OF_A_SHARD) and self.random.random() < 0.15
            if job and deadly and len(self.kills) < self.count and not (has_job and self.hits[job] >= MOST_OF_ONE_JOB):
                self.hits[job] += has_job
                self.dead.add(process.pid)
                self.kills.append({"at": time.time(), "pid": process.pid, "point": point, "job": job, "has_job": has_job})
                os.kill(process.pid, signal.SIGKILL)
            return ""

    def client(self):
        try:
            while len(self.kills) < self.count and not self.failures:
                job = self.stage.new_job(next(self.seeds))
                with self.lock:
                    self.expected[job] = ("succeeded",)
                if self.stage.api.ended(job, 120)["state"] == "succeeded":
                    self.results[job] = self.stage.api.ok("GET", f"/ensembles/{job}/result")
        except (Broken, Unreachable) as error:
            self.failures.append(str(error))

    def run(self) -> dict:
        # Fewer jobs than workers, so that some workers help.
        clients = [threading.Thread(target=self.client) for _ in self.stage.workers[::3]]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        judged = Audit(self.stage).judge(self.expected, self.results)
        write(self.stage.folder / "kills.json", self.kills)
        stored = {row["job_id"]: row for row in self.stage.rows(STORED)}
        broken = list(self.failures)
        broken += [f"lost: {it}" for it in judged["lost"]] + [f"twice: {it}" for it in judged["duplicates"]]
        for job in self.expected:
            row = stored.get(job)
            if not row or (row["stored"], row["different"]) != (SHARDS, SHARDS):
                broken.append(f"shards of ensemble {job}: {row}")
        helped = sum(row["workers"] > 1 for row in stored.values())
        if not helped:
            broken.append("nobody helped anybody")
        return {
            "kills": len(self.kills), "of_the_job": sum(kill["has_job"] for kill in self.kills), "jobs": judged["jobs"],
            "helped": helped, "lost": len(judged["lost"]), "duplicates": len(judged["duplicates"]), "broken": broken,
        }


def run(stage: Stage, count: int, seed: int) -> dict:
    return Shared(stage, count, seed).run()
