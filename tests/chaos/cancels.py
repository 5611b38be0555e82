"""Ensembles are cancelled at random times, waiting ones and running ones."""

import random
import threading
import time

from audit import Audit, percentile, write
from stage import Broken, Stage

# The longest delays before a cancellation: of a waiting ensemble, and of a running one.
LIMITS_S = (0.1, 2.0)
CLIENTS = 6


class Cancels:
    def __init__(self, stage: Stage, count: int, seed: int, limits_s: tuple[float, float] = LIMITS_S):
        self.limits_s = limits_s
        self.stage, self.count, self.random = stage, count, random.Random(seed)
        self.queued: list[float] = []
        self.running: list[float] = []
        # These had ended before, or ended before their worker noticed.
        self.too_late = 0
        self.expected: dict[str, tuple[str, ...]] = {}
        self.failures: list[str] = []
        self.seeds = iter(range(1, 1_000_000))
        self.lock = threading.Lock()

    def client(self):
        try:
            while len(self.queued) + len(self.running) < self.count and not self.failures:
                self.one()
        except Broken as error:
            self.failures.append(str(error))

    def one(self):
        with self.lock:
            # This waits until the ensemble is queued, running or done.
            after = self.random.uniform(0, 2 * self.stage.compose_ms / 1000)
            seed = next(self.seeds)
        job = self.stage.new_job(seed)
        time.sleep(after)
        asked = time.monotonic()
        status, answer = self.stage.api.patiently("POST", f"/ensembles/{job}/cancel")
        answered = time.monotonic() - asked
        ended = self.stage.api.ended(job)
        over = time.monotonic() - asked
        with self.lock:
            self.expected[job] = (ended["state"],)
            if status == 200:
                self.queued.append(answered)
            elif status == 202 and ended["state"] == "cancelled":
                self.running.append(over)
            elif ended["state"] == "succeeded":
                self.too_late += 1
            else:
                self.failures.append(f"cancelling {job}: {status} {answer}, and then {ended['state']}")

    def run(self) -> dict:
        clients = [threading.Thread(target=self.client) for _ in range(CLIENTS)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        judged = Audit(self.stage).judge(self.expected, {})
        write(self.stage.folder / "cancels.json", {"queued": self.queued, "running": self.running, "too_late": self.too_late})
        broken = list(self.failures)
        broken += [f"lost: {it}" for it in judged["lost"]] + [f"twice: {it}" for it in judged["duplicates"]]
        for kind, seconds, limit in zip(("waiting", "running"), (self.queued, self.running), self.limits_s):
            if not seconds:
                broken.append(f"no {kind} ensemble was cancelled")
            elif max(seconds) > limit:
                broken.append(f"a {kind} ensemble was cancelled after {max(seconds):.3f} s, more than {limit} s")
        return {
            "cancels": len(self.queued) + len(self.running), "queued": len(self.queued), "running": len(self.running),
            "too_late": self.too_late, "queued_p50": percentile(self.queued, 0.5), "queued_max": max(self.queued, default=0.0),
            "running_p50": percentile(self.running, 0.5), "running_max": max(self.running, default=0.0),
            "lost": len(judged["lost"]), "duplicates": len(judged["duplicates"]), "broken": broken,
        }
