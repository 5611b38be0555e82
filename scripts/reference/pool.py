#!/usr/bin/env python3
"""The weights of a log-linear pool by scipy, independently of promptweave's solver.

    pip install numpy scipy
    python scripts/reference/pool.py

Writes tests/fixtures/pool.json: log-probabilities [M][N][K] of sources that know more or less about the labels, and the
optimum w of

    1/N Σ_n -log p_w(y_n|x_n) + β/N Σ_i (w_i log(w_i/u) - w_i + u),   p_w ∝ Π_i p_i^w_i,   u = s_0/M

for several β. s_0 is the sharpness of least loss among uniform pools.
"""
import json, pathlib
import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import logsumexp, xlogy

M, N, K = 5, 60, 4
rng = np.random.default_rng(7)
labels = rng.integers(0, K, N)
one_hot = np.eye(K)[labels]
strengths = np.array([2.0, 1.2, 0.4, -0.8, 1.2])
logits = strengths[:, None, None] * one_hot + rng.normal(size=(M, N, K)) * 1.2
logits -= logsumexp(logits, axis=2, keepdims=True)
# As f32, since that is what the solver is given.
log_p = np.log(0.99 * np.exp(logits) + 0.01 / K).astype(np.float32).astype(np.float64)


def loss(w, log_p):
    z = np.tensordot(w, log_p, axes=1)
    return np.mean(logsumexp(z, axis=1) - z[np.arange(N), labels])


def gradient(w, log_p):
    z = np.tensordot(w, log_p, axes=1)
    q = np.exp(z - logsumexp(z, axis=1, keepdims=True))
    return ((q[None] * log_p).sum(2) - log_p[:, np.arange(N), labels]).mean(1)


mean = log_p.mean(0, keepdims=True)
s0 = minimize_scalar(lambda s: loss(np.array([s]), mean), bounds=(0, 50), method="bounded", options={"xatol": 1e-12}).x
u = s0 / M
cases = []
for beta in (0.0, 0.5, 10.0, 1000.0):
    value = lambda w: loss(w, log_p) + beta / N * np.sum(xlogy(w, w / u) - w + u)
    slope = lambda w: gradient(w, log_p) + (beta / N * np.log(np.maximum(w, 1e-300) / u) if beta else 0)
    lowest = 0.0 if beta == 0 else 1e-12
    best = None
    for start in [np.full(M, u), np.full(M, 0.5), rng.uniform(0.05, 1, M)]:
        found = minimize(value, start, jac=slope, method="L-BFGS-B", bounds=[(lowest, None)] * M,
                         options={"ftol": 1e-16, "gtol": 1e-12, "maxiter": 10000, "maxls": 100})
        if best is None or found.fun < best.fun:
            best = found
    cases.append({"beta": beta, "weights": best.x.tolist(), "value": float(best.fun)})
    print(beta, best.x, best.fun, np.abs(slope(best.x)[best.x > 1e-9]).max())
path = pathlib.Path(__file__).parents[2] / "tests/fixtures/pool.json"
path.write_text(json.dumps({"log_p": log_p.astype(np.float32).tolist(), "labels": labels.tolist(), "sharpness": float(s0),
                            "cases": cases}) + "\n")
