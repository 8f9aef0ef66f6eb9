#!/usr/bin/env bash
# Prints the path of a Python that has grpcio, for the Python client's test; made once, in the cache.
set -euo pipefail

cache=${ESPALIER_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/espalier}
env=$cache/python-grpcio
if ! "$env/bin/python" -c 'import grpc, grpc_tools, google.rpc' 2>/dev/null; then
  rm -rf "$env"
  python3 -m venv "$env"
  "$env/bin/pip" install --quiet --disable-pip-version-check 'grpcio>=1.76,<2' 'grpcio-tools>=1.76,<2' 'googleapis-common-protos>=1.70,<2' >&2
fi
echo "$env/bin/python"
