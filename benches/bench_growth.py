#!/usr/bin/env python3
"""Time and memory of whole compositions as sources (M) and samples (N) grow; `make bench-growth` runs this.

`promptweave compose` from image files to the composed prompt, on a tiny backbone, each point a process of its own.
Python's standard library is enough.
"""

import argparse
import json
import math
import pathlib

from harness import (
    BenchError,
    ROOT,
    build,
    digits,
    json_line,
    machine,
    machine_line,
    main,
    run,
    say,
    table,
    target_folder,
    write_into_document,
    write_result,
)

SECTION = "bench-growth"
PICTURE = ROOT / "docs" / "growth.svg"
SOURCES = [1, 2, 4, 8, 16]
SAMPLES = [100, 1_000, 10_000]
TOKENS, EMBED_DIM = 10, 64
# Okabe and Ito's, as in src/plot.rs.
COLORS = ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7"]


# ---- Measuring -------------------------------------------------------------------------------------------


def prepare(binary, folder):
    backbone, inputs = folder / "backbone", folder / "inputs"
    json_line([binary, "backbone", "--preset", "tiny", "--out", backbone])
    command = [binary, "inputs", "--backbone", backbone, "--out", inputs, "--samples", max(SAMPLES)]
    json_line([*command, "--prompts", max(SOURCES), "--tokens", TOKENS])
    return backbone, inputs


def compose(promptweave, folder, backbone, inputs, m, n):
    """Seconds by phase and peak memory of one composition."""
    out = folder / "out"
    command = [promptweave, "compose", "--backbone", backbone, "--target", inputs / "dataset", "--max-samples", n]
    command += ["--device", "cpu", "--out", out]
    for i in range(m):
        command += ["--source", f"{i:02}={inputs / 'prompts' / f'{i:02}.safetensors'}"]
    _, memory = run(command)
    result = json.loads((out / "result.json").read_text())
    if result["diagnostics"]["num_samples"] != n or len(result["source_weights"]) != m:
        raise BenchError(f"asked for M = {m} and N = {n}, got another composition")
    seconds = result["timings"]
    return {
        "sources": m,
        "samples": n,
        "seconds": seconds,
        "backbone_seconds": seconds["features"] + seconds["gradients"],
        "solve_seconds": seconds["solve"],
        "memory_mib": memory,
        "features_mib": m * n * EMBED_DIM * 4 / 2**20,
    }


def exponent(points):
    """Slope of log(backbone seconds) over log(N·M), by least squares: 1 is linear."""
    xy = [(math.log(p["sources"] * p["samples"]), math.log(p["backbone_seconds"])) for p in points]
    x, y = (sum(column) / len(xy) for column in zip(*xy))
    return sum((a - x) * (b - y) for a, b in xy) / sum((a - x) ** 2 for a, _ in xy)


# ---- Telling ---------------------------------------------------------------------------------------------


def by_size(points, write):
    """A table with a row a number of sources and a column a number of samples."""
    cells = {(p["sources"], p["samples"]): write(p) for p in points}
    rows = [[m, *(cells[m, n] for n in SAMPLES)] for m in SOURCES]
    return table(["M", *(f"N = {n:,}" for n in SAMPLES)], rows)


def report(result):
    points = result["points"]
    largest = [p for p in points if p["samples"] == max(SAMPLES)]
    few, many = (at(points, max(SOURCES), n) for n in (min(SAMPLES), max(SAMPLES)))
    more = many["memory_mib"] - few["memory_mib"]
    copies = more / (many["features_mib"] - few["features_mib"])
    return "\n\n".join(
        [
            f"Measured on {machine_line(result['machine'])} d = {EMBED_DIM}, two blocks, 32 × 32 pixels, m = {TOKENS} "
            "tokens; each point one process, once.",
            "![seconds and memory against samples and sources](growth.svg)",
            f"Seconds of features and gradients, decoding included; from N·M = 1,000 on they grow as "
            f"(N·M)^{result['exponent']:.2f}:",
            by_size(points, lambda p: digits(p["backbone_seconds"])),
            "Seconds of the solve, with its path and its leave-one-fold-out errors. Evaluating the objective does not "
            "depend on N; what grows with N are the sums over all features that the solve begins with:",
            by_size(points, lambda p: digits(p["solve_seconds"])),
            "Peak memory of the process in MiB, and in brackets what the features [M, N, d] in f32 take of it, which are "
            "the answer's own and stored with it:",
            by_size(points, lambda p: f"{p['memory_mib']:,.0f} ({digits(p['features_mib'])})"),
            f"At M = {max(SOURCES)}, {min(SAMPLES):,} → {max(SAMPLES):,} samples take {digits(more)} MiB more, "
            f"{digits(copies)} times what the features take alone: the features, their bytes in the answer, and those "
            "once more while they are written; beside them one source's in f64 while its head is fitted, and the list of "
            "the images. Nothing else grows with N: pixels wait on the disk, and H's sums are added up in blocks.",
            f"A sample and source cost {digits(1e6 * least(largest))} to {digits(1e6 * least(largest, max))} µs at "
            f"N = {max(SAMPLES):,}.",
        ]
    )


