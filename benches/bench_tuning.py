#!/usr/bin/env python3
"""`promptweave tune` beside a plain PyTorch loop of the same model, on the same images and cores; `make bench-tuning` runs this.

Both take turns, each run a process of its own. They begin with the same prompt and take the same batches of the same pixels
(decoded and resized beforehand), so the cross-entropies of their epochs are compared too. What starting takes is left out of images per second: of `tune` by the
difference between a run of all epochs and a run of one, of PyTorch by its own clock, from the second epoch on. Python's
standard library is enough here; PyTorch lives in an environment of its own (benches/pytorch.sh, or name a Python that has
it in PYTORCH).
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

from harness import (
    BenchError,
    ROOT,
    build,
    digits,
    fast_mkl,
    machine,
    machine_line,
    main,
    pytorch,
    run,
    say,
    spread,
    table,
    target_folder,
    with_spread,
    write_into_document,
    write_result,
)

SECTION = "bench-tuning"
PLAIN_TUNING = ROOT / "benches" / "plain_tuning.py"
DATA = ROOT / "demo" / "target"
WHOLE, SHRUNK = ROOT / ".assets" / "vit_s14_focus", ROOT / ".assets" / "vit_s14_focus_6x70"
MODELS = {"ViT-S/14 at 98 × 98": WHOLE, "its first 6 blocks at 70 × 70": SHRUNK}
OURS, THEIRS, FORCED = "promptweave tune", "plain PyTorch", "plain PyTorch, MKL's fast path forced"
# Largest allowed difference of an epoch's cross-entropy, in nats: sums are in another order, and the steps carry that
# on.
TOLERANCE = 1e-4


class Bench:
    """One model, and how each contender is run on it: images a second, seconds of the whole run, memory, cross-entropies."""

    def __init__(self, backbone, promptweave, python, library, folder, args):
        self.backbone, self.promptweave, self.python, self.library, self.args = backbone, promptweave, python, library, args
        self.data = folder / backbone.name
        run([python, PLAIN_TUNING, "--backbone", backbone, "--data", DATA, "--resize", self.data])

    def contenders(self):
        runs = {OURS: self.tune, THEIRS: self.plain}
        return runs | {FORCED: lambda: self.plain({"LD_PRELOAD": str(self.library)})} if self.library else runs

    def options(self, epochs):
        return ["--backbone", self.backbone, "--target", self.data, "--epochs", epochs, "--threads", self.args.threads]

    def tune(self):
        one, _, _ = self.tune_for(1)
        whole, memory, file = self.tune_for(self.args.epochs)
        images = file["num_samples"] * (self.args.epochs - 1)
        return measured(images / (whole - one), whole, memory, file["cross_entropy"])

    def tune_for(self, epochs):
        """Seconds, memory, and the training record of the prompt file."""
        with tempfile.TemporaryDirectory() as folder:
            out = pathlib.Path(folder) / "prompt.safetensors"
            command = [self.promptweave, "tune", *self.options(epochs), "--device", "cpu", "--out", out]
            begun = time.perf_counter()
            _, memory = run(command)
            return time.perf_counter() - begun, memory, training_record(out)

    def plain(self, env=None):
        begun = time.perf_counter()
        out, memory = run([self.python, PLAIN_TUNING, *self.options(self.args.epochs)], env)
        whole, told = time.perf_counter() - begun, json.loads(out.splitlines()[-1])
        images = told["images"] * (self.args.epochs - 1)
        return measured(images / sum(told["seconds"][1:]), whole, memory, told["cross_entropy"])


def measured(rate, seconds, memory, cross_entropy):
    return {"images_per_second": rate, "seconds": seconds, "memory_mib": memory, "cross_entropy": cross_entropy}


def training_record(path):
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"]["promptweave"])["training"]


def measure(model, bench, rounds):
    say(f"\n{model}")
    lines = {name: [] for name in bench.contenders()}
    for round_ in range(rounds):
        for name, contender in bench.contenders().items():
            lines[name].append(contender())
            say(f"  round {round_ + 1} of {rounds}: {name:38} {lines[name][-1]['images_per_second']:7.1f} images/s")
    rates = {name: [line["images_per_second"] for line in of] for name, of in lines.items()}
    ours, theirs = (lines[name][0]["cross_entropy"] for name in (OURS, THEIRS))
    off = max(abs(a - b) for a, b in zip(ours, theirs, strict=True))
    say(f"  cross-entropies of an epoch differ by at most {off:.1e} nats (allowed: {TOLERANCE:.0e})")
    # This comparison also refuses NaN.
    if not off <= TOLERANCE:
        raise BenchError(f"{model}: the two do not go the same way: {ours} and {theirs}")
    return {
        "model": model,
        "rows": [
            {"name": name, "images_per_second": spread(rates[name])}
            | {column: spread([line[column] for line in of]) for column in ("seconds", "memory_mib")}
            for name, of in lines.items()
        ],
        "ratios": {name: spread([x / y for x, y in zip(rates[OURS], rates[name])]) for name in lines if name != OURS},
        "cross_entropy": ours,
        "largest_difference": off,
    }


def report(result):
    epochs, threads = result["epochs"], result["threads"]
    parts = [
        f"Measured on {machine_line(result['machine'])} {result['rounds']} interleaved rounds of {epochs} epochs on the demo's "
        f"target images, f32, {threads} {'thread' if threads == 1 else 'threads'} each; medians, in brackets the least and the most."
    ]
    for model in result["models"]:
        rows = [
            [
                row["name"],
                with_spread(row["images_per_second"]),
                with_spread(row["seconds"]),
                f"{row['memory_mib']['median']:,.0f}",
            ]
            for row in model["rows"]
        ]
        ratios = ", ".join(f"{with_spread(of)} times {name}" for name, of in model["ratios"].items())
        curve = model["cross_entropy"]
        parts += [
            f"### Tuning on {model['model']}",
            table(["", "images/s", "the whole run, s", "peak memory, MiB"], rows),
            f"promptweave does {ratios} in images per second. Cross-entropy falls from {digits(curve[0])} to "
            f"{digits(curve[-1])} nats; an epoch's differs by at most {model['largest_difference']:.1e} from PyTorch's.",
        ]
    return "\n\n".join(parts)


def run_all():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=6, help="of a run, at least 2")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="of both [all cores]")
    parser.add_argument("--quick", action="store_true", help="two epochs, one round, no document: does all of it run?")
    parser.add_argument("--no-document", action="store_true", help="leave docs/performance.md as it is")
    parser.add_argument("--promptweave", help="a built binary, instead of building it")
    args = parser.parse_args()
    if args.quick:
        args.rounds, args.epochs, args.no_document = 1, 2, True
    promptweave = args.promptweave or build()[1]
    folder = target_folder() / SECTION
    folder.mkdir(parents=True, exist_ok=True)
    if not SHRUNK.exists():
        shrink = [sys.executable, ROOT / "scripts" / "shrink_backbone.py", WHOLE, SHRUNK]
        subprocess.run([*shrink, "--blocks", "6", "--size", "70"], check=True)
    python = os.environ.get("PYTORCH") or pytorch()
    here = machine()
    # On other processors MKL takes a slow path by itself (docs/performance.md).
    library = None if "Intel" in here["processor"] else fast_mkl(folder)
    models = [
        measure(model, Bench(backbone, promptweave, python, library, folder, args), args.rounds)
        for model, backbone in MODELS.items()
    ]
    result = {
        # This is the worse of the two models.
        "ratio_pytorch": min(model["ratios"][THEIRS]["median"] for model in models),
        "machine": here,
        "rounds": args.rounds,
        "epochs": args.epochs,
        "threads": args.threads,
        "models": models,
    }
    text = report(result)
    say("\n" + text + "\n")
    write_result(folder, result)
    if not args.no_document:
        write_into_document(SECTION, text)


if __name__ == "__main__":
    main(run_all)
