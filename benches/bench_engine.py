#!/usr/bin/env python3
"""The engine against the machine's own matrix rate and against plain PyTorch; `make bench-engine` runs this.

For each of two models, in interleaved rounds, every contender a process of its own:

    a     matrix products at the shapes of the model's linear maps, through the library promptweave computes with
    b     promptweave, f32                 b16   promptweave, bf16
    c     plain PyTorch, f32               c16   plain PyTorch, bf16
    c2    plain PyTorch, f32, with MKL's fast path switched on by force on a processor that is not Intel's
    bw    promptweave, f32, one wide stream instead of a narrow one a core
    d     promptweave's plain path, one sample and one prompt at a time

The job is M prompts × N samples: a feature pass, then a gradient pass to the prompts, with a given linear head. Before
anything is timed, features and gradients of b and c are compared. Python's standard library is enough here;
PyTorch lives in an environment of its own (benches/pytorch.sh, or name a Python that has it in PYTORCH).
"""

import argparse
import array
import json
import os
import pathlib

from harness import (
    BenchError,
    ROOT,
    build,
    digits,
    fast_mkl,
    json_line,
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

SECTION = "bench-engine"
PLAIN_PYTORCH = ROOT / "benches" / "plain_pytorch.py"
PROMPTS, TOKENS = 4, 10
MODELS = [
    # Samples come in multiples of `unit`, up to `most`, so that no side ends on a small batch.
    {"name": "ViT-S/14 at 98 × 98", "backbone": ROOT / ".assets/vit_s14_focus", "preset": None}
    | {"batches": [8, 16, 32], "gemm_batches": [16, 32], "unit": 32, "most": 128, "naive": 4},
    {"name": "ViT-B/16 at 224 × 224", "backbone": None, "preset": "vit-b16"}
    | {"batches": [4, 8], "gemm_batches": [4, 8], "unit": 8, "most": 16, "naive": 1},
]
# Largest allowed difference over largest value, between two implementations (docs/method.md): of features [M, N, d]; of
# Γ, which contains every entry of every sample's gradient; and of the gradients' root mean squares.
TOLERANCES = {"features": 1e-4, "gram": 1e-3, "rms": 1e-4}
LABELS = {
    "b": "promptweave, f32",
    "bw": "promptweave, f32, one wide stream for all threads",
    "b16": "promptweave, bf16",
    "c": "plain PyTorch, f32",
    "c2": "plain PyTorch, f32, MKL's fast path forced",
    "c16": "plain PyTorch, bf16",
    "d": "one sample and prompt at a time, f32",
}
# The contenders whose time is reported by part.
PROFILED = ["b", "b16"]
RATIOS = [("b", "c"), ("b", "c2"), ("b16", "c16"), ("b", "bw"), ("b", "d"), ("b16", "b")]


# ---- What is compared ------------------------------------------------------------------------------------


class Bench:
    """One model with its inputs, and how each contender is started on it."""

    def __init__(self, model, binary, python, fast_mkl, folder):
        self.model, self.binary, self.python, self.fast_mkl = model, binary, python, fast_mkl
        self.folder = folder / pathlib.Path(model["backbone"] or model["preset"]).name
        self.backbone = model["backbone"] or self.folder / "backbone"
        self.inputs = self.folder / "inputs"
        if model["preset"]:
            json_line([binary, "backbone", "--preset", model["preset"], "--out", self.backbone])
        command = [binary, "inputs", "--backbone", self.backbone, "--out", self.inputs, "--samples", model["most"]]
        json_line([*command, "--prompts", PROMPTS, "--tokens", TOKENS])
        self.config = json.loads((self.backbone / "config.json").read_text())
        self.batches = {}

    @property
    def contenders(self):
        return [id for id in LABELS if id != "c2" or self.fast_mkl]

    def command(self, id, samples, batches):
        precision = "bf16" if id.endswith("16") else "f32"
        options = ["--backbone", self.backbone, "--samples", samples, "--precision", precision]
        if id.startswith("c"):
            batch = ",".join(map(str, batches))
            inputs = self.inputs / "inputs.safetensors"
            return [self.python, PLAIN_PYTORCH, *options, "--inputs", inputs, "--batch", batch]
        job = {"d": ["naive", "--reference-path"], "bw": ["job", "--wide"]}.get(id, ["job"])
        return [self.binary, *job, *options, "--inputs", self.inputs]

    def env(self, id):
        return {"LD_PRELOAD": str(self.fast_mkl)} if id == "c2" else None

    def job(self, id, samples):
        batches = [self.batches.get(id)] if id in self.batches else self.model["batches"]
        return json_line(self.command(id, samples, batches), self.env(id))

    def gemm(self):
        """The best that the library gives, by whatever switch."""
        batch = ",".join(map(str, self.model["gemm_batches"]))
        command = [self.binary, "gemm", "--backbone", self.backbone, "--tokens", TOKENS, "--batch", batch]
        return json_line(command, {"LD_PRELOAD": str(self.fast_mkl)} if self.fast_mkl else None)

    def operations(self):
        """Floating-point operations of a pair as a plain implementation needs them: two forward passes and one
        backward pass to the input (docs/method.md); a multiply-add is two."""
        d, depth, patch = (self.config[key] for key in ("embed_dim", "depth", "patch_size"))
        patches = (self.config["preprocessing"]["size"] // patch) ** 2
        n = 1 + TOKENS + patches
        forward = depth * (12 * n * d * d + 2 * n * n * d) + patches * 3 * patch * patch * d
        backward = depth * (12 * n * d * d + 4 * n * n * d)
        return 2 * (2 * forward + backward)

    def check(self):
        """What both sides compute from the same inputs; bf16 beside them as it comes."""
        files = {id: self.folder / f"{id}.safetensors" for id in ("b", "c", "b16", "c16")}
        for id, file in files.items():
            command = self.command(id, 4, [4])
            if id.startswith("b"):
                command[1], out = "dump", "--out"
            else:
                out = "--dump"
            run([*command, out, file])
        values = {id: read_safetensors(file) for id, file in files.items()}
        differences = {}
        for id in ("b", "b16", "c16"):
            differences[id] = {name: difference(values[id][name], values["c"][name]) for name in TOLERANCES}
        for name, tolerance in TOLERANCES.items():
            off = differences["b"][name]
            say(f"  {name:9} of b and c differ by at most {off:.1e} of the largest (allowed: {tolerance:.0e})")
            # This comparison also refuses NaN.
            if not off <= tolerance:
                raise BenchError(f"{self.model['name']}: promptweave's and PyTorch's {name} differ by {off:.2e}")
        return differences


def read_safetensors(path):
    content = path.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    tensors = {}
    for name, header in json.loads(content[8:length]).items():
        if name != "__metadata__":
            start, end = header["data_offsets"]
            tensors[name] = array.array("f", content[length + start : length + end])
    return tensors


def difference(a, b):
    if len(a) != len(b):
        raise BenchError(f"{len(a)} values are compared with {len(b)}")
    largest = max(map(abs, b))
    differences = [abs(x - y) for x, y in zip(a, b)]
    # max() may pass over a NaN, a sum does not.
    return max(differences) / largest if sum(differences) < float("inf") else float("nan")


# ---- Measuring -------------------------------------------------------------------------------------------


def measure(bench, rounds, seconds):
    model = bench.model
    say(f"\n{model['name']}, {PROMPTS} prompts of {TOKENS} tokens")
    differences = bench.check()
    samples = {}
    for id in bench.contenders:
        if id == "d":
            samples[id] = model["naive"]
            continue
        say(f"  trying {LABELS[id]}")
        line = bench.job(id, model["unit"])
        if "batch" in line:
            bench.batches[id] = line["batch"]
        units = seconds * line["pairs"] / line["seconds"] / PROMPTS / model["unit"]
        samples[id] = min(max(1, round(units)) * model["unit"], model["most"])
    lines, gemm = {id: [] for id in bench.contenders}, []
    for round_ in range(rounds):
        say(f"  round {round_ + 1} of {rounds}")
        gemm.append(bench.gemm())
        # The order alternates, so that no contender always follows the same one.
        for id in bench.contenders if round_ % 2 == 0 else reversed(bench.contenders):
            line = bench.job(id, samples[id])
            lines[id].append(line)
            say(f"    {id:4} {line['pairs'] / line['seconds']:8.2f} pairs/s")
    return summary(bench, samples, lines, gemm, differences)


def best_rate(gemm, precision):
    """Of all threads together, in one product or with a product each, in the best round: what the machine can do."""
    return max(a[precision][mode]["gflops"] for a in gemm for mode in ("wide", "narrow"))


def profile(lines, gemm, operations):
    """Where the time of all streams went, in the round that was disturbed least."""
    line = min(lines, key=lambda line: line["seconds"])
    spent, whole = line["spent"], line["threads"] * line["seconds"]
    linear, attention = spent["linear"], spent["attention"]
    seconds = {
        "matrix products with the model's weights": linear["seconds"],
        "attention: its products and softmax": attention["seconds"],
        "passes between products: norms, GELU, copies": spent["pass"]["seconds"] - linear["seconds"] - attention["seconds"],
        "between passes: pixels, slopes, statistics, waiting": whole - spent["pass"]["seconds"],
    }
    gflop = dict(zip(seconds, (linear["gflop"], attention["gflop"])))
    needed = line["pairs"] * operations * 1e-9
    return {
        "parts": [
            {"part": part, "share": of / whole, "gflops": gflop[part] / of if part in gflop else None}
            for part, of in seconds.items()
        ],
        # Of the operations that a plain implementation needs, these were done.
        "operations_done": sum(gflop.values()) / needed,
        "gflops": needed / line["seconds"],
    }


def summary(bench, samples, lines, gemm, differences):
    operations = bench.operations()
    rates = {id: [line["pairs"] / line["seconds"] for line in lines[id]] for id in lines}
    rows = []
    for id, of_id in rates.items():
        precision = "bf16" if id.endswith("16") else "f32"
        gflops = [rate * operations * 1e-9 for rate in of_id]
        row = {
            "id": id,
            "label": LABELS[id],
            "samples": samples[id],
            "batch": bench.batches.get(id),
            "threads": lines[id][0]["threads"],
            "pairs_per_second": spread(of_id),
            "gflops": spread(gflops),
            "share_of_gemm": spread([rate / best_rate(gemm, precision) for rate in gflops]),
            "feature_seconds": spread([line["features"] for line in lines[id]]),
            "gradient_seconds": spread([line["gradients"] for line in lines[id]]),
            "memory_mib": spread([line["memory_mib"] for line in lines[id]]),
        }
        rows.append(row)
    ratios = {}
    for ours, theirs in RATIOS:
        if ours in rates and theirs in rates:
            ratios[f"{ours}/{theirs}"] = spread([x / y for x, y in zip(rates[ours], rates[theirs])])
    modes = {}
    for precision in ("f32", "bf16"):
        for mode in ("one_thread", "wide", "narrow"):
            modes[f"{precision} {mode}"] = spread([a[precision][mode]["gflops"] for a in gemm])
    return {
        "model": bench.model["name"],
        "profiles": {id: profile(lines[id], gemm, operations) for id in PROFILED},
        "gflop_per_pair": operations * 1e-9,
        "gemm_gflops": modes,
        "rows": rows,
        "ratios": ratios,
        "largest_differences_from_c": differences,
    }


# ---- Telling ---------------------------------------------------------------------------------------------


def percent(value):
    return f"{100 * value:.0f} %"


def told_profile(model):
    """What limits promptweave."""
    profiles = list(model["profiles"].items())
    # Parts are rows, and each contender has two columns.
    rows = []
    for of_part in zip(*(profile["parts"] for _, profile in profiles)):
        shares = [[percent(of["share"]), digits(of["gflops"]) if of["gflops"] else ""] for of in of_part]
        rows.append([of_part[0]["part"], *(cell for cells in shares for cell in cells)])
    header = ["", *(cell for id, _ in profiles for cell in (f"({id}) time", "GFLOP/s a thread"))]
    (_, b), *_ = profiles
    rates = ", ".join(f"{digits(profile['gflops'])} GFLOP/s in ({id})" for id, profile in profiles)
    return [
        f"Where the time of its streams goes, in the round that was disturbed least ({rates}), and the rate of products "
        f"while they run. Of the operations a plain implementation needs {percent(b['operations_done'])} are done:",
        table(header, rows),
    ]


def report(result):
    parts = [
        f"Measured on {machine_line(result['machine'])} M = {PROMPTS} prompts of {TOKENS} tokens, "
        f"{result['rounds']} interleaved rounds; medians, in brackets the least and the most."
    ]
    for model in result["models"]:
        a = model["gemm_gflops"]
        both = [
            f"{precision}: {digits(a[f'{precision} one_thread']['median'])} on one thread, on all "
            f"{with_spread(a[f'{precision} wide'])} in one product and {with_spread(a[f'{precision} narrow'])} with a "
            "product each"
            for precision in ("f32", "bf16")
        ]
        rows = [
            [
                f"({row['id']}) {row['label']}",
                with_spread(row["pairs_per_second"]),
                digits(row["gflops"]["median"]),
                with_spread(row["share_of_gemm"], percent),
                row["batch"] or "",
                f"{row['memory_mib']['median']:,.0f}",
            ]
            for row in model["rows"]
        ]
        ratios = [[f"({name.replace('/', ') / (')})", with_spread(of)] for name, of in model["ratios"].items()]
        off = model["largest_differences_from_c"]
        off = [
            f"({id}) {off[id]['features']:.1e} in features, {off[id]['rms']:.1e} in the size of gradients, "
            f"{off[id]['gram']:.1e} in Γ"
            for id in off
        ]
        parts += [
            f"### {model['model']}",
            f"A pair is {digits(model['gflop_per_pair'])} GFLOP. (a), the matrix rate in GFLOP/s, {'; '.join(both)}.",
            table(["", "pairs/s", "GFLOP/s", "share of (a)", "batch", "peak memory, MiB"], rows),
            table(["ratio", "of pairs/s"], ratios),
            f"Largest difference from (c), over the largest value: {'; '.join(off)}.",
            *told_profile(model),
        ]
    return "\n\n".join(parts)


def run_all():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=4.0, help="about so long a contender runs in a round")
    parser.add_argument("--quick", action="store_true", help="four samples, one round, no document: does all of it run?")
    parser.add_argument("--no-document", action="store_true", help="leave docs/performance.md as it is")
    parser.add_argument("--binary", help="a built bench binary `backbone`, instead of building it")
    args = parser.parse_args()
    binary = args.binary or build()[0]
    folder = target_folder() / "bench-engine"
    folder.mkdir(parents=True, exist_ok=True)
    python = os.environ.get("PYTORCH") or pytorch()
    library = fast_mkl(folder)
    if args.quick:
        args.rounds, args.no_document = 1, True
    few = {"batches": [4], "gemm_batches": [4], "unit": 4, "most": 4, "naive": 1} if args.quick else {}
    benches = [Bench(model | few, binary, python, library, folder) for model in MODELS]
    models = [measure(bench, args.rounds, args.seconds) for bench in benches]
    rows = [{row["id"]: row for row in model["rows"]} for model in models]
    result = {
        # This is the worse of the two models.
        "ratio_pytorch": min(model["ratios"]["b/c"]["median"] for model in models),
        "share_of_gemm": min(of["b"]["share_of_gemm"]["median"] for of in rows),
        "machine": machine(),
        "rounds": args.rounds,
        "models": models,
    }
    text = report(result)
    say("\n" + text + "\n")
    write_result(folder, result)
    if not args.no_document:
        write_into_document(SECTION, text)


if __name__ == "__main__":
    main(run_all)
