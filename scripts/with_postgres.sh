#!/usr/bin/env bash
# Runs a command beside its own PostgreSQL cluster, which DATABASE_URL names and which is deleted afterwards:
#
#   scripts/with_postgres.sh cargo nextest run --release
#
# The cluster's data need not survive, so it never waits for the disk. With POSTGRES_DURABLE=1 (for benchmarks) it waits
# as a real one does. No other cluster is touched.
set -euo pipefail

bin=${PROMPTWEAVE_POSTGRES_BIN:-}
# The newest version with a server; a newer client may be installed beside it.
for dir in $(dirname "$(command -v initdb || echo /)") $(printf '%s\n' /usr/lib/postgresql/*/bin /usr/pgsql-*/bin | sort -V); do
    if [ -z "${PROMPTWEAVE_POSTGRES_BIN:-}" ] && [ -x "$dir/initdb" ] && [ -x "$dir/pg_ctl" ]; then bin=$dir; fi
done

# PostgreSQL refuses to run as root; Debian's package brings a user for it.
as_owner=()
folder=$(mktemp -d "${TMPDIR:-/tmp}/promptweave-test.XXXXXX")
if [ "$(id -u)" = 0 ]; then
    as_owner=(runuser -u postgres --)
    chown postgres "$folder"
fi

stop() {
    "${as_owner[@]}" "$bin/pg_ctl" stop --silent --mode immediate -D "$folder/data" || true
    rm -rf "$folder"
}
trap stop EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

speed="-c fsync=off -c synchronous_commit=off -c full_page_writes=off"
[ "${POSTGRES_DURABLE:-0}" = 0 ] || speed=

port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
cd / # the owner may not enter the directory we came from
"${as_owner[@]}" "$bin/initdb" -D "$folder/data" --username postgres --auth trust --encoding UTF8 --locale C \
    --no-sync >"$folder/initdb.log" || { cat "$folder/initdb.log" >&2 && exit 1; }
"${as_owner[@]}" "$bin/pg_ctl" start --silent --wait -D "$folder/data" -l "$folder/data/server.log" -o "\
    -c listen_addresses=127.0.0.1 -p $port -c unix_socket_directories=$folder -c max_connections=300 \
    $speed" ||
    { cat "$folder/data/server.log" >&2 && exit 1; }
cd "$OLDPWD"

export DATABASE_URL=postgres://postgres@127.0.0.1:$port/postgres
"$@"
