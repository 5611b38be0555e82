#!/usr/bin/env bash
# Everything that must pass before a change lands; `make test` and CI run this. It stops at the first failure and prints
# how long each part took.
#
# One cargo profile (release) serves lints, tests and the demo, so that nothing is built twice.
set -euo pipefail
cd "$(dirname "$0")/.."

summary=()
part() {
    local name=$1 started=$SECONDS
    shift
    printf '\n=== %s\n' "$name"
    if "$@"; then
        summary+=("$(printf '%5d s  %s' $((SECONDS - started)) "$name")")
    else
        summary+=("$(printf '%5d s  %s: FAILED' $((SECONDS - started)) "$name")")
        exit 1
    fi
}
print_summary() {
    printf '\n=== time\n'
    [ ${#summary[@]} -eq 0 ] || printf '%s\n' "${summary[@]}"
    printf '%5d s  in all\n' "$SECONDS"
}
trap print_summary EXIT

cargo_components() {
    cargo fmt --version && cargo clippy --version && return
    echo "rustfmt or clippy is missing: rustup component add rustfmt clippy" >&2
    return 1
}

demo_on_a_handful() {
    python3 demo/run.py --limit 48 --compare-offline --out "$(mktemp -d)"
}

documentation_links() {
    RUSTDOCFLAGS="-D warnings" cargo doc --release --workspace --no-deps --document-private-items
}

workers_that_share() {
    scripts/with_postgres.sh python3 benches/bench_workers.py --short "${CARGO_TARGET_DIR:-target}/release/promptweave"
}

# These are the same few requests every time; `make fuzz-api` sends more.
api_against_its_document() {
    local python
    python=$(scripts/schemathesis_python.sh)
    scripts/with_postgres.sh "$python" scripts/fuzz_api/run.py "${CARGO_TARGET_DIR:-target}/release/promptweave" --short --examples 10
}

part "set-up" scripts/setup.sh
part "rustfmt and clippy" cargo_components
part "formatting" cargo fmt --all --check
part "lints" cargo clippy --release --workspace --all-targets -- -D warnings
part "lints without libtorch" cargo clippy --release --all-targets --no-default-features --features chaos -- -D warnings
part "links of the code's documentation" documentation_links
# The tests need dependencies with a few features more than the programs do, so that both together would be built twice:
# building the tests makes target/release/promptweave too, and that one serves the parts below.
if cargo nextest --version >/dev/null 2>&1; then
    part "build of the tests" cargo nextest run --release --workspace --no-run
    part "tests" scripts/with_postgres.sh cargo nextest run --release --workspace --no-fail-fast
    part "documentation tests" cargo test --release --workspace --doc
else
    part "build of the tests" cargo test --release --workspace --no-run
    part "tests" scripts/with_postgres.sh cargo test --release --workspace
fi
if cargo deny --version >/dev/null 2>&1; then
    part "dependencies" cargo deny --log-level error check bans licenses sources
else
    printf '\n=== dependencies: skipped, cargo-deny is not installed (cargo install cargo-deny)\n'
fi
part "faults, in short" scripts/chaos_short.sh
part "the API against its document" api_against_its_document
part "the demo on a handful of images" demo_on_a_handful
part "one job by several workers, and a kill" workers_that_share
