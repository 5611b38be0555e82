#!/usr/bin/env python3
"""promptweave's main job, end to end, over HTTP; `make demo` runs this.

Starts `promptweave up` with a fresh data directory, registers the backbone and the target images, uploads the
source prompts of demo/prompts, POSTs an ensemble, waits for it, shows what came out and leaves it in demo/out.
Whatever happens, it stops what it started. Python's standard library is enough.
"""

import argparse
import contextlib
import json
import math
import os
import pathlib
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request

DEMO = pathlib.Path(__file__).resolve().parent
ROOT = DEMO.parent
BACKBONE = "vit_s14_focus"  # under .assets
TARGET = "target"  # under demo
START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 40
FINISHED = ("succeeded", "failed", "cancelled")


class DemoError(Exception):
    pass


def say(text):
    print(text, flush=True)


# ---- The service --------------------------------------------------------------------------------------


class Service:
    """A `promptweave up` of our own, and its API."""

    def __init__(self, binary, data_dir, log_path, backbone_root, dataset_root):
        self.log_path = log_path
        self.key_file = data_dir / "api-key"
        self.log = open(log_path, "wb")
        command = [binary, "up", "--listen", "127.0.0.1:0", "--data-dir", data_dir]
        command += ["--backbone-root", backbone_root, "--dataset-root", dataset_root]
        # The service has a session of its own: Ctrl-C reaches only this script, which stops the service in order.
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self.log, stdin=subprocess.DEVNULL, start_new_session=True, text=True
        )

    def __enter__(self):
        try:
            self.url = self.wait_until_it_listens()
            self.key = self.key_file.read_text().strip()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_):
        self.stop()

    def wait_until_it_listens(self):
        # An alarm, because readline() has no timeout of its own.
        def too_late(*_):
            raise DemoError(f"`promptweave up` did not listen within {START_TIMEOUT_S} s; see {self.log_path}")

        previous = signal.signal(signal.SIGALRM, too_late)
        signal.alarm(START_TIMEOUT_S)
        try:
            for line in self.process.stdout:
                found = re.search(r"promptweave is listening on (http://\S+)", line)
                if found:
                    return found[1].rstrip("/")
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, previous)
        self.process.wait()
        self.log.flush()
        tail = "".join(self.log_path.read_text(errors="replace").splitlines(True)[-20:])
        raise DemoError(f"`promptweave up` ended with status {self.process.returncode}:\n{tail}")

    def stop(self):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.process.stdout.close()
        self.log.close()

    def call(self, method, path, body=None, content_type="application/json"):
        """Sends a request; answers the body: JSON as Python objects, other content as bytes."""
        data = json.dumps(body).encode() if content_type == "application/json" and body is not None else body
        url = path if path.startswith("http") else self.url + path
        headers = {"authorization": f"Bearer {self.key}"} | ({"content-type": content_type} if data else {})
        request = urllib.request.Request(url, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                content = response.read()
                is_json = response.headers.get_content_type() == "application/json"
                return json.loads(content) if is_json else content
        except urllib.error.HTTPError as error:
            raise DemoError(f"{method} {path}: {problem(error)}") from None
        except urllib.error.URLError as error:
            raise DemoError(f"{method} {path}: {error.reason}; see {self.log_path}") from None


def problem(error):
    """What an `application/problem+json` answer says."""
    text = error.read().decode(errors="replace")
    try:
        body = json.loads(text)
    except ValueError:
        return f"{error.code} {text[:500]}"
    fields = "".join(f"; {e.get('pointer')}: {e.get('detail')}" for e in body.get("errors", []))
    return f"{error.code} {body.get('code', '')}: {body.get('detail') or body.get('title')}{fields}"


# ---- The steps ----------------------------------------------------------------------------------------


def limited_target(folder, limit):
    """A copy of the target with the first `limit` images of each list."""
    copy = folder / TARGET
    copy.mkdir(parents=True)
    shutil.copy(DEMO / TARGET / "meta.json", copy)
    for name in ("train.txt", "test.txt"):
        lines = (DEMO / TARGET / name).read_text().splitlines(True)[:limit]
        (copy / name).write_text("".join(lines))
        for line in lines:
            image = line.split()[0]
            (copy / image).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(DEMO / TARGET / image, copy / image)
    return folder


def upload(service, prompt_files):
    backbone = service.call("POST", "/v1/backbones", {"name": "vit-s14", "directory": BACKBONE})
    say(f"registered backbone vit-s14, {backbone['digest'][:19]}…")
    dataset = service.call("POST", "/v1/datasets", {"name": "location", "directory": TARGET})
    counts = ", ".join(f"{count} {split}" for split, count in dataset["split_counts"].items())
    say(f"registered dataset location: {len(dataset['classes'])} classes, {counts} images")
    for file in prompt_files:
        service.call("POST", "/v1/prompts", {"name": file.stem})
        version = service.call(
            "POST", f"/v1/prompts/{file.stem}/versions", file.read_bytes(), "application/vnd.prompt+safetensors"
        )
        say(f"uploaded prompt {file.stem}:{version['version']}, {version['num_tokens']} tokens")


def run_ensemble(service, sources, output, objective=None):
    started = time.monotonic()
    job = service.call(
        "POST",
        "/v1/ensembles",
        {
            "backbone": "vit-s14",
            "target": {"dataset": "location", "split": "train", "eval_split": "test"},
            "sources": [{"prompt": name} for name in sources],
            "output": {"name": output},
        }
        | ({"objective": objective} if objective else {}),
    )
    say(f"ensemble {job['id']} of {len(sources)} sources is {job['state']}")
    job = wait_for(service, job)
    say(f"it took {time.monotonic() - started:.1f} s")
    return job


def wait_for(service, job):
    """The job once it has succeeded; shows its progress."""
    shown = None
    while job["state"] not in FINISHED:
        time.sleep(0.5)
        job = service.call("GET", job["urls"]["self"])
        shown = show_progress(job, shown)
    if sys.stdout.isatty():
        print("\r\033[K", end="")
    if job["state"] != "succeeded":
        raise DemoError(f"the job {job['state']}: {json.dumps(job.get('error'))}")
    return job


def solve(service, job, request):
    """The result of solving an ensemble again from its statistics, without the backbone, and what that took."""
    started = time.monotonic()
    again = wait_for(service, service.call("POST", f"/v1/ensembles/{job['id']}/solve", request))
    return service.call("GET", f"/v1/ensembles/{again['id']}/result"), time.monotonic() - started


def show_progress(job, shown):
    """One line that changes on a terminal, one line a phase elsewhere."""
    phase, progress = job.get("phase") or job["state"], job.get("progress") or {}
    done, total = progress.get("done", 0), progress.get("total", 0)
    if sys.stdout.isatty():
        share = done / total if total else 0
        bar = "█" * round(30 * share)
        print(f"\r\033[K  {phase:10s} {bar:30s} {share:4.0%}", end="", flush=True)
    elif phase != shown:
        say(f"  {phase} …")
    return phase


# ---- What came out ------------------------------------------------------------------------------------


def show(result, num_test):
    diagnostics = result["diagnostics"]
    width = max(len("best single (" + source["prompt"] + ")") for source in result["source_weights"])
    say(f"\n{'source':{width}s}  {'weight ± se':>15s}  {'its own H':>9s}")
    for source, own in zip(result["source_weights"], diagnostics["per_source"]):
        error = source["standard_error"]
        weight = f"{source['weight']:7.3f} ± " + ("    –" if error is None else f"{error:.3f}")
        say(f"{source['prompt']:{width}s}  {weight:>15s}  {own['h_score']:9.3f}")

    baselines = diagnostics["baselines"]
    rows = [
        ("composed prompt", diagnostics["composed_score"]),
        ("uniform average", baselines["uniform"]),
        (f"best single ({baselines['best_single_prompt']})", baselines["best_single"]),
    ]
    say(f"\n{'prompt':{width}s}  {'H':>7s}  {'held-out accuracy':>17s}")
    for name, score in rows:
        accuracy = score["eval_accuracy"]
        error = math.sqrt(accuracy * (1 - accuracy) / num_test)
        say(f"{name:{width}s}  {score['h_score']:7.3f}  {accuracy:9.1%} ± {error:.1%}")
    say(f"(closed-form heads fitted on {diagnostics['num_samples']} images, tried on {num_test} others; ± is one standard error)")
    show_warnings(result)


def show_warnings(result):
    for warning in result["warnings"]:
        say(f"warning: {warning['code']}: {warning['detail']}")


def show_pool(result):
    """The weights of the sources' own predictions, with the losses of each alone and of all together; then what the pool
    and what else could be used reach on the held-out images."""
    pool = result["pool"]
    width = max(len(source["prompt"]) for source in pool["weights"] + [{"prompt": "pool of predictions"}])
    say(f"\n{'pool of predictions':{width}s}  {'weight ± se':>15s}  {'cross-fitted loss':>17s}")
    for source in [*pool["weights"], pool["no_transfer"] | {"prompt": "no prompt"}]:
        weight = f"{source['weight']:7.3f} ± {source['standard_error']:.3f}"
        say(f"{source['prompt']:{width}s}  {weight:>15s}  {source['validation_loss']:12.4f} nats")
    for name, loss in (("equal weights", pool["uniform_validation_loss"]), ("this pool", pool["validation_loss"])):
        say(f"{name:{width}s}  {'':15s}  {loss:12.4f} nats")
    say(f"\n{'on held-out images':{width}s}  {'passes':>6s}  {'accuracy (95 %)':>22s}  {'the pool less this (95 %)':>28s}")
    for row in result["comparison"]:
        low, high = row["accuracy_interval"]
        least, most = row["pool_gain_interval"]
        gain = f"{row['pool_gain']:+6.1%} ({least:+.1%} to {most:+.1%})" if row["prediction"] != "pool" else ""
        name = row["prediction"].replace("_", " ")
        accuracy = f"{row['accuracy']:.1%} ({low:.1%} to {high:.1%})"
        say(f"{name:{width}s}  {row['forward_passes']:6d}  {accuracy:>22s}  {gain:>28s}")
    show_warnings(result)


def predict(service, pooled, answer, out):
    """Keeps the pool's ensemble, predicts the held-out images by it, and shows a few of the predictions."""
    (out / "ensemble.safetensors").write_bytes(service.call("GET", pooled["urls"]["ensemble"]))
    ensemble = answer["pool"]["ensemble"]
    request = {
        "model": f"{ensemble['prompt']}:{ensemble['version']}", "dataset": "location", "split": "test", "format": "jsonl",
    }
    job = wait_for(service, service.call("POST", "/v1/predictions", request))
    rows = service.call("GET", job["urls"]["file"])
    (out / "predictions.jsonl").write_bytes(rows)
    rows = [json.loads(line) for line in rows.decode().splitlines()]
    for row in rows[:: max(1, len(rows) // 5)][:5]:
        say(f"  {row['image']}: {row['class']} ({row['probability']:.0%}); it is {row['label']}")
    accuracy = service.call("GET", f"/v1/predictions/{job['id']}/result")["score"]["accuracy"]
    say(f"  {accuracy:.1%} of {len(rows)} are right")
    of_pool = next(row for row in answer["comparison"] if row["prediction"] == "pool")
    # The file keeps the heads in f32, so one image may be a tie.
    if abs(accuracy - of_pool["accuracy"]) * len(rows) > 1.5:
        raise DemoError(f"the ensemble's accuracy is {accuracy}, and its job reported {of_pool['accuracy']}")


def weights_of(result):
    return {source["prompt"]: source["weight"] for source in result["source_weights"]}


def check_equal(what, expected, found):
    """Raises where two results' weights differ."""
    expected, found = weights_of(expected), weights_of(found)
    difference = max(abs(found[name] - weight) for name, weight in expected.items())
    say(f"largest difference of a weight between {what}: {difference:.1e}")
    if difference > 1e-6:
        raise DemoError(f"{what} disagree by more than 1e-6")


def solve_again(service, job, result):
    """With the same objective, which must find the same weights, and at the knee of the path. The knee's result."""
    same, _ = solve(service, job, {})
    check_equal("the ensemble and itself, solved again from its statistics", result, same)
    knee, seconds = solve(service, job, {"objective": {"trade_off": "knee"}})
    shown = ", ".join(f"{prompt} {weight:.3f}" for prompt, weight in weights_of(knee).items() if weight > 0)
    say(f"at the knee of the path, t = {knee['objective']['trade_off']:.2f}, in {seconds:.1f} s: {shown}")
    return knee


def compare_offline(binary, prompt_files, target, answer, result, knee, out):
    """`promptweave compose` and `solve` on the same files must find the same weights."""
    say("\ncomposing the same files offline, by both methods, and solving again at the knee")
    command = [binary, "compose", "--backbone", ROOT / ".assets" / BACKBONE, "--target", target, "--eval-split", "test"]
    for file in prompt_files:
        command += ["--source", f"{file.stem}={file}"]
    subprocess.run([*command, "--method", "pool", "--out", out / "pool"], check=True)
    check_equal("service and `promptweave compose --method pool`", answer, json.loads((out / "pool" / "result.json").read_text()))
    subprocess.run([*command, "--out", out], check=True)
    check_equal("service and `promptweave compose`", result, json.loads((out / "result.json").read_text()))
    command = [binary, "solve", "--statistics", out / "statistics.safetensors", "--trade-off", "knee"]
    subprocess.run([*command, "--out", out / "knee"], check=True)
    check_equal("service and `promptweave solve`", knee, json.loads((out / "knee" / "result.json").read_text()))


def main():
    parser = argparse.ArgumentParser(description="promptweave's main job, end to end")
    target_dir = os.environ.get("CARGO_TARGET_DIR", ROOT / "target")
    parser.add_argument("--binary", type=pathlib.Path, default=pathlib.Path(target_dir) / "release" / "promptweave")
    parser.add_argument("--out", type=pathlib.Path, default=DEMO / "out", help="where the results go [demo/out]")
    parser.add_argument("--limit", type=int, help="use only the first LIMIT images of each list")
    parser.add_argument(
        "--compare-offline", action="store_true", help="also run `promptweave compose` and `solve` and compare the weights"
    )
    arguments = parser.parse_args()
    prompt_files = sorted((DEMO / "prompts").glob("*.safetensors"))
    for path in (arguments.binary, ROOT / ".assets" / BACKBONE / "config.json"):
        if not path.exists():
            raise DemoError(f"{path} is not there; `make demo` makes it")
    if len(prompt_files) < 2:
        raise DemoError(f"{DEMO / 'prompts'} holds {len(prompt_files)} prompt files; two are the least")
    arguments.out.mkdir(parents=True, exist_ok=True)
    # The paths are absolute, because a service has its own working directory.
    binary, out = arguments.binary.resolve(), arguments.out.resolve()

    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="promptweave-demo-")))
        os.chmod(folder, 0o755)  # as root, the database runs as another user, who has to get in
        dataset_root = limited_target(folder / "datasets", arguments.limit) if arguments.limit else DEMO
        num_test = len((dataset_root / TARGET / "test.txt").read_text().splitlines())

        say("starting promptweave (a private database, the API, a worker)")
        service = stack.enter_context(
            Service(binary, folder / "data", out / "service.log", ROOT / ".assets", dataset_root)
        )
        say(f"it listens on {service.url}; its log is {out / 'service.log'}")
        upload(service, prompt_files)
        names = [file.stem for file in prompt_files]
        say("\nhow much of each source's prediction (method `pool`)")
        pooled = run_ensemble(service, names, "location-pool", {"method": "pool"})
        answer = service.call("GET", f"/v1/ensembles/{pooled['id']}/result")
        show_pool(answer)
        of_pool = service.call("GET", f"/v1/ensembles/{pooled['id']}/statistics")
        for name, content in (("pool.json", json.dumps(answer, indent=2).encode()), ("pool.safetensors", of_pool)):
            (out / name).write_bytes(content)
        say("\na few held-out images, predicted by the pool")
        predict(service, pooled, answer, out)

        say("\nhow much of each source's prompt in one composed prompt (the default method)")
        job = run_ensemble(service, names, "location-composed")
        result = service.call("GET", f"/v1/ensembles/{job['id']}/result")
        (out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
        composed = result["composed_prompt"]
        content = service.call("GET", f"/v1/prompts/{composed['prompt']}/versions/{composed['version']}/content")
        (out / "composed.safetensors").write_bytes(content)
        statistics = service.call("GET", f"/v1/ensembles/{job['id']}/statistics")
        (out / "statistics.safetensors").write_bytes(statistics)
        show(result, num_test)
        say("\nsolving again from the statistics, without the backbone")
        knee = solve_again(service, job, result)
        if arguments.compare_offline:
            compare_offline(binary, prompt_files, dataset_root / TARGET, answer, result, knee, folder / "offline")
        say("\nstopping promptweave")

    peak_mb = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    say(f"its largest process used {peak_mb:.0f} MB of memory at most")
    say("\nrecomputing terms and weights from the statistics, by code of its own (scripts/verify_statistics.py)")
    verify = ROOT / "scripts" / "verify_statistics.py"
    subprocess.run([sys.executable, verify, out / "result.json", out / "statistics.safetensors"], check=True)
    subprocess.run([sys.executable, verify, out / "pool.json", out / "pool.safetensors"], check=True)
    for answered, pictures in (("result.json", out), ("pool.json", out / "pool")):
        subprocess.run([binary, "plot", out / answered, "--out", pictures], check=True, stdout=subprocess.DEVNULL)
    say(f"\nin {out}:")
    pictures = ("pool/weights.svg", "weights.svg", "pareto_path.svg")
    files = ("pool.json", "ensemble.safetensors", "predictions.jsonl", "result.json", "composed.safetensors", "statistics.safetensors")
    for name in (*files, *pictures):
        say(f"  {name}, {(out / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    # A polite kill ends like Ctrl-C: by unwinding, which stops the service.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        main()
    except DemoError as error:
        sys.exit(f"demo: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"demo: `{' '.join(map(str, error.cmd[:2]))}` ended with status {error.returncode}")
    except KeyboardInterrupt:
        sys.exit("\ndemo: interrupted")
