#!/usr/bin/env bash
# An environment with the real PEFT for scripts/test_peft.py and scripts/write_format_fixtures.py; prints its Python.
# Made once, under ${XDG_CACHE_HOME:-~/.cache}/promptweave, on top of the PyTorch that benches/pytorch.sh keeps there.
set -euo pipefail
cd "$(dirname "$0")/.."

kept=${XDG_CACHE_HOME:-$HOME/.cache}/promptweave/peft-0.21.2
if [ ! -x "$kept/bin/python" ]; then
    pytorch=$(benches/pytorch.sh)
    echo "peft: making $kept" >&2
    new=$kept.part
    rm -rf "$new"
    python3 -m venv "$new"
    purelib='import sysconfig; print(sysconfig.get_path("purelib"))'
    "$pytorch" -c "$purelib" >"$("$new/bin/python" -c "$purelib")/pytorch.pth"
    # These are all packages that peft needs apart from PyTorch; without --no-deps pip would fetch another PyTorch.
    "$new/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps \
        peft==0.21.2 transformers==5.23.0 accelerate==1.15.0 huggingface_hub==2.4.0 tokenizers==0.23.3 \
        hf-xet==1.8.0 regex==2026.11.15 tqdm==4.70.1 psutil==7.2.2 PyYAML==6.0.3 packaging==26.3 httpx2==2.16.2 \
        httpcore2==2.16.2 anyio==4.16.0 idna==3.20 h11==0.16.0 truststore==0.10.5 typer==0.29.2 click==8.5.1 \
        shellingham==1.5.4 rich==15.0.0 markdown-it-py==4.3.0 mdurl==0.1.2 Pygments==2.21.0 annotated-doc==0.0.7 \
        h5py==3.16.0 >&2
    "$new/bin/python" -c 'import peft, h5py' >&2
    mv "$new" "$kept"
fi
echo "$kept/bin/python"
