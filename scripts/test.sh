#!/usr/bin/env bash
# Builds everything once and runs every test. Arguments go to `cargo test` (a filter, or `-- --nocapture`).
set -euo pipefail
cd "$(dirname "$0")/.."

ESPALIER_MODEL=$(scripts/fetch-model.sh)
ESPALIER_PYTHON=$(scripts/python-env.sh)
export ESPALIER_MODEL ESPALIER_PYTHON

cargo test --workspace "$@"
