#!/usr/bin/env bash
# The whole check of the GPU, on a machine that has one: what the engine finds there, CUDA against the CPU on the
# self-test's task and on the demo, and the speed of both. All results go to one folder (GPU_CHECK_OUT, or
# target/check-gpu).
#
#   scripts/check_gpu.sh [cuda:N]          (cuda:0)
#
# In a clone with Rust it builds what it needs. On a machine without Rust, bring what another machine built (`cargo
# build --release`, `cargo test --release --package promptweave-engine --lib --no-run`) and the backbone under .assets,
# and name them:
#
#   PROMPTWEAVE                  the binary
#   PROMPTWEAVE_TESTS            the tests' binary, target/release/deps/promptweave_engine-…
#   PROMPTWEAVE_LIBTORCH_CUDA    folder torch/lib of PyTorch 2.11.0 for CUDA; without it that of python3's torch
#   PROMPTWEAVE_MAX_SAMPLES      samples of the demo (default: all); fewer make the CPU's part shorter
set -euo pipefail
cd "$(dirname "$0")/.."
device=${1:-cuda:0}
out=${GPU_CHECK_OUT:-target/check-gpu}
max_samples=${PROMPTWEAVE_MAX_SAMPLES:-2000}
mkdir -p "$out"

part() { printf '\n=== %s\n' "$*"; }
fail() {
    printf 'check_gpu: error: %s\n' "$*" >&2
    exit 1
}

if [ -z "${PROMPTWEAVE_LIBTORCH_CUDA:-}" ]; then
    PROMPTWEAVE_LIBTORCH_CUDA=$(python3 -c 'import os, torch; print(os.path.join(os.path.dirname(torch.__file__), "lib"))') ||
        fail "python3 has no torch: pip install torch==2.11.0, or set PROMPTWEAVE_LIBTORCH_CUDA to its folder torch/lib"
fi
export PROMPTWEAVE_LIBTORCH_CUDA
echo "CUDA from $PROMPTWEAVE_LIBTORCH_CUDA"

if [ -z "${PROMPTWEAVE:-}" ] || [ -z "${PROMPTWEAVE_TESTS:-}" ]; then
    command -v cargo >/dev/null || fail "there is no cargo: set PROMPTWEAVE and PROMPTWEAVE_TESTS to built binaries"
    part "build"
    scripts/setup.sh libtorch backbone
    cargo build --release
    PROMPTWEAVE=${PROMPTWEAVE:-${CARGO_TARGET_DIR:-target}/release/promptweave}
    PROMPTWEAVE_TESTS=${PROMPTWEAVE_TESTS:-$(cargo test --release --package promptweave-engine --lib --no-run --message-format json |
        python3 -c 'import json, sys
print([m["executable"] for m in map(json.loads, sys.stdin) if m.get("executable")][-1])')}
fi
# A binary that was built elsewhere looks for libtorch in that machine's folder; this folder has the same version.
if ! ldd "$PROMPTWEAVE" | grep -q 'libtorch_cpu.so => /'; then
    export LD_LIBRARY_PATH=$PROMPTWEAVE_LIBTORCH_CUDA${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
fi

part "what is found"
"$PROMPTWEAVE" doctor --device "$device"
"$PROMPTWEAVE" doctor --device "$device" --json >"$out/doctor.json"

part "CUDA against the CPU, on the self-test's task"
"$PROMPTWEAVE_TESTS" --ignored --exact tests::cuda::cuda_gives_what_the_cpu_gives --nocapture

part "the demo on both"
sources=()
for file in demo/prompts/*.safetensors; do
    sources+=(--source "$(basename "$file" .safetensors)=$file")
done
# The published objective, whose weights are a mixture's: if one source had all the weight, the devices would not
# differ.
compose() { # NAME OPTION…
    local name=$1
    shift
    "$PROMPTWEAVE" compose --backbone .assets/vit_s14_focus --target demo/target "${sources[@]}" \
        --max-samples "$max_samples" --method hgprompt --out "$out/$name" "$@" >"$out/$name.log" 2>&1 || {
        cat "$out/$name.log" >&2
        fail "the demo's composition failed ($name)"
    }
}
compose cpu --device cpu
# The first run on a GPU also loads kernels.
compose warm-up --device "$device"
compose "$device" --device "$device"
names=(cpu "$device")
if "$PROMPTWEAVE" compose --help | grep -q -- '--precision'; then
    compose "$device-bf16" --device "$device" --precision bf16
    names+=("$device-bf16")
fi
python3 scripts/compare_devices.py "$out" "${names[@]}"
