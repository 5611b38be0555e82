#!/usr/bin/env python3
"""Compares compositions of the demo on several devices: their weights with the first one's, and their speed.

    scripts/compare_devices.py OUT NAME ...       reads OUT/NAME/result.json, and OUT/doctor.json

Fails where a weight in f32 differs from the first one's by more than 1e-3; bf16 is told, not judged."""

import json
import pathlib
import sys

ALPHA_TOLERANCE = 1e-3
# The model is ViT-S/14 at 98 × 98 with ten prompt tokens.
WIDTH, DEPTH, TOKENS = 384, 12, 1 + 10 + 49


def forward_operations():
    """Of one image with one prompt: products by weights, and attention's two."""
    return DEPTH * (2 * TOKENS * 12 * WIDTH**2 + 4 * TOKENS**2 * WIDTH)


def matrix_rate(doctor, name):
    """The device's best, in the precision that the composition computed in."""
    bf16 = name.endswith("-bf16")
    if name == "cpu":
        rates = [rate for rate in doctor["rates"] if rate["precision"] == "f32"]
    else:
        device = next(d for d in doctor["cuda_devices"] if d["device"] == name.removesuffix("-bf16"))
        rates = [rate for rate in device["rates"] if rate["precision"] == ("bf16" if bf16 else "tf32")]
    return max(rate["gflop_per_s"] for rate in rates) * 1e9


def main():
    out, names = pathlib.Path(sys.argv[1]), sys.argv[2:]
    doctor = json.loads((out / "doctor.json").read_text())
    results = {name: json.loads((out / name / "result.json").read_text()) for name in names}
    first = [source["weight"] for source in results[names[0]]["source_weights"]]
    rows, failed = [], False
    for name, result in results.items():
        weights = [source["weight"] for source in result["source_weights"]]
        off = max(abs(a - b) for a, b in zip(weights, first, strict=True))
        pairs = result["diagnostics"]["num_samples"] * len(weights)
        row = {"name": name, "alpha_off": off}
        # One forward pass for the features; for the gradients one forward pass, and one back through the same products.
        for phase, passes in (("features", 1), ("gradients", 2)):
            rate = pairs / result["timings"][phase]
            row[phase] = rate
            row[f"{phase}_share"] = rate * passes * forward_operations() / matrix_rate(doctor, name)
        rows.append(row)
        failed |= off > ALPHA_TOLERANCE and not name.endswith("-bf16")
        print(
            f"{name:14} α off by {off:.1e}; images × prompts a second: {row['features']:8.0f} features "
            f"({row['features_share']:.0%} of the matrix rate), {row['gradients']:8.0f} gradients "
            f"({row['gradients_share']:.0%})"
        )
    (out / "devices.json").write_text(json.dumps(rows, indent=2) + "\n")
    if failed:
        sys.exit(f"error: weights differ from those of `{names[0]}` by more than {ALPHA_TOLERANCE}")
    print(f"wrote {out / 'devices.json'}")


if __name__ == "__main__":
    main()
