#!/usr/bin/env bash
# Sets everything up, then runs `kvds quickstart`: three students distilled from the shipped teacher on the built-in problems under
# ZeRO-3 on two ranks (task loss alone, flat, structured) and compared: a table, a picture, the MLflow records.
#   bash launch/quickstart.sh [OUTPUT_DIR]        (default: outputs/quickstart)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/setup.sh
exec python -m kvds quickstart "$@"
