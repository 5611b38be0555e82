#!/usr/bin/env bash
# An environment with schemathesis and openapi-python-client for scripts/fuzz_api; prints its Python. Made once (15 s, 140 MB), under
# ${XDG_CACHE_HOME:-~/.cache}/promptweave. Every version is fixed, so that the same seed makes the same requests.
set -euo pipefail

kept=${XDG_CACHE_HOME:-$HOME/.cache}/promptweave/schemathesis-4.32.5-client-0.29.0
if [ ! -x "$kept/bin/python" ]; then
    echo "schemathesis: making $kept" >&2
    new=$kept.part
    rm -rf "$new"
    mkdir -p "$(dirname "$kept")"
    python3 -m venv "$new"
    "$new/bin/python" -m pip install --quiet --disable-pip-version-check --no-cache-dir --no-deps \
        schemathesis==4.32.5 hypothesis==6.170.15 hypothesis-graphql==0.13.5 graphql-core==3.3.2 \
        jsonschema_rs==0.60.3 requests==2.34.2 urllib3==2.8.0 certifi==2026.10.18 charset-normalizer==3.5.2 \
        idna==3.20 anyio==4.16.0 typing_extensions==4.16.0 Werkzeug==3.1.9 MarkupSafe==3.0.4 click==8.5.1 \
        rich==15.0.0 markdown-it-py==4.3.0 mdurl==0.1.2 Pygments==2.21.0 pytest==9.2.0 iniconfig==2.3.1 \
        packaging==26.3 pluggy==1.7.0 PyYAML==6.0.3 harfile==0.6.0 pyrate-limiter==4.5.1 \
        sortedcontainers==2.4.0 openapi-python-client==0.29.0 annotated-doc==0.0.7 \
        annotated-types==0.8.0 attrs==26.1.0 h11==0.16.0 httpcore==1.0.9 httpx==0.28.1 Jinja2==3.1.6 pydantic==2.14.4 \
        pydantic_core==2.50.5 ruamel.yaml==0.19.1 ruff==0.17.6 shellingham==1.5.4 typer==0.26.8 typing-inspection==0.4.5 >&2
    "$new/bin/python" -c 'import schemathesis, openapi_python_client' >&2
    mv "$new" "$kept"
fi
echo "$kept/bin/python"
