#!/usr/bin/env python3
"""Reference numbers for the shrinkage coefficients and the transferability scores.

    pip install numpy scipy scikit-learn
    python scripts/reference/scores.py

Writes tests/fixtures/scores/, inputs included, so that a test needs the file and nothing else:
  shrinkage.json  `samples` [N, d] with `ledoit_wolf` and `oas`, by sklearn.covariance (samples centred,
                  S with 1/N).
  scores.json     `features` [N, d], `labels` [N], `probabilities` [N, C_s] (one case N > d, one N < d), and
    logme        as LogME.py of github.com/thuml/LogME computes it: the fixed-point version of
                  arXiv 2110.10545, at most 11 steps, its -(D-k)/2 ln alpha for D > k = min(N, D) left out;
    leep          as LEEP.py of the same repository (Nguyen et al. 2020);
    nce           as tllib/ranking/nce.py of github.com/thuml/Transfer-Learning-Library (Tran et al. 2019), z
                  the most probable source class;
    h_score, regularized_h_score   as tllib/ranking/hscore.py there: np.cov (1/(N-1)) and pinv. The second takes
                  sklearn's Ledoit-Wolf covariance, which has 1/N, so that it is N/(N-1) times
                  the score with 1/(N-1) throughout; the first is null where N <= d + 1, where it
                  is K-1 for any features;
    ledoit_wolf   the shrinkage coefficient of those features;
    sketch, otce  -H(Y_t|Y_s) and the mean transport cost (Tan et al. 2021) between a source's `features`
                  and `labels` and as many samples of the target, the first ones: with equally many
                  samples and uniform marginals exact transport is an assignment, here by
                  scipy.optimize.linear_sum_assignment.

The scores are written anew from those programs' formulas: none is a package that can be installed.
Inputs have four decimals, so that their text is their exact value.
"""
import json, pathlib
import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist
from sklearn.covariance import LedoitWolf, ledoit_wolf, oas

OUT = pathlib.Path(__file__).parents[2] / "tests/fixtures/scores"


def logme(f, y):
    n, d = f.shape
    u, s, _ = np.linalg.svd(f, full_matrices=False)
    sigma = s**2
    evidences = []
    for label in range(y.max() + 1):
        target = (y == label).astype(float)
        x2 = (u.T @ target) ** 2
        outside = (target**2).sum() - x2.sum()
        alpha = beta = 1.0
        for _ in range(11):
            t = alpha / beta
            gamma = (sigma / (sigma + t)).sum()
            m2 = (sigma * x2 / (t + sigma) ** 2).sum()
            r2 = (x2 / (1 + sigma / t) ** 2).sum() + outside
            alpha, beta = gamma / (m2 + 1e-5), (n - gamma) / (r2 + 1e-5)
            if abs(alpha / beta - t) / t <= 1e-3:
                break
        evidence = d / 2 * np.log(alpha) + n / 2 * np.log(beta) - 0.5 * np.log(alpha + beta * sigma).sum()
        evidence += -beta / 2 * r2 - alpha / 2 * m2 - n / 2 * np.log(2 * np.pi)
        evidences.append(evidence / n)
    return np.mean(evidences)


def one_hot(z, classes):
    return np.eye(classes)[z]


def leep(theta, y):
    joint = one_hot(y, y.max() + 1).T @ theta / len(y)
    conditional = joint / joint.sum(0)
    return np.log((theta @ conditional.T)[np.arange(len(y)), y]).mean()


def negative_conditional_entropy(z, y):
    """-H(Y|Z) of two label sequences; 0 log 0 = 0."""
    joint = one_hot(y, y.max() + 1).T @ one_hot(z, z.max() + 1) / len(y)
    shown = joint > 0
    return (joint[shown] * np.log((joint / np.maximum(joint.sum(0), 1e-300))[shown])).sum()


def between(f, y):
    means = np.stack([f[y == label].mean(0) for label in range(y.max() + 1)])
    return np.cov(means[y], rowvar=False)


def h_score(f, y):
    return np.trace(np.linalg.pinv(np.cov(f, rowvar=False), rcond=1e-15) @ between(f, y))


def regularized_h_score(f, y):
    f = f - f.mean(0)
    fitted = LedoitWolf().fit(f)
    return np.trace(np.linalg.pinv(fitted.covariance_, rcond=1e-15) @ between(f, y)) * (1 - fitted.shrinkage_)


def otce(source, source_labels, target, target_labels):
    cost = cdist(source, target, "sqeuclidean")
    rows, columns = linear_sum_assignment(cost)
    score = negative_conditional_entropy(source_labels[rows], target_labels[columns])
    return {"score": score, "transport_cost": cost[rows, columns].mean()}


def write(name, content):
    plain = json.dumps(content, default=lambda value: value.tolist(), separators=(",", ":"))
    (OUT / name).write_text(plain.replace('},{', '},\n{') + "\n")


def shrinkage_case(rng, n, d):
    # The features are correlated and off centre.
    x = (rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + rng.normal(size=d)).round(4)
    return {"samples": x, "ledoit_wolf": ledoit_wolf(x)[1], "oas": oas(x)[1]}


def score_case(rng, n, d, classes=3, source_classes=4):
    y = rng.permutation(np.arange(n) % classes)
    f = (rng.normal(size=(n, d)) + rng.normal(size=(classes, d))[y]).round(4)
    logits = rng.normal(size=(n, source_classes)) + rng.normal(size=(classes, source_classes))[y]
    theta = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    theta = np.concatenate([theta[:, 1:].round(4), (1 - theta[:, 1:].round(4).sum(1, keepdims=True)).round(4)], 1)
    size = n // 2
    z = rng.permutation(np.arange(size) % 2)
    sketch = (rng.normal(size=(size, d)) + rng.normal(size=(2, d))[z]).round(4)
    return {
        "features": f,
        "labels": y,
        "probabilities": theta,
        "logme": logme(f, y),
        "leep": leep(theta, y),
        "nce": negative_conditional_entropy(theta.argmax(1), y),
        "h_score": h_score(f, y) if n > d + 1 else None,
        "ledoit_wolf": LedoitWolf().fit(f).shrinkage_,
        "regularized_h_score": regularized_h_score(f, y),
        "sketch": {"features": sketch, "labels": z},
        "otce": otce(sketch, z, f[:size], y[:size]),
    }


OUT.mkdir(parents=True, exist_ok=True)
rng = np.random.default_rng(20261123)
write("shrinkage.json", [shrinkage_case(rng, 12, 5), shrinkage_case(rng, 40, 6)])
write("scores.json", [score_case(rng, 24, 5), score_case(rng, 10, 14)])
