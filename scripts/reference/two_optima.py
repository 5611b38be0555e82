#!/usr/bin/env python3
"""Two sources whose H-score has two local maxima on the simplex: the worked example of docs/method.md.

    pip install numpy
    python scripts/reference/two_optima.py

Prints H along the segment α = (1-s, s) and writes tests/fixtures/two_optima.json: features [M][N][d], labels, ρ, and
the two local maxima. H is computed by its definition, from explicit covariance matrices; the maxima are found by
refining a grid, and checked against the fractions that this example comes out at.
"""
import json, pathlib
from fractions import Fraction
import numpy as np

RHO = 0.01
LABELS = np.array([0, 0, 0, 0, 1, 1, 1, 1])
# The class signal, and two noise patterns. Both have mean zero in each class, and they are orthogonal to each other.
signal = np.array([-1, -1, -1, -1, 1, 1, 1, 1])
noise = np.array([1, -1, 1, -1, 1, -1, 1, -1])
other = np.array([1, 1, -1, -1, 1, 1, -1, -1])
# The second source has the opposite signal, and the first one's noise, opposite and stronger. So a little of it cancels
# noise, and much of it cancels the signal.
FEATURES = np.array([4 * signal + 3 * noise + other, -6 * signal - 8 * noise], dtype=float)[:, :, None]


def h_score(alpha):
    """(1-ρ) tr(Σ_ρ⁻¹ B) of the mixed features; both covariances with 1/(N-1)."""
    mixed = np.tensordot(alpha, FEATURES, axes=1)
    classes = np.stack([mixed[LABELS == label].mean(axis=0) for label in LABELS])
    covariance = np.atleast_2d(np.cov(mixed, rowvar=False))
    between = np.atleast_2d(np.cov(classes, rowvar=False))
    d = len(covariance)
    shrunk = (1 - RHO) * covariance + RHO * np.trace(covariance) / d * np.eye(d)
    return (1 - RHO) * np.trace(np.linalg.solve(shrunk, between))


def along(s):
    return h_score(np.array([1 - s, s]))


def local_maxima(points):
    """Every s on the grid above its neighbours, refined by golden section."""
    grid = np.linspace(0, 1, points)
    values = np.array([along(s) for s in grid])
    padded = np.concatenate([[-np.inf], values, [-np.inf]])
    found = []
    for i in np.flatnonzero((values > padded[:-2]) & (values > padded[2:])):
        low, high = grid[max(i - 1, 0)], grid[min(i + 1, points - 1)]
        while high - low > 1e-9:
            step = (high - low) * (3 - 5**0.5) / 2
            if along(low + step) < along(high - step):
                low += step
            else:
                high -= step
        ends = [s for s in (0.0, 1.0) if abs(s - low) < 1e-8]
        found.append(ends[0] if ends else (low + high) / 2)
    return sorted(found, key=along, reverse=True)


best, worse = local_maxima(2001)
# With d = 1, shrinkage only adds the factor 1-ρ, and the rest is the share of variance between the classes: (4-10s)² /
# ((4-10s)² + (3-11s)² + (1-s)²).
exact = [(Fraction(9, 37), Fraction(29, 37)), (Fraction(1), Fraction(9, 25))]
for s, (where, share) in zip([best, worse], exact):
    # A maximum is flat, so its place is known only to half the digits of its value.
    assert abs(s - where) < 1e-6 and abs(along(s) - (1 - RHO) * share) < 1e-12

print("    s      H")
for s in np.linspace(0, 1, 11):
    print(f"{s:5.2f}  {along(s):.4f}")
maxima = []
for where, share in exact:
    s = float(where)
    maxima.append({"alpha": [round(1 - s, 10), round(s, 10)], "h_score": round((1 - RHO) * float(share), 10)})
    print(f"maximum at s = {where}: H = {maxima[-1]['h_score']:.10f}")

fixture = {
    "about": "docs/method.md, the worked example; made by scripts/reference/two_optima.py",
    "features": FEATURES.tolist(),
    "labels": LABELS.tolist(),
    "shrinkage": RHO,
    "maxima": maxima,
}
out = pathlib.Path(__file__).parents[2] / "tests/fixtures/two_optima.json"
out.write_text(json.dumps(fixture) + "\n")
