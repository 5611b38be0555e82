#!/usr/bin/env bash
# Runs the cargo-fuzz targets one after another, SECONDS_EACH (default 600) each; `make fuzz` runs this.
#
#   scripts/fuzz.sh [TARGET …]
#
# Needs cargo-fuzz (`cargo install cargo-fuzz`), not the nightly toolchain. What a run finds new goes to fuzz/found,
# which git ignores; the corpus that is kept (fuzz/corpus) is made of it by `cargo fuzz cmin`.
set -euo pipefail
cd "$(dirname "$0")/.."

# The sanitizers are options that the stable compiler has too, and hides.
export RUSTC_BOOTSTRAP=1
cargo fuzz --version >/dev/null 2>&1 || { echo "cargo-fuzz is not installed: cargo install cargo-fuzz" >&2 && exit 1; }

# shellcheck disable=SC2046 # names have no spaces
[ $# -gt 0 ] || set -- $(cargo fuzz list)
for target in "$@"; do
    mkdir -p "fuzz/found/$target"
    folders=("fuzz/found/$target" "fuzz/corpus/$target")
    case $target in prompt_file) folders+=(tests/fixtures/formats/vpt tests/fixtures/formats/foreign) ;; esac
    # Nothing that is refused may take long or much memory either.
    cargo fuzz run "$target" "${folders[@]}" -- -max_total_time="${SECONDS_EACH:-600}" -timeout=5 -rss_limit_mb=512
done
