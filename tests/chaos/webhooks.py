"""Who is to be told of an ensemble's end does not listen for a long time; then it does, and is told all of it."""

import base64
import hashlib
import hmac
import http.server
import threading
import time

from audit import write
from cluster import free_port
from stage import Broken, Stage, wait_until

# Options of the server: by default webhooks only go to public addresses.
OPTIONS = ("--allow-network", "127.0.0.1/32")
DELIVERED_WITHIN_S = 1200
BETWEEN_JOBS_S = 5


class Receiver:
    """A place that webhooks go to; nobody is there before `listen`."""

    def __init__(self):
        self.address = ("127.0.0.1", free_port())
        self.url = f"http://{self.address[0]}:{self.address[1]}/hook"
        self.secret = b""
        self.bodies: list[str] = []
        self.forged = 0

    def listen(self):
        receiver = self

        class Hook(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                if receiver.is_signed(self.headers, body):
                    receiver.bodies.append(body.decode())
                else:
                    receiver.forged += 1
                self.send_response(204)
                self.end_headers()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(self.address, Hook)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def is_signed(self, headers, body: bytes) -> bool:
        """As Standard Webhooks has it."""
        signed = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
        expected = base64.b64encode(hmac.new(self.secret, signed, hashlib.sha256).digest()).decode()
        return f"v1,{expected}" in (headers["webhook-signature"] or "").split()


class Silence:
    """A receiver that is down for `down_s`."""

    def __init__(self, stage: Stage, down_s: float):
        self.stage, self.down_s, self.receiver, self.jobs = stage, down_s, Receiver(), []
        status, answer = stage.api.patiently("POST", "/webhooks", {"url": self.receiver.url})
        # A service without webhooks cannot show anything here.
        self.skipped = status in (404, 405)
        self.since = time.monotonic()
        if self.skipped:
            return
        if status >= 300:
            raise Broken(f"a webhook was refused: {status} {answer}")
        self.receiver.secret = base64.b64decode(answer["secret"].removeprefix("whsec_"))

    def run(self) -> dict:
        if self.skipped:
            return {"skipped": True, "broken": []}
        while time.monotonic() < self.since + self.down_s:
            job = self.stage.new_job(2_000_000 + len(self.jobs))
            if self.stage.api.ended(job)["state"] != "succeeded":
                raise Broken(f"ensemble {job} did not succeed")
            self.jobs.append(job)
            # These are a few ensembles beside the other runs.
            time.sleep(BETWEEN_JOBS_S)
        ended = [row["id"] for row in self.stage.rows("SELECT id FROM job WHERE state IN ('succeeded', 'cancelled', 'failed')")]
        self.receiver.listen()
        back = time.monotonic()
        missing = lambda: [job for job in ended if not any(job in body for body in list(self.receiver.bodies))]  # noqa: E731
        broken = []
        try:
            wait_until(lambda: not missing(), DELIVERED_WITHIN_S, "every ensemble's end delivered")
        except Broken as error:
            broken.append(f"{error}; {len(missing())} are missing")
        if self.receiver.forged:
            broken.append(f"{self.receiver.forged} deliveries were not signed with the webhook's secret")
        write(self.stage.folder / "deliveries.json", self.receiver.bodies)
        delivered = len(ended) - len(missing())
        return {
            "down_s": self.down_s, "ended": len(ended), "delivered": delivered, "deliveries": len(self.receiver.bodies),
            "after_s": time.monotonic() - back, "skipped": False, "broken": broken,
        }
