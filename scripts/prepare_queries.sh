#!/usr/bin/env bash
# Writes .sqlx, which `query!` reads when there is no database; `make sqlx` runs this beside a fresh cluster. It does
# what `cargo sqlx prepare` does, with the programs that are installed anyway.
set -euo pipefail
cd "$(dirname "$0")/.."

for migration in migrations/*.sql; do
    psql --quiet --no-psqlrc --set ON_ERROR_STOP=1 --file "$migration" "$DATABASE_URL"
done
new=$(mktemp -d .sqlx.XXXXXX)
trap 'rm -rf "$new"' EXIT
touch src/lib.rs # expand the macros again, whatever was built before
SQLX_OFFLINE=false SQLX_OFFLINE_DIR=$PWD/$new cargo check --release --all-targets
rm -rf .sqlx
chmod 755 "$new"
mv "$new" .sqlx
echo ".sqlx: $(find .sqlx -name '*.json' | wc -l) queries"
