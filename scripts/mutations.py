#!/usr/bin/env python3
"""Breaks the method on purpose, one term at a time, and shows which tests notice.

    python3 scripts/mutations.py [--only NAME ...] [--tree DIR] [--target-dir DIR] [--out FILE]

A test that passes proves little as long as nobody saw it fail. Each mutation below replaces one piece of the engine's
source, which must occur exactly once; the lib tests are built and those of its filter run. The outcome is a Markdown
table on standard output, a row as soon as it is known: the tests that failed, **SURVIVED**, or **did not compile**.
First the unmutated tree runs with all filters, and must pass.

The tree is a worktree of HEAD in a temporary directory, with the working copy's `.libtorch` and `.assets`; or, with
`--tree`, an existing clean checkout, whose files are put back after every mutation. After the first build a mutation
takes a quarter of a minute. Exits with 1 where a mutation survived or did not compile.

The numbers are the method's oracles, the properties that every version of it must keep:
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ORACLES = {
    1: "one source is returned as it is, bit by bit",
    2: "H and L_align from statistics are their definitions; shards and micro-batches change nothing",
    3: "gradients agree with central differences",
    4: "duplicate prompts: only the sum of their weights counts; all equal gives uniform weights",
    5: "permuting prompts permutes α; permuting samples or renaming labels changes nothing",
    6: "H ignores scale, shifts and rotations of the features",
    7: "0 ≤ H ≤ min(d, K-1); N ≤ d+1 without shrinkage is refused",
    8: "shuffled labels score what chance says",
    9: "without shrinkage H is the sum of squared canonical correlations",
    10: "degenerate targets stay finite",
    11: "the path runs monotonically between both terms' own optima, and t is free of scale",
    12: "what L_align ignores, how it scales, where R3 is least, that R2 is convex",
    13: "per-sample gradients are each sample's own; fast paths equal the plain ones",
    14: "the order of a prompt's tokens changes no feature, and aligned no composed prompt",
    15: "planted optima are found; no grid point is better; α is on the simplex",
    16: "other programs' values: scikit-learn, the transfer-learning library, timm, LEEP and LogME",
}
__doc__ += "".join(f"\n{number:>3}. {what}" for number, what in ORACLES.items())


@dataclass(frozen=True)
class Mutation:
    name: str
    oracle: int | None
    """None for a property that is not among the oracles."""
    breaks: str
    file: str
    """From [`ENGINE`]."""
    find: str
    replace: str
    tests: str
    """Substrings of test names, separated by spaces."""


M = Mutation
ENGINE = "crates/promptweave-engine/src"
MUTATIONS = [
    # ---- H-score ----
    M("h-class-weights-over-n", 9, "w_c = n_c/N in place of n_c/(N-1)", "score/h_score/sums.rs",
      "1.0 / (*count as f64 * self.degrees())", "1.0 / (*count as f64 * (self.degrees() + 1.0))", "h_score::tests::the_trace_ratio"),
    M("h-without-one-minus-rho", 2, "the factor 1-ρ of H is missing", "score/h_score/regression.rs",
      "false => self.c * product,", "false => self.c * product / 0.99,", "h_score::tests::h_"),
    M("h-rho-without-trace", 6, "ρ is added to Σ as it is, without tr Σ/d", "score/h_score/mod.rs",
      "(value * over + self.floor, slopes)", "(rho + self.floor, slopes)", "h_score::tests::h_ignores"),
    M("h-gradient-without-trace", 3, "∂H misses the term through tr Σ", "score/h_score/regression.rs",
      "+ of_delta * delta_slopes[i]", "+ 0.0 * of_delta * delta_slopes[i]", "h_score::tests::gradients_agree"),
    M("h-dual-ridge", 2, "the dual form takes c for δ", "score/h_score/regression.rs",
      "true => self.most - self.delta * product,", "true => self.most - self.c * product,", "h_score::tests::h_equals h_score::tests::no_way"),
    M("h-singular-accepted", 7, "N ≤ d+1 without shrinkage is not refused", "score/h_score/mod.rs",
      ".check_samples(n as usize, d as usize)", ".check_samples(usize::MAX, d as usize)", "h_score::tests::too_few"),
    M("h-chance-counts-dimensions", 8, "chance correction with df = d, whatever ρ", "score/h_score/regression.rs",
      "inverse.size()[0] as f64 - self.delta * trace(inverse)", "inverse.size()[0] as f64",
      "h_score::tests::shuffled"),
    M("h-cross-validated-without-the-mean", None, "the mean of the classes counts as nothing fitted", "score/h_score/regression.rs",
      "1.0 - (1.0 + freedom) / n", "1.0 - freedom / n", "h_score::tests::cross_validated h_score::tests::shuffled"),
    M("h-cross-validated-freedom-fixed", None, "∂H forgets that the degrees of freedom move with α", "score/h_score/regression.rs",
      "inverse.matmul(inverse) * (self.delta * by_freedom)", "inverse.zeros_like()", "h_score::tests::gradients_agree"),
    M("h-no-floor", 10, "no absolute floor under Σ = 0", "score/h_score/mod.rs",
      "const FLOOR: f64 = 1e-12;", "const FLOOR: f64 = 0.0;", "h_score::tests::degenerate"),
    M("h-pairs-not-symmetric", 5, "of x_i x_jᵀ + x_j x_iᵀ twice the first", "score/h_score/second_moments.rs",
      "&product + product.tr()", "&product * 2.0", "permuting_the_prompts h_score::tests::h_equals"),
    M("h-without-keeps-the-mean", None, "samples left out are not left out of the mean", "score/h_score/second_moments.rs",
      "all - left - mean * num_kept as f64", "all - left - mean * 0.0", "h_score::tests::leaving"),
    M("ledoit-wolf-beta", 16, "β² of Ledoit-Wolf without ‖S‖²", "score/h_score/shrinkage.rs",
      "(fourth - squared_norm) / n;", "fourth / n;", "h_score::tests::estimated h_score::tests::h_is"),
    # ---- Gradient alignment ----
    M("r1-mean-plain", 2, "R1 about the plain mean of the variances", "score/alignment.rs",
      "AlignmentVariant::MixtureWeighted => self.about_the_mixed(alpha, alpha, true),",
      "AlignmentVariant::MixtureWeighted => self.about_the_mixed(alpha, &vec![1.0 / m as f64; m], false),", "alignment::"),
    M("r2-mean-weighted", 12, "R2 about the weighted mean of the variances: no longer convex", "score/alignment.rs",
      "self.about_the_mixed(alpha, &vec![1.0 / m as f64; m], false)",
      "self.about_the_mixed(alpha, alpha, true)", "alignment::tests::r2"),
    M("r1-gradient-mean-fixed", 3, "∂L_align of R1 forgets that v̄ moves with α", "score/alignment.rs",
      "if moves {", "if moves && m == 0 {", "alignment::tests::the_gradient"),
    M("r3-target-uniform", 12, "R3 about the plain mean of the variances", "score/alignment.rs",
      "f64::from(u8::from(k == i)) - alpha[k])", "f64::from(u8::from(k == i)) - 1.0 / alpha.len() as f64)",
      "alignment::"),
    M("r3-about-zero", 2, "R3's variances about zero, not about the mean gradient", "score/gradients.rs",
      "let mean_squares = sums.square() /", "let mean_squares = sums.square() * 0.0 /", "gradients::tests::the_streamed"),
    M("products-not-centred", 12, "products of gradients not centred over the prompts", "score/gradients.rs",
      "&(&gradients - &over_prompts), &over_prompts]", "&gradients, &over_prompts]", "gradients::"),
    M("fold-left-out-still-counted", None, "a fold left out stays in the number of samples", "score/gradients.rs",
      "count - self.counts[fold as usize],", "count,", "gradients::tests::the_streamed"),
    M("shards-not-counted", 2, "another shard's samples are not counted", "score/gradients.rs",
      "*count += more;", "*count += 0 * more;", "gradients::tests::neither"),
    # ---- Heads and per-sample loss ----
    M("loss-averaged-over-batch", 13, "the mean, not the sum, of a micro-batch's losses", "score/head/mod.rs",
      "log_p.gather(1, &own, false).sum(Kind::Double)", "log_p.gather(1, &own, false).mean(Kind::Double)",
      "gradients::tests::the_expanded gradients::tests::neither"),
    M("head-sees-its-own-fold", None, "cross-fitted heads are used on the fold they were fitted on", "score/head/mod.rs",
      "count == 1 || folds[*row] != own", "count == 1 || folds[*row] == own", "head::"),
    M("temperature-one", None, "the head's temperature is not fitted", "score/head/mod.rs",
      "fit_temperature(&head.logits(features, labels, folds)?);", "1.0;", "head::"),
    M("lda-without-priors", None, "LDA takes all classes for equally frequent", "score/head/closed_form.rs",
      "(solved, priors.log() - quadratic * 0.5)", "(solved, quadratic * -0.5)", "head::closed_form"),
    # ---- Backbone ----
    M("cls-shortcut-wrong-token", 13, "on GPUs the last block's query is of another token than CLS", "vit/shared.rs",
      "forward(&normed.narrow(1, 0, 1))", "forward(&normed.narrow(1, 1, 1))", "vit::tests::fast_paths"),
    M("fused-cls-wrong-token", 13, "the last block on CPUs is of another token than CLS", "vit/fused.rs",
      ".select(1, 0)\n}", ".select(1, 1)\n}", "vit::tests::fast_paths"),
    M("prompts-get-positions", 14, "prompt tokens get what patches have", "vit/plain.rs",
      "1), prompt, &patches]", "1), &(prompt + patches.narrow(1, 0, prompt.size()[1])), &patches]",
      "vit::tests::fast_paths"),
    M("layer-norm-eps", 16, "LayerNorm with ε = 1e-3", "vit/weights.rs",
      "eps: config.norm_eps,", "eps: 1e-3,", "a_random_vit_agrees"),
    M("fold-without-values-bias", 13, "the values' bias gets lost", "vit/fold_weights.rs",
      ".mv(&of_values)", ".mv(&(of_values * 0.0))", "vit::tests::fast_paths"),
    M("gelu-slope-without-density", 13, "GELU's derivative without h φ(h)", "vit/kernels.rs",
      "h.fused(density, function)", "function", "vit::tests::fast_paths"),
    M("norm-backward-without-variance", 13, "LayerNorm's derivative as if σ were given", "vit/kernels.rs",
      "- mean - normed[k].load() * along", "- mean - E::Real::of(0.0) * along", "vit::tests::fast_paths"),
    M("softmax-backward-not-centred", 13, "softmax's derivative as if its sum were free", "vit/kernels.rs",
      "(by[k].load() - inner) *", "(by[k].load() - E::Real::of(0.0) * inner) *", "vit::tests::fast_paths"),
    M("streams-in-any-order", 2, "micro-batches are collected as they come", "vit/streams.rs",
      "early.remove(&next)", "early.pop_first().map(|(_, done)| done)", "streams::tests::the_number"),
    # ---- Solver ----
    M("one-start", 15, "the uniform start alone", "solve/solver.rs",
      "if m == 1 {", "if m >= 1 {", "tests::solver::both"),
    M("of-equals-the-sparsest", 4, "where all prompts are equal, not the uniform α", "solve/solver.rs",
      ".max_by(|a, b| entropy(", ".min_by(|a, b| entropy(", "tests::solver::equal"),
    M("path-not-solved", 11, "points of the path are not descended to", "solve/solver.rs",
      "points.filter(|_| largest_l > 0.0)", "points.filter(|_| largest_l > f64::INFINITY)",
      "tests::solver::every_point"),
    M("ranges-not-normalised", 11, "the trade-off does not divide L_align by its range", "solve/term_weights.rs",
      "l: t / self.l,", "l: t,", "tests::solver::the_path"),
    M("knee-upside-down", 11, "the knee farthest above the chord", "solve/term_weights.rs",
      "1.0 - x - y", "x + y - 1.0", "tests::solver::the_knee"),
    M("projection-without-shift", 15, "negative weights are cut off, the sum is left as it is", "solve/optimizer.rs",
      "(value - shift).max(0.0)", "(value - 0.0 * shift).max(0.0)", "optimizer::"),
    M("armijo-accepts-rises", 15, "every step is accepted, rises too", "solve/optimizer.rs",
      "if found <= value + 1e-4 * fraction * slope + noise {",
      "if found <= value + 1e-4 * fraction * slope + noise || true {", "optimizer::"),
    M("entropy-sign", None, "entropy is taken away, not given", "solve/optimizer.rs",
      "slope + tau * (log + 1.0)", "slope - tau * (log + 1.0)", "optimizer::"),
    M("jackknife-factor", None, "1/J in place of (J-1)/J", "solve/jackknife.rs",
      "(folds - 1.0) / folds * squares", "1.0 / folds * squares", "tests::solver::standard_errors"),
    # ---- From α to the composed prompt ----
    M("mix-in-bfloat16", 1, "the composed prompt is cut to bfloat16", "../../promptweave-domain/src/mixture.rs",
      "terms.iter().fold(0f64, |sum, term| sum + term) as f32",
      "f32::from_bits((terms.iter().fold(0f64, |sum, term| sum + term) as f32).to_bits() & 0xffff_0000)",
      "one_source_is_returned"),
    M("mix-unweighted", 15, "the composed prompt is the plain mean", "../../promptweave-domain/src/mixture.rs",
      "*term = weight * f64::from(prompt.values[index]);", "*term = f64::from(prompt.values[index]) / alpha.len() as f64 + 0.0 * weight;",
      "a_composition_is_whole"),
    M("tokens-not-matched", 14, "token alignment leaves every prompt as it is", "compose/token_alignment.rs",
      "Ok(matching(&directions[medoid], &directions[i])?.0)", "Ok((0..directions[i].size()[0] as usize).collect::<Vec<usize>>())",
      "token_alignment::tests::"),
    M("refinement-accepts-anything", None, "a step on the true objective is taken though it is no better", "compose/refine.rs",
      "if next.value < here.value {", "if next.value < here.value || true {",
      "refine::tests::the_gradient"),
    M("subset-in-recorded-order", 5, "solving again takes features in the recorded order, not the asked one", "statistics.rs",
      "features: self.features.index_select(0, &Tensor::from_slice(&rows)),",
      "features: self.features.index_select(0, &Tensor::from_slice(&rows).sort(0, false).0),", "solving_again_gives"),
    # ---- Scores of single sources ----
    M("leep-unnormalised", 16, "LEEP with P(y, z) for P(y given z)", "score/transferability.rs",
      "theta.matmul(&(joint / of_source).tr())", "theta.matmul(&(joint + of_source * 0.0).tr())", "transferability::"),
    M("logme-one-round", 16, "LogME's fixed-point iteration stops after one round", "score/transferability.rs",
      "for _ in 0..11 {", "for _ in 0..1 {", "transferability::tests::scores_agree"),
]  # fmt: skip


@contextlib.contextmanager
def checkout(root: Path):
    """HEAD in a temporary directory, with what is not under version control but needed to build and test."""
    with tempfile.TemporaryDirectory(prefix="promptweave-mutations-") as parent:
        tree = Path(parent) / "tree"
        git = ["git", "-C", str(root), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), "HEAD"], check=True)
        try:
            for name in (".libtorch", ".assets"):
                (tree / name).symlink_to((root / name).resolve())
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


@contextlib.contextmanager
def mutated(tree: Path, mutation: Mutation):
    file = tree / ENGINE / mutation.file
    original = file.read_text(encoding="utf-8")
    file.write_text(original.replace(mutation.find, mutation.replace), encoding="utf-8")
    try:
        yield
    finally:
        file.write_text(original, encoding="utf-8")


def check(tree: Path, mutations: list[Mutation]):
    """Stops where a mutation's text is not there exactly once: the source has moved on."""
    for mutation in mutations:
        count = (tree / ENGINE / mutation.file).read_text(encoding="utf-8").count(mutation.find)
        if count != 1:
            sys.exit(f"{mutation.name}: `{mutation.find}` occurs {count} times in {mutation.file}; correct the mutation")


