#!/usr/bin/env python3
"""The demo's composition by every path and precision, and what one more source costs; `make bench-demo` runs this.

`promptweave compose` on the demo's backbone, prompts and images, each point a process of its own. The weights of every
path are compared with those of the definition in f64. Python's standard library is enough.
"""

import argparse
import json
import shutil

from harness import (
    BenchError,
    ROOT,
    build,
    digits,
    machine,
    machine_line,
    main,
    run,
    say,
    spread,
    table,
    target_folder,
    with_spread,
    write_into_document,
    write_result,
)

SECTION = "bench-demo"
BACKBONE = ROOT / ".assets" / "vit_s14_focus"
# The first point runs once; the others are compared with it.
PATHS = {
    "reference, f64": ["--reference-path", "--precision", "f64"],
    "reference, f32": ["--reference-path"],
    "fast, f64": ["--precision", "f64"],
    "fast, f32": [],
    "fast, f32, one thread": ["--threads", "1"],
    "fast, bf16": ["--precision", "bf16"],
}
# Largest allowed difference in α from the first point, by precision. That of bf16 is reported, not judged.
ALPHA_TOLERANCES = {"f64": 1e-6, "f32": 1e-4}


def compose(promptweave, folder, sources, options):
    """The result of one composition, and the most memory it held."""
    out = folder / "out"
    command = [promptweave, "compose", "--backbone", BACKBONE, "--target", ROOT / "demo" / "target", "--device", "cpu"]
    # The weights are those of a mixture: if one source had all the weight, the paths would not differ.
    command += ["--out", out, "--method", "hgprompt", *options]
    for source in sources:
        command += ["--source", f"{source.stem}={source}"]
    _, memory = run(command)
    return json.loads((out / "result.json").read_text()) | {"memory_mib": memory}


def weights(result):
    return {source["prompt"]: source["weight"] for source in result["source_weights"]}


def backbone_seconds(result):
    return result["timings"]["features"] + result["timings"]["gradients"]


# ---- Measuring -------------------------------------------------------------------------------------------


def measure_paths(promptweave, folder, sources, rounds):
    results = {path: [] for path in PATHS}
    for round_ in range(rounds):
        for path, options in list(PATHS.items())[1 if round_ else 0 :]:
            results[path].append(compose(promptweave, folder, sources, options))
            say(f"  {path:22} {backbone_seconds(results[path][-1]):8.2f} s")
    reference = weights(results["reference, f64"][0])
    rows = []
    for path, of_path in results.items():
        alpha = weights(of_path[0])
        off = max(abs(alpha[name] - reference[name]) for name in reference)
        tolerance = next((most for name, most in ALPHA_TOLERANCES.items() if name in path), None)
        # This comparison also refuses NaN.
        if tolerance is not None and not off <= tolerance:
            raise BenchError(f"α of `{path}` differs by {off:.1e}, more than {tolerance:.0e}")
        rows.append(
            {
                "path": path,
                "largest_difference_in_alpha": off,
                "backbone_seconds": spread([backbone_seconds(of) for of in of_path]),
                "solve_seconds": spread([of["timings"]["solve"] for of in of_path]),
                "memory_mib": max(of["memory_mib"] for of in of_path),
            }
        )
    return rows


def measure_cache(promptweave, folder, sources, rounds):
    """Seconds at the backbone: five sources, then one more beside them, then other options; and that one alone."""
    *others, new = sources
    rows = {"others": [], "new": [], "again": [], "alone": []}
    for _ in range(rounds):
        cache = folder / "cache"
        shutil.rmtree(cache, ignore_errors=True)
        cached = ["--cache", cache]
        asked = {
            "others": (others, cached),
            "new": (sources, cached),
            "again": (sources, [*cached, "--alignment-variant", "mixture_uniform", "--trade-off", "knee"]),
            "alone": ([new], []),
        }
        for name, (of, options) in asked.items():
            rows[name].append(backbone_seconds(compose(promptweave, folder, of, options)))
            say(f"  {name:22} {rows[name][-1]:8.2f} s")
    ratio = [x / y for x, y in zip(rows["new"], rows["alone"])]
    return {name: spread(of) for name, of in rows.items()} | {"new/alone": spread(ratio)}


# ---- Telling ---------------------------------------------------------------------------------------------


def report(result):
    paths = [
        [
            row["path"],
            f"{row['largest_difference_in_alpha']:.1e}" if i else "",
            with_spread(row["backbone_seconds"]),
            with_spread(row["solve_seconds"]),
            f"{row['memory_mib']:,.0f}",
        ]
        for i, row in enumerate(result["paths"])
    ]
    cache, number = result["cache"], result["sources"]
    steps = {
        "others": f"{number - 1} sources, nothing kept yet",
        "new": "one more source beside them",
        "again": f"all {number} again, with another variant and trade-off",
        "alone": "that one source alone, nothing kept",
    }
    return "\n\n".join(
        [
            f"Measured on {machine_line(result['machine'])} {number} sources, the demo's target images, "
            f"{result['rounds']} interleaved rounds; medians, in brackets the least and the most.",
            table(["path", "difference in α", "backbone, s", "solve, s", "peak memory, MiB"], paths),
            "The difference is the largest of any source's weight from that of the definition in f64.",
            table(["with `--cache`", "backbone, s"], [[text, with_spread(cache[name])] for name, text in steps.items()]),
            f"One new source costs {with_spread(cache['new/alone'])} times what it costs alone.",
        ]
    )


def run_all():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-document", action="store_true", help="leave docs/performance.md as it is")
    parser.add_argument("--promptweave", help="a built binary, instead of building it")
    args = parser.parse_args()
    promptweave = args.promptweave or build()[1]
    folder = target_folder() / SECTION
    folder.mkdir(parents=True, exist_ok=True)
    sources = sorted((ROOT / "demo" / "prompts").glob("*.safetensors"))
    result = {
        "machine": machine(),
        "rounds": args.rounds,
        "sources": len(sources),
        "paths": measure_paths(promptweave, folder, sources, args.rounds),
        "cache": measure_cache(promptweave, folder, sources, args.rounds),
    }
    text = report(result)
    say("\n" + text + "\n")
    write_result(folder, result)
    if not args.no_document:
        write_into_document(SECTION, text)


if __name__ == "__main__":
    main(run_all)