def at(points, m, n):
    return next(p for p in points if (p["sources"], p["samples"]) == (m, n))


def least(points, of=min):
    return of(p["backbone_seconds"] / (p["sources"] * p["samples"]) for p in points)


class Panel:
    """One log-log chart, as SVG."""

    WIDTH, HEIGHT = 400, 300

    def __init__(self, left, title, x_title, y_title, xs, ys):
        self.left, self.top = left, 44
        self.x_range = (math.log10(min(xs)) - 0.05, math.log10(max(xs)) + 0.05)
        low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))
        self.y_range = (low, max(high, low + 1))
        self.parts = []
        self.text(left + self.WIDTH / 2, 24, title, 15)
        self.text(left + self.WIDTH / 2, self.top + self.HEIGHT + 38, x_title)
        x, y = left - 48, self.top + self.HEIGHT / 2
        self.parts.append(
            f'<text x="{x}" y="{y}" text-anchor="middle" font-size="12" transform="rotate(-90 {x} {y})">{y_title}</text>'
        )
        for power in range(math.ceil(self.x_range[0]), math.floor(self.x_range[1]) + 1):
            x = self.x(10**power)
            self.line([(x, self.top), (x, self.top + self.HEIGHT)], "#e1e1e1", 1)
            self.text(x, self.top + self.HEIGHT + 17, f"{10**power:,}")
        for power in range(self.y_range[0], self.y_range[1] + 1):
            y = self.y(10**power)
            self.line([(left, y), (left + self.WIDTH, y)], "#e1e1e1", 1)
            self.text(left - 6, y + 4, f"{10**power:,}" if power >= 0 else f"{10.0**power:g}", anchor="end")

    def x(self, value):
        low, high = self.x_range
        return self.left + self.WIDTH * (math.log10(value) - low) / (high - low)

    def y(self, value):
        low, high = self.y_range
        return self.top + self.HEIGHT * (1 - (math.log10(value) - low) / (high - low))

    def text(self, x, y, text, size=12, anchor="middle", color="#282828"):
        self.parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}" fill="{color}">{text}</text>'
        )

    def line(self, points, color, width=2, dash=""):
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(
            f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="{width}" stroke-dasharray="{dash}"/>'
        )

    def series(self, points, color, label, dash=""):
        at = [(self.x(x), self.y(y)) for x, y in points]
        self.line(at, color, dash=dash)
        self.parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{color}"/>' for x, y in at]
        if label:
            self.text(at[-1][0] + 8, at[-1][1] + 4, label, anchor="start", color=color)


def picture(points):
    """Left, seconds over N·M (lines) and the solve's (dashed); right, memory over N; a colour a number of sources."""
    seconds = [p[key] for p in points for key in ("backbone_seconds", "solve_seconds")]
    pairs = [p["sources"] * p["samples"] for p in points]
    left = Panel(70, "seconds: passes (lines), solve (dashed)", "N · M", "seconds", pairs, seconds)
    right = Panel(620, "peak memory", "N", "MiB", SAMPLES, [p["memory_mib"] for p in points])
    for color, m in zip(COLORS, SOURCES):
        own = [p for p in points if p["sources"] == m]
        for key, dash in (("backbone_seconds", ""), ("solve_seconds", "5 4")):
            left.series([(m * p["samples"], p[key]) for p in own], color, f"M = {m}" if dash == "" else "", dash)
        right.series([(p["samples"], p["memory_mib"]) for p in own], color, f"M = {m}")
    svg = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1100 400" font-family="sans-serif">'
    return "\n".join([svg, '<rect width="1100" height="400" fill="white"/>', *left.parts, *right.parts, "</svg>", ""])


def run_all():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--no-document", action="store_true", help="leave docs as they are")
    parser.add_argument("--binaries", nargs=2, help="built `backbone` (the bench) and `promptweave`, instead of building")
    args = parser.parse_args()
    binary, promptweave = args.binaries or build()
    folder = target_folder() / "bench-growth"
    backbone, inputs = prepare(binary, folder)
    points = []
    for n in SAMPLES:
        for m in SOURCES:
            point = compose(promptweave, folder, backbone, inputs, m, n)
            points.append(point)
            seconds = "  ".join(f"{name} {digits(value)}" for name, value in point["seconds"].items())
            say(f"M = {m:2}  N = {n:6,}  {point['memory_mib']:6.0f} MiB  seconds: {seconds}")
    result = {
        "machine": machine(),
        "exponent": exponent([p for p in points if p["sources"] * p["samples"] >= 1_000]),
        "points": points,
    }
    text = report(result)
    say("\n" + text + "\n")
    write_result(folder, result)
    pathlib.Path(folder / "growth.svg").write_text(picture(points))
    if not args.no_document:
        PICTURE.write_text(picture(points))
        write_into_document(SECTION, text)


if __name__ == "__main__":
    main(run_all)
