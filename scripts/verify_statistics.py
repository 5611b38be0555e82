#!/usr/bin/env python3
"""Recomputes a result's two terms and its pool from its statistics, by code that shares nothing with promptweave.

    python3 scripts/verify_statistics.py demo/out/result.json demo/out/statistics.safetensors

At the result's weights α it computes, with Python's standard library alone, what docs/method.md, 1.1 and 1.2, define,

* the H-score of the mixed features F = Σ αᵢ f_{Pᵢ}, in the mode and with the standardisation that the statistics name
  and the ρ that the result says was used;
* the gradient alignment L_align = (1/M) Σᵢ Σ_p (vᵢ[p] - v̄[p])², in the variant that the statistics name; it is left out
  where the method takes no gradients,

and compares them with `objective` in the result. From the predictions that the statistics keep it computes the weights
of the pool (docs/method.md, 1.11), and compares them with `pool`. Exits with 1 where something differs by more than 1e-6:
relative to its size, or absolute for a weight.
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


def centred(values):
    mean = math.fsum(values) / len(values)
    return [value - mean for value in values]


def mixed_features(features, shape, alpha, standardise):
    """F by columns, centred: d lists of N values. With `per_source` every coordinate of every source has variance 1."""
    sources, samples, width = shape
    columns = []
    for p in range(width):
        column = [0.0] * samples
        for i in range(sources):
            values = centred(features[i * samples * width + p : (i + 1) * samples * width : width])
            deviation = math.sqrt(dot(values, values) / (samples - 1)) if standardise == "per_source" else 1.0
            scale = alpha[i] / (deviation or 1.0)
            column = [sum_ + scale * value for sum_, value in zip(column, values)]
        columns.append(column)
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


def class_means(columns, labels):
    """(w_c, u_c [d]) of every class."""
    for label in sorted(set(labels)):
        members = [n for n, other in enumerate(labels) if other == label]
        mean = [math.fsum(column[n] for n in members) / len(members) for column in columns]
        yield len(members) / (len(labels) - 1), mean


def trace_ratio(columns, labels):
    """tr B / tr Σ"""
    between = sum(weight * dot(mean, mean) for weight, mean in class_means(columns, labels))
    return between / (sum(dot(column, column) for column in columns) / (len(labels) - 1))


def regression(columns, labels, rho, cross_validated):
    """`standard`: H = (1-ρ) tr(Σ_ρ⁻¹ B), Σ_ρ = (1-ρ) Σ + ρ (tr Σ / d) I; Σ's lower triangle is all that Cholesky reads.
    `cross_validated`: K - 1 - (K - 1 - H - δ tr(Σ_ρ⁻¹ (1-ρ) B Σ_ρ⁻¹)) / (1 - (1 + d - δ tr Σ_ρ⁻¹)/N)², δ = ρ tr Σ / d."""
    samples, width = len(labels), len(columns)
    covariance = [[dot(columns[i], columns[j]) / (samples - 1) for j in range(i + 1)] for i in range(width)]
    trace = sum(covariance[i][i] for i in range(width))
    for i, row in enumerate(covariance):
        row[:] = [(1 - rho) * value for value in row]
        row[i] += rho * trace / width
    lower = cholesky(covariance)
    upper = [[lower[j][i] for j in range(i, width)] for i in range(width)]

    def forward(right):
        """L y = right, so that yᵀ y = rightᵀ Σ_ρ⁻¹ right."""
        y = []
        for row, value in zip(lower, right):
            y.append((value - dot(row, y)) / row[-1])
        return y

    def backward(y):
        """Lᵀ v = y"""
        v = []
        for row, value in zip(reversed(upper), reversed(y)):
            v.insert(0, (value - dot(row[1:], v)) / row[0])
        return v

    h, solved, classes = 0.0, 0.0, 0
    for weight, mean in class_means(columns, labels):
        y = forward(mean)
        h += (1 - rho) * weight * dot(y, y)
        if cross_validated:
            v = backward(y)
            solved += (1 - rho) * weight * dot(v, v)
        classes += 1
    if not cross_validated:
        return h
    delta = rho * trace / width
    of_unit = (forward([float(i == j) for j in range(width)]) for i in range(width))
    freedom = width - delta * sum(dot(y, y) for y in of_unit)
    missed = classes - 1 - h - delta * solved
    return classes - 1 - missed / (1 - (1 + freedom) / samples) ** 2


# ---- L_align ------------------------------------------------------------------------------------------


def about_the_mixed(alpha, weights):
    """Variants R1 (mixture_weighted) and R2 (mixture_uniform). vᵢ = S_ii - 2 (Sα)ᵢ + αᵀSα at every coordinate, so with v̄ = Σ_k weights_k v_k the
    difference vᵢ - v̄ = uᵢ - Σ_k weights_k u_k, uᵢ = S_ii - 2 (Sα)ᵢ, is linear in the rows of S. They are packed
    (0,0), (0,1) … (0,M-1), (1,1) …; row (i, k) stands for S_ik and for S_ki. Yields each difference's coefficients."""
    sources = len(alpha)
    rows = {}
    for t, (i, k) in enumerate(combinations_with_replacement(range(sources), 2)):
        rows[i, k] = rows[k, i] = t

    u = []
    for i in range(sources):
        coefficients = [0.0] * (sources * (sources + 1) // 2)
        coefficients[rows[i, i]] = 1.0
        for k in range(sources):
            coefficients[rows[i, k]] -= 2 * alpha[k]
        u.append(coefficients)
    mean = [dot(weights, column) for column in zip(*u)]
    return [[a - b for a, b in zip(coefficients, mean)] for coefficients in u]


def gradient_alignment(tensors, alpha, variant):
    """(1/M) Σᵢ rᵢᵀ G rᵢ, where rᵢ holds the coefficients of vᵢ - v̄ and G the inner products of what they belong to:
    of the rows of S (Γ), or, in R3, of the vᵢ themselves."""
    sources = len(alpha)
    if variant == "fishr":
        name = "gradient_variance_gram"
        differences = [[(i == k) - alpha[k] for k in range(sources)] for i in range(sources)]
    else:
        name = "gradient_gram"
        differences = about_the_mixed(alpha, alpha if variant == "mixture_weighted" else [1 / sources] * sources)
    shape, gram = tensors[name]
    count = len(differences[0])
    if shape != [count, count]:
        sys.exit(f"error: `{name}` has shape {shape}, which is not that of {sources} sources")
    return sum(dot(r, [dot(gram[t * count : (t + 1) * count], r) for t in range(count)]) for r in differences) / sources


# ---- The pool -----------------------------------------------------------------------------------------


def solve(matrix, right):
    """x with matrix x = right, for a positive definite matrix."""
    lower = cholesky(matrix)
    y = []
    for row, value in zip(lower, right):
        y.append((value - dot(row, y)) / row[-1])
    x = [0.0] * len(y)
    for i in reversed(range(len(y))):
        x[i] = (y[i] - sum(lower[k][i] * x[k] for k in range(i + 1, len(y)))) / lower[i][i]
    return x


class Pool:
    """F(w) = 1/N Σ -log p_w(yₙ|xₙ) + β/N Σ (wᵢ log(wᵢ/u) - wᵢ + u), from the members' log-probabilities, one flat list of
    N × K numbers each."""

    def __init__(self, log_p, labels, classes):
        self.log_p, self.labels, self.classes = log_p, labels, classes

    def __call__(self, w, beta, u, derivatives=False):
        """F, and with `derivatives` its gradient and Hessian."""
        k, samples = self.classes, len(self.labels)
        z = [0.0] * (samples * k)
        for weight, values in zip(w, self.log_p):
            z = [a + weight * b for a, b in zip(z, values)]
        value, q = 0.0, []
        for n, label in enumerate(self.labels):
            row = z[n * k : (n + 1) * k]
            largest = max(row)
            terms = [math.exp(v - largest) for v in row]
            total = math.fsum(terms)
            value += math.log(total) + largest - row[label]
            q += [term / total for term in terms]
        value += beta * sum(wi * math.log(wi / u) - wi + u for wi in w if wi > 0) if beta else 0.0
        if not derivatives:
            return value / samples
        weighted = [[a * b for a, b in zip(values, q)] for values in self.log_p]
        means = [[math.fsum(row[n * k : (n + 1) * k]) for n in range(samples)] for row in weighted]
        gradient, hessian = [], []
        for i, values in enumerate(self.log_p):
            own = math.fsum(values[n * k + label] for n, label in enumerate(self.labels))
            pull = beta * math.log(w[i] / u) if beta else 0.0
            gradient.append((math.fsum(means[i]) - own + pull) / samples)
            row = [dot(weighted[i], self.log_p[j]) - dot(means[i], means[j]) for j in range(i + 1)]
            row[i] += beta / w[i] if beta else 1e-12
            hessian.append([entry / samples for entry in row])
        return value / samples, gradient, hessian

    def minimise(self, w, beta, u):
        """The w of least F, by Newton steps that stay above 0 and are halved until F falls."""
        for _ in range(200):
            value, gradient, hessian = self(w, beta, u, derivatives=True)
            step = solve(hessian, gradient)
            length = min([1.0] + [0.9 * wi / si for wi, si in zip(w, step) if si > 0])
            while length > 1e-9:
                moved = [wi - length * si for wi, si in zip(w, step)]
                if self(moved, beta, u) <= value:
                    break
                length /= 2
            else:
                return w
            change, w = max(abs(a - b) for a, b in zip(w, moved)), moved
            if change < 1e-11 * max(w):
                return w
        return w

    def of(self, members):
        return Pool([self.log_p[i] for i in members], self.labels, self.classes)


def uniform_weight(pool):
    mean = [math.fsum(values) / len(pool.log_p) for values in zip(*pool.log_p)]
    sharpness = Pool([mean], pool.labels, pool.classes).minimise([1.0], 0.0, 1.0)[0]
    return min(max(sharpness / len(pool.log_p), 1e-3), 1.0)


def pool_weights(tensors, labels, options):
    """α of the pool: the members that know something, then those of them with a weight that counts, fitted again."""
    (members, samples, classes), flat = tensors["log_predictions"]
    # No head knows the class of its only sample.
    known = [n for n, label in enumerate(labels) if labels.count(label) > 1] or range(samples)
    log_p = [
        [flat[(i * samples + n) * classes + k] for n in known for k in range(classes)] for i in range(members)
    ]
    labels, samples = [labels[n] for n in known], len(known)
    pool = Pool(log_p, labels, classes)
    shares = [labels.count(label) / samples for label in set(labels)]
    chance = -sum(p * math.log(p) for p in shares) - 1 / samples
    kept = [i for i in range(members) if pool.of([i])([1.0], 0.0, 1.0) < chance] or [members - 1]

    def fitted(kept):
        among = pool.of(kept)
        u = uniform_weight(among)
        return among.minimise([u] * len(kept), options.get("beta", 10.0), u)

    w = fitted(kept)
    order = sorted(range(len(kept)), key=lambda i: -w[i])[: options.get("top_k", members)]
    counting = sorted(i for i in order if w[i] >= 0.2 * sum(w) / len(w))
    if len(counting) < len(kept):
        kept = [kept[i] for i in counting]
        w = fitted(kept)
    alpha = dict(zip(kept, (wi / sum(w) for wi in w)))
    return [alpha.get(i, 0.0) for i in range(members)]


def check_pool(result, tensors, labels, objective):
    """Whether the reported weights are those of the optimum."""
    if objective.get("beta", 10.0) == 0.0:
        print("pool                not recomputed: at β = 0 the optimum may lie on the border, which this code does not handle")
        return True
    reported = [source["weight"] for source in result["pool"]["weights"]]
    reported.append(result["pool"]["no_transfer"]["weight"])
    recomputed = pool_weights(tensors, labels, objective if objective["method"] == "pool" else {})
    difference = max(abs(a - b) for a, b in zip(reported, recomputed))
    verdict = "equal" if difference <= TOLERANCE else "DIFFERENT"
    shown = ", ".join(f"{weight:.6f}" for weight in recomputed)
    print(f"pool                recomputed {shown}  largest difference {difference:.1e}  {verdict}")
    return difference <= TOLERANCE


# -------------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", help="result.json")
    parser.add_argument("statistics", help="statistics.safetensors")
    arguments = parser.parse_args()

    with open(arguments.result) as file:
        result = json.load(file)
    # With the method `pool` the composed prompt has weights of its own.
    alpha = result["composed_prompt"]["weights"]
    tensors, metadata = read_tensors(arguments.statistics)
    if [s["digest"] for s in metadata["sources"]] != [s["digest"] for s in result["source_weights"]]:
        sys.exit("error: the result and the statistics are of different sources")
    shape, features = tensors["features"]
    labels = list(tensors["labels"][1])
    if shape[:2] != [len(alpha), len(labels)]:
        sys.exit(f"error: features {shape} are not of {len(alpha)} sources and {len(labels)} samples")

    options = metadata["objective"]["h_score"]
    # A method without gradients reports the gradient alignment of an earlier composition.
    variant = metadata["objective"].get("alignment", {}).get("variant", "mixture_weighted")
    columns = mixed_features(features, shape, alpha, options["standardise"])
    if options["mode"] == "trace_ratio":
        h_score = trace_ratio(columns, labels)
    else:
        rho = result["diagnostics"]["h_score_shrinkage"]
        h_score = regression(columns, labels, rho, options["mode"] == "cross_validated")
    recomputed = {"h_score": h_score}
    if result["objective"]["gradient_alignment"] is not None:
        recomputed["gradient_alignment"] = gradient_alignment(tensors, alpha, variant)
    print(f"H-score {options['mode']}, standardise {options['standardise']}; gradient alignment {variant}")
    agree = True
    for name, value in recomputed.items():
        reported = result["objective"][name]
        difference = abs(value - reported) / max(abs(reported), 1e-300)
        agree &= difference <= TOLERANCE
        verdict = "equal" if difference <= TOLERANCE else "DIFFERENT"
        print(f"{name:19s} reported {reported:.12g}  recomputed {value:.12g}  relative difference {difference:.1e}  {verdict}")
    agree &= check_pool(result, tensors, labels, metadata["objective"])
    sys.exit(0 if agree else 1)


if __name__ == "__main__":
    main()
