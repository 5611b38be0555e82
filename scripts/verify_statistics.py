#!/usr/bin/env python3
"""Recomputes the two terms of a result from its statistics, by code that shares nothing with promptweave.

    python3 scripts/verify_statistics.py demo/out/result.json demo/out/statistics.safetensors

At the result's weights α it computes, with Python's standard library alone,

* the H-score of the mixed features F = Σ αᵢ f_{Pᵢ}: (1-ρ) tr(Σ_ρ⁻¹ B), Σ_ρ = (1-ρ) Σ + ρ (tr Σ / d) I, where Σ is
  the covariance of F and B the one of its class means, both over N-1;
* the gradient alignment L_align = (1/M) Σᵢ Σ_p (vᵢ[p] - v̄[p])², from the Gram matrix Γ of the gradients' packed
  second moments S,

and compares them with `objective` in the result. Exits with 1 where they differ by more than 1e-6 relative.
"""

import argparse
import json
import math
import struct
import sys
from array import array
from itertools import combinations_with_replacement
from operator import mul

TOLERANCE = 1e-6


def dot(a, b):
    return sum(map(mul, a, b))


def read_tensors(path):
    """(name → (shape, flat array), what the job's file says about itself)."""
    codes = {"F32": "f", "F64": "d", "I64": "q"}
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header, data = json.loads(file.read(length)), file.read()
    metadata = header.pop("__metadata__", {})
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        values = array(codes[entry["dtype"]], data[begin:end])
        if sys.byteorder == "big":
            values.byteswap()
        tensors[name] = entry["shape"], values
    return tensors, json.loads(metadata.get("promptweave", "{}"))


# ---- H ------------------------------------------------------------------------------------------------


def mixed_features(features, shape, alpha):
    """F by columns, centred: d lists of N values."""
    sources, samples, width = shape
    columns = []
    for p in range(width):
        column = [0.0] * samples
        for i in range(sources):
            values = features[i * samples * width + p : (i + 1) * samples * width : width]
            column = [sum_ + alpha[i] * value for sum_, value in zip(column, values)]
        mean = math.fsum(column) / samples
        columns.append([value - mean for value in column])
    return columns


def cholesky(matrix):
    """Lower triangular L with L Lᵀ = matrix, as rows of growing length."""
    rows = []
    for i, values in enumerate(matrix):
        row = []
        for j in range(i):
            row.append((values[j] - dot(row, rows[j])) / rows[j][j])
        row.append(math.sqrt(values[i] - dot(row, row)))
        rows.append(row)
    return rows


def h_score(columns, labels, rho):
    samples, width = len(labels), len(columns)
    # Σ's lower triangle is all that Cholesky reads.
    covariance = [[dot(columns[i], columns[j]) / (samples - 1) for j in range(i + 1)] for i in range(width)]
    trace = sum(covariance[i][i] for i in range(width))
    for i, row in enumerate(covariance):
        row[:] = [(1 - rho) * value for value in row]
        row[i] += rho * trace / width
    lower = cholesky(covariance)

    h = 0.0
    for label in sorted(set(labels)):
        members = [n for n, other in enumerate(labels) if other == label]
        mean = [math.fsum(column[n] for n in members) / len(members) for column in columns]
        # L y = mean, so that yᵀ y = meanᵀ Σ_ρ⁻¹ mean.
        y = []
        for i, row in enumerate(lower):
            y.append((mean[i] - dot(row, y)) / row[i])
        h += len(members) / (samples - 1) * dot(y, y)
    return (1 - rho) * h


# ---- L_align ------------------------------------------------------------------------------------------


def gradient_alignment(gram, alpha):
    """vᵢ = S_ii - 2 (Sα)ᵢ + αᵀSα at every coordinate, so vᵢ - v̄ = uᵢ - Σ_k α_k u_k with uᵢ = S_ii - 2 (Sα)ᵢ is
    linear in the rows of S. Γ holds the products of those rows, packed (0,0), (0,1) … (0,M-1), (1,1) …; row (i, k)
    stands for S_ik and for S_ki."""
    sources = len(alpha)
    rows = {}
    for t, (i, k) in enumerate(combinations_with_replacement(range(sources), 2)):
        rows[i, k] = rows[k, i] = t
    count = sources * (sources + 1) // 2

    u = []
    for i in range(sources):
        coefficients = [0.0] * count
        coefficients[rows[i, i]] = 1.0
        for k in range(sources):
            coefficients[rows[i, k]] -= 2 * alpha[k]
        u.append(coefficients)
    mean = [dot(alpha, column) for column in zip(*u)]

    total = 0.0
    for coefficients in u:
        r = [a - b for a, b in zip(coefficients, mean)]
        total += dot(r, [dot(gram[t * count : (t + 1) * count], r) for t in range(count)])
    return total / sources


# -------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", help="result.json")
    parser.add_argument("statistics", help="statistics.safetensors")
    arguments = parser.parse_args()

    with open(arguments.result) as file:
        result = json.load(file)
    alpha = [source["weight"] for source in result["source_weights"]]
    tensors, metadata = read_tensors(arguments.statistics)
    rho = metadata["objective"]["h_score"]["shrinkage"]
    shape, features = tensors["features"]
    labels = list(tensors["labels"][1])
    gram_shape, gram = tensors["gradient_gram"]
    rows = len(alpha) * (len(alpha) + 1) // 2
    if shape[:2] != [len(alpha), len(labels)] or gram_shape != [rows, rows]:
        sys.exit(f"error: features {shape}, {len(labels)} labels, gradient_gram {gram_shape}: not of {len(alpha)} sources")

    columns = mixed_features(features, shape, alpha)
    recomputed = {
        "h_score": h_score(columns, labels, rho),
        "gradient_alignment": gradient_alignment(gram, alpha),
    }
    agree = True
    for name, value in recomputed.items():
        reported = result["objective"][name]
        difference = abs(value - reported) / max(abs(reported), 1e-300)
        agree &= difference <= TOLERANCE
        verdict = "equal" if difference <= TOLERANCE else "DIFFERENT"
        print(f"{name:19s} reported {reported:.12g}  recomputed {value:.12g}  relative difference {difference:.1e}  {verdict}")
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
