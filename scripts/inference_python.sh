#!/usr/bin/env bash
# An environment with the real timm and transformers for scripts/test_inference.py; prints its Python. Made once, under
# ${XDG_CACHE_HOME:-~/.cache}/promptweave, on top of those of benches/pytorch.sh and scripts/peft_python.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

kept=${XDG_CACHE_HOME:-$HOME/.cache}/promptweave/inference-timm-1.0.31
if [ ! -x "$kept/bin/python" ]; then
    pytorch=$(benches/pytorch.sh)
    peft=$(scripts/peft_python.sh)
    echo "inference: making $kept" >&2
    new=$kept.part
    rm -rf "$new"
    python3 -m venv "$new"
    purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
    for below in "$pytorch" "$peft"; do "$below" -c "$purelib"; done \
        >"$("$new/bin/python" -c "$purelib")/others.pth"
    "$new/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps \
        timm==1.0.31 torchvision==0.26.0 >&2
    "$new/bin/python" -c 'import timm, transformers' >&2
    mv "$new" "$kept"
fi
echo "$kept/bin/python"
