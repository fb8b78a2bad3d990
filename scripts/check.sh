#!/usr/bin/env bash
# Every check but the tests: style, types, and the direction of imports.
set -euo pipefail
cd "$(dirname "$0")/.."
ruff check .
ruff format --check .
pyright
lint-imports