BUILD_FAILED, TESTS_FAILED = 101, 100
NOT_PASSED = re.compile(r"^\s*(?:FAIL|ABORT|SIG\w+|TIMEOUT) \[.*?\]\s+(?:\(.*?\)\s+)?\S+ (\S+)$", re.MULTILINE)


class DidNotCompile(Exception):
    """Its text is the compiler's."""


def failures(tree: Path, target_dir: Path, tests: set[str], limit: int) -> list[str]:
    """Names of the tests that fail, of those whose name contains one of `tests`."""
    command = ["cargo", "nextest", "run", "--release", "--package", "promptweave-engine", "--lib", "--no-fail-fast", "--color", "never"]
    # Optimisation and debug information are as low as possible: most of the time goes into building.
    for setting in ("opt-level=0", "debug=false"):
        command += ["--config", f"profile.release.package.promptweave-engine.{setting}"]
    command += ["--status-level", "fail", "--final-status-level", "none", "--failure-output", "never", *sorted(tests)]
    environment = os.environ | {"CARGO_TARGET_DIR": str(target_dir), "CARGO_INCREMENTAL": "1"}
    run = subprocess.Popen(
        command, cwd=tree, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    try:
        output, _ = run.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        return [f"not done within {limit} s"]
    finally:
        # The process has its own group, so that its tests end with it, even if this script is interrupted.
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGTERM)
            run.wait()
    if run.returncode == 0:
        return []
    if run.returncode == TESTS_FAILED:
        return sorted(set(NOT_PASSED.findall(output))) or ["(see nextest's output)"]
    if run.returncode == BUILD_FAILED:
        raise DidNotCompile(output)
    sys.exit(f"{' '.join(command)} exited with {run.returncode}:\n{output}")


