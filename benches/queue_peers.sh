#!/usr/bin/env bash
# graphile-worker (npm) and procrastinate (PyPI) for benches/bench_queue.py; prints the folder that has both. Made once (half
# a minute, 250 MB), under ${XDG_CACHE_HOME:-~/.cache}/promptweave. Node comes with it: graphile-worker asks for 22.18.
set -euo pipefail

kept=${XDG_CACHE_HOME:-$HOME/.cache}/promptweave/queue-peers-0.18.0-3.10.0
if [ ! -e "$kept/complete" ]; then
    echo "queue peers: making $kept" >&2
    rm -rf "$kept"
    mkdir -p "$kept"
    npm install --prefix "$kept" --no-audit --no-fund --loglevel=error --save-exact \
        graphile-worker@0.18.0 pg@8.23.1 node@22.23.3 >&2
    # It is made in its final place, because an environment's scripts contain its path.
    python3 -m venv "$kept/python"
    "$kept/python/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir \
        procrastinate==3.10.0 "psycopg[binary,pool]==3.3.9" >&2
    touch "$kept/complete"
fi
echo "$kept"
