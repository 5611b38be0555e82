#!/usr/bin/env python3
"""The API against its document: the main job through a client that is made of it, then schemathesis, with a key and without.
`make fuzz-api` runs this, and `make test` in short.

    scripts/with_postgres.sh python3 scripts/fuzz_api/run.py PROMPTWEAVE [--examples N] [--short]

It fails on a server error, on a status or a content that the API's document does not have, and on the other checks of
schemathesis.toml. The document has no response `default`, which would make every status a documented one.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import urllib.request

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent
ROOT = SCRIPTS.parent
sys.path.insert(0, str(SCRIPTS))

import client  # noqa: E402
from service import Service  # noqa: E402

# A waiting request ends after this many seconds, so that a route that waits cannot hold up the run.
OPTIONS = ["--request-timeout-s", "20", "--max-wait-s", "1", "--dataset-root", str(ROOT / "demo"), "--backbone-root", str(ROOT / ".assets")]


def fill(service: Service, key: str) -> list[str]:
    """Puts one of everything in, under the names that the document's examples have: without, most requests would end
    at the first 404. Returns the ids of two ensembles, one that waits for a worker and one cancelled."""

    def send(path: str, body, kind="application/json", method="POST"):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"authorization": f"Bearer {key}", "content-type": kind}
        request = urllib.request.Request(service.url + path, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    files = sorted((ROOT / "demo" / "prompts").glob("*.safetensors"))[:2]
    names = ["dtd", "svhn"]
    for name, file in zip(names, files):
        send("/v1/prompts", {"name": name, "tags": {"kind": "demo"}})
        send(f"/v1/prompts/{name}/versions", file.read_bytes(), "application/vnd.prompt+safetensors")
    send("/v1/prompts/dtd/aliases/production", {"version": 1}, method="PUT")
    send("/v1/datasets", {"name": "food", "directory": "target"})
    send("/v1/backbones", {"name": "vit-s14", "directory": "vit_s14_focus"})
    ensembles = []
    for seed in (0, 1):
        target = {"dataset": "food", "seed": seed}
        body = {"backbone": "vit-s14", "target": target, "sources": [{"prompt": name} for name in names]}
        ensembles.append(send("/v1/ensembles", body)["id"])
    send(f"/v1/ensembles/{ensembles[1]}/cancel", {})
    return ensembles


def schemathesis(service: Service, key: str | None, environment: dict[str, str], arguments) -> bool:
    """Whether all checks passed."""
    print(f"\n=== schemathesis {'with a key' if key else 'without a key'}", flush=True)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(SCRIPTS / "fuzz_api" / "schemathesis.toml")]
    command += ["run", f"{service.url}/openapi.json", "--max-examples", str(arguments.examples), "--seed", str(arguments.seed)]
    if key:
        command += ["--header", f"Authorization: Bearer {key}"]
    if arguments.short:
        command += ["--generation-deterministic"]
    command += arguments.more
    return subprocess.run(command, cwd=ROOT, env=os.environ | environment, check=False).returncode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description="schemathesis against a running service")
    parser.add_argument("promptweave", type=pathlib.Path)
    parser.add_argument("--examples", type=int, default=200, help="an operation and phase [200]")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--short", action="store_true", help="the same few requests every time")
    parser.add_argument("more", nargs="*", help="for schemathesis, after `--`")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="promptweave-fuzz-") as folder:
        with Service(arguments.promptweave.resolve(), pathlib.Path(folder), *OPTIONS) as service:
            key = service.key("read", "write", "run", "admin")
            # This runs while no ensemble exists: later, its worker would take those that must wait.
            client.main_job(service, arguments.promptweave.resolve(), key, pathlib.Path(folder))
            known = {"FUZZ_ENSEMBLES": " ".join(fill(service, key)), "FUZZ_KEY_ID": key.split("_")[1]}
            passed = [schemathesis(service, key, known, arguments), schemathesis(service, None, known, arguments)]
            if errors := service.errors():
                sys.exit(f"the service logged errors:\n{errors}")
    if not all(passed):
        sys.exit(1)


if __name__ == "__main__":
    main()
