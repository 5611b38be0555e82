#!/usr/bin/env bash
# The short form of `make chaos`. Our own code is built without optimisation, which is several times faster; what the
# test measures are leases and database restarts.
set -euo pipefail
cd "$(dirname "$0")/.."

cargo build --config 'profile.release.package.promptweave.opt-level=0' --config 'profile.release.package.promptweave.debug=false' \
    --release --no-default-features --features chaos --bin promptweave-chaos
python3 tests/chaos/run.py "${CARGO_TARGET_DIR:-target}/release/promptweave-chaos" --short
