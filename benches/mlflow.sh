#!/usr/bin/env bash
# An environment with MLflow for benches/bench_api.py; prints its Python. Made once (a minute, 1 GB), under
# ${XDG_CACHE_HOME:-~/.cache}/promptweave.
set -euo pipefail

kept=${XDG_CACHE_HOME:-$HOME/.cache}/promptweave/mlflow-3.17.2
if [ ! -e "$kept/complete" ]; then
    echo "mlflow: making $kept" >&2
    rm -rf "$kept"
    mkdir -p "$(dirname "$kept")"
    # It is made in its final place, because an environment's scripts contain its path.
    python3 -m venv "$kept"
    "$kept/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
        mlflow==3.17.2 "psycopg[binary]" >&2
    touch "$kept/complete"
fi
echo "$kept/bin/python"
