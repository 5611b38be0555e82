"""Workers are killed (kill -9) at named points while clients wait for their ensembles."""

import collections
import os
import random
import signal
import threading
import time

from audit import Audit, percentile, write
from faults import PHASES, POINTS
from stage import MARGIN_S, Broken, Stage, Unreachable, Worker, wait_until

# The most kills of a job; fewer than its attempts, so that no job fails because of this harness.
MOST_OF_ONE_JOB = 3
# Points that a job of a second does not reach within a lease of 30 s, and points outside a worker's code, are left out.
WITH_LONG_LEASE = ["claimed", "fetched", *PHASES, "progressing", "storing", "stored", "finishing", "finished"]
BOTH_ENDS = ("succeeded", "cancelled")


class Kills:
    """Deals one card, a point, to every attempt at a job; there its worker dies. A card that was not played (the point
    did not come up) goes back into the deck."""

    def __init__(self, stage: Stage, count: int, seed: int, points: list[str]):
        self.stage, self.random, self.points = stage, random.Random(seed), [it for it in points if it != "reaping"]
        # Any process that reaps may die of this one, even the server; it does not belong to one job's path.
        self.reapings = count // len(points) if "reaping" in points else 0
        rest = count - self.reapings
        self.deck = [self.points[number % len(self.points)] for number in range(rest)]
        self.random.shuffle(self.deck)
        self.cards: dict[Worker, str] = {}
        self.hits: collections.Counter[str | None] = collections.Counter()
        self.kills: list[dict] = []
        self.dead: set[int] = set()
        self.expected: dict[str, tuple[str, ...]] = {}
        self.cancelled: set[str] = set()
        self.results: dict[str, dict] = {}
        self.failures: list[str] = []
        self.seeds = iter(range(1, 1_000_000))
        # Twice the time needed if every attempt costs a whole lease.
        self.patience_s = 120 + 2 * count * (stage.lease_s + MARGIN_S) / len(stage.workers)
        self.lock = threading.Lock()
        stage.decide = self.decide

    # ---- What happens at a point ---------------------------------------------------------------------

    def decide(self, worker: Worker | None, process, point: str, job: str | None) -> str:
        with self.lock:
            if process.pid in self.dead:
                return ""
            if point == "reaping":
                self.reap(worker, process)
            if worker is None:
                return ""
            if point == "claimed":
                self.deal(worker, job)
            card = self.cards.get(worker)
            if card and point == card:
                self.kill(worker, process, point)
            elif card == "failing" and point == "heads":
                return "fail"
            elif card == "releasing" and point == "gradients":
                process.send_signal(signal.SIGTERM)
            elif card == "cancelling" and point == "features":
                self.cancelled.add(worker.job)
                threading.Thread(target=self.cancel, args=(worker.job,), daemon=True).start()
            return ""

    def deal(self, worker: Worker, job: str | None):
        if unplayed := self.cards.pop(worker, None):
            self.deck.insert(self.random.randrange(len(self.deck) + 1), unplayed)
        if self.hits[job] >= MOST_OF_ONE_JOB or job in self.cancelled:
            return
        if self.deck:
            self.cards[worker] = self.deck.pop()
        elif self.reapings:
            # A job must be lost before it can be reaped.
            self.cards[worker] = self.random.choice(self.points)

    def reap(self, worker: Worker | None, process):
        spared = worker and self.hits[worker.job] >= MOST_OF_ONE_JOB
        if self.reapings and not spared and self.random.random() < 0.5:
            self.reapings -= 1
            self.kill(worker, process, "reaping")

    def kill(self, worker: Worker | None, process, point: str):
        if worker:
            self.hits[worker.job] += 1
            self.cards.pop(worker, None)
        self.dead.add(process.pid)
        at = time.time()
        os.kill(process.pid, signal.SIGKILL)
        job = worker.job if worker else None
        self.kills.append({"at": at, "pid": process.pid, "point": point, "job": job, "server": worker is None})

    def cancel(self, job: str):
        try:
            self.stage.api.patiently("POST", f"/ensembles/{job}/cancel")
        except Broken as error:
            self.failures.append(str(error))

    # ---- Clients -------------------------------------------------------------------------------------

    def enough(self) -> bool:
        with self.lock:
            return not self.deck and not self.cards and not self.reapings

    def client(self):
        """Asks for one ensemble after another, so that the queue is never longer than there are workers."""
        deadline = time.monotonic() + self.patience_s
        try:
            while not self.enough() and not self.failures:
                if time.monotonic() > deadline:
                    raise Broken(f"after {self.patience_s:.0f} s not killed yet at {self.deck + list(self.cards.values())}")
                job = self.stage.new_job(next(self.seeds))
                with self.lock:
                    self.expected[job] = ("succeeded",)
                self.follow(job)
        except (Broken, Unreachable) as error:
            self.failures.append(str(error))

    def follow(self, job: str):
        ended = self.stage.api.ended(job, 60 + 4 * (self.stage.lease_s + MARGIN_S))
        if ended["state"] == "succeeded":
            self.results[job] = self.stage.api.ok("GET", f"/ensembles/{job}/result")

    def run(self) -> dict:
        clients = [threading.Thread(target=self.client) for _ in self.stage.workers]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        left = "SELECT count(*) FROM job WHERE state IN ('queued', 'running')"
        all_over = lambda: self.stage.cluster.sql(self.stage.database, left) == "0"  # noqa: E731
        if not self.failures:
            # This includes jobs that were posted to a server that died before it answered.
            wait_until(all_over, 60 + 4 * self.stage.lease_s, "an end of every ensemble")
        return self.judge()

    def judge(self) -> dict:
        audit = Audit(self.stage)
        write(self.stage.folder / "kills.json", self.kills)
        for job in self.cancelled & self.expected.keys():
            self.expected[job] = BOTH_ENDS
        judged = audit.judge(self.expected, self.results)
        reclaims = audit.reclaims(self.kills)
        write(self.stage.folder / "reclaims.json", reclaims)
        seconds = [it["seconds"] for it in reclaims]
        p99, limit = percentile(seconds, 0.99), self.stage.lease_s + MARGIN_S
        broken = list(self.failures)
        broken += [f"lost: {it}" for it in judged["lost"]] + [f"twice: {it}" for it in judged["duplicates"]]
        if p99 > limit:
            broken.append(f"re-claimed with p99 of {p99:.1f} s, more than {limit} s")
        points = collections.Counter(kill["point"] for kill in self.kills)
        return {
            "kills": len(self.kills), "points": points, "jobs": judged["jobs"], "lost": len(judged["lost"]),
            "duplicates": len(judged["duplicates"]), "reclaims": len(seconds), "p50": percentile(seconds, 0.5), "p99": p99,
            "max": max(seconds, default=0.0), "limit": limit, "servers": sum(kill["server"] for kill in self.kills),
            "broken": broken,
        }


def at_every_point(stage: Stage, count: int, seed: int) -> dict:
    found = Kills(stage, count, seed, POINTS).run()
    if missing := [point for point in POINTS if not found["points"][point]]:
        found["broken"].append(f"nobody was killed while {', '.join(missing)}")
    return found


def with_long_lease(stage: Stage, count: int, seed: int) -> dict:
    return Kills(stage, count, seed, WITH_LONG_LEASE).run()
