"""The other end of src/failpoints.rs: processes say which point they have reached, and somebody decides what happens."""

import pathlib
import socketserver
import threading
from collections.abc import Callable

# The points in a worker's code, in order; the phases are the engine's.
PHASES = ["features", "heads", "gradients", "solve", "verify"]
POINTS = ["claimed", "fetching", "fetched", *PHASES, "progressing", "renewing", "renewed", "storing", "stored"]
POINTS += ["finishing", "finished", "failing", "releasing", "cancelling", "reaping"]

# The type of the function that is called with the point and the job; its result is the answer.
Decision = Callable[[str, str | None], str]


class Faults:
    """Listens on a socket until the end of its `with` block."""

    def __init__(self, path: pathlib.Path):
        self.decisions: dict[int, Decision] = {}
        # This is held while a process is started, so that the process is known before it reports a point.
        self.starting = threading.Lock()
        faults = self

        class Reached(socketserver.StreamRequestHandler):
            def handle(self):
                pid, point, *job = self.rfile.readline().decode().split()
                with faults.starting:
                    decide = faults.decisions.get(int(pid))
                answer = decide(point, job[0] if job else None) if decide else ""
                try:
                    self.wfile.write(answer.encode())
                except OSError:
                    pass  # it was killed

        class Server(socketserver.ThreadingUnixStreamServer):
            daemon_threads = True
            request_queue_size = 128

        self.server = Server(str(path), Reached)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
