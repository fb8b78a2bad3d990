#!/usr/bin/env bash
# Every check but the tests: style, types, the direction of imports, and that the docs site builds.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
lint-imports
pyright &
types=$!
site=$(mktemp -d)
NO_MKDOCS_2_WARNING=1 PYTHONPATH=. mkdocs build --strict --site-dir "$site"
rm -rf "$site"
wait "$types"
