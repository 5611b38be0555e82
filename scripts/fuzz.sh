#!/usr/bin/env bash
# Runs the cargo-fuzz targets one after another, SECONDS_EACH (default 600) each; `make fuzz` runs this.
#
#   scripts/fuzz.sh [TARGET …]        begins with the kept corpus, fuzz/corpus/TARGET.tar.gz
#   scripts/fuzz.sh keep [TARGET …]   keeps those inputs of the corpus and of later runs that cover something of their
#   own
#
# Needs cargo-fuzz (`cargo install cargo-fuzz`), not the nightly toolchain. Runs work in fuzz/found, which git ignores.
set -euo pipefail
cd "$(dirname "$0")/.."

# The stable compiler has the sanitizers too, as hidden options.
export RUSTC_BOOTSTRAP=1
cargo fuzz --version >/dev/null 2>&1 || { echo "cargo-fuzz is not installed: cargo install cargo-fuzz" >&2 && exit 1; }

keep=
[ "${1:-}" != keep ] || { keep=1 && shift; }
# shellcheck disable=SC2046 # names have no spaces
[ $# -gt 0 ] || set -- $(cargo fuzz list)
for target in "$@"; do
    found=fuzz/found/$target kept=fuzz/corpus/$target.tar.gz
    mkdir -p "$found"
    tar -xzf "$kept" -C "$found"
    if [ "$keep" ]; then
        cargo fuzz cmin "$target" "$found"
        tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner -C "$found" -cf - . | gzip -9n >"$kept"
        continue
    fi
    # An input that is refused must not take long or much memory either.
    cargo fuzz run "$target" "$found" -- -max_total_time="${SECONDS_EACH:-600}" -timeout=5 -rss_limit_mb=512
done
