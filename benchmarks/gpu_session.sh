#!/usr/bin/env bash
# Ten minutes on a GPU: what was prepared is loaded, checked, timed and raced there. See docs/gpu-session.md.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu_session/session.py" "$@"