def row(mutation: Mutation, outcome: str) -> str:
    oracle = "" if mutation.oracle is None else mutation.oracle
    return f"| {mutation.name} | {oracle} | {mutation.breaks} | {outcome} |"


def caught_by(names: list[str]) -> str:
    shown = ", ".join(f"`{name.removeprefix('tests::')}`" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these mutations alone")
    parser.add_argument("--tree", type=Path, help="a clean checkout to mutate in place of a temporary one")
    parser.add_argument("--target-dir", type=Path, help="where to build (default: target/mutations)")
    parser.add_argument("--out", type=Path, help="append the table to this file too, row by row")
    parser.add_argument("--limit", type=int, default=900, metavar="SECONDS", help="for one build with its tests")
    options = parser.parse_args()

    mutations = [m for m in MUTATIONS if options.only is None or m.name in options.only]
    if options.only and len(mutations) < len(set(options.only)):
        parser.error(f"mutations are: {', '.join(m.name for m in MUTATIONS)}")
    uncovered = set(ORACLES) - {m.oracle for m in MUTATIONS}
    assert not uncovered, f"no mutation breaks oracle {uncovered}"

    root = Path(__file__).resolve().parent.parent
    target_dir = (options.target_dir or root / "target/mutations").resolve()

    def say(line: str):
        print(line, flush=True)
        if options.out:
            with options.out.open("a", encoding="utf-8") as out:
                print(line, file=out)

    with contextlib.nullcontext(options.tree) if options.tree else checkout(root) as tree:
        if subprocess.run(["git", "status", "--porcelain", "src", "crates"], cwd=tree, check=True, capture_output=True).stdout:
            sys.exit(f"{tree} has changes below src or crates: commit them or put them aside first")
        check(tree, mutations)
        everything = {test for mutation in mutations for test in mutation.tests.split()}
        if broken := failures(tree, target_dir, everything, 2 * options.limit):
            sys.exit(f"the unmutated tree fails already: {caught_by(broken)}")
        say("| Mutation | Oracle | What it breaks | Caught by |\n|---|---|---|---|")
        missed = 0
        for mutation in mutations:
            try:
                with mutated(tree, mutation):
                    names = failures(tree, target_dir, set(mutation.tests.split()), options.limit)
                outcome = caught_by(names) if names else "**SURVIVED**"
            except DidNotCompile as error:
                print(error, file=sys.stderr)
                names, outcome = [], "**did not compile**"
            missed += not names
            say(row(mutation, outcome))
    print(f"{len(mutations) - missed} of {len(mutations)} caught", file=sys.stderr)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
