#!/usr/bin/env bash
# launch/wheelhouse.sh for this machine's Python, then an installation from its folder in a fresh environment with the network cut,
# beside a torch that the environment has already.
#   bash tests/cluster/wheelhouse.sh        (some minutes; needs a package index for the first half, and to make namespaces)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
unshare -n true 2>/dev/null || { echo 'SKIPPED: this container may not make namespaces (docker: --privileged)'; exit 0; }
scratch=$(mktemp -d /tmp/kvds-wheelhouse.XXXXXX)
trap 'rm -rf "$scratch"' EXIT

wheels=${KVDS_WHEELS:-$scratch/wheels}
[ -n "$(ls "$wheels" 2>/dev/null)" ] || bash launch/wheelhouse.sh --to "$wheels"
if ls "$wheels" | grep -iE '^(torch|triton|nvidia)[-_]'; then
  echo 'FAILED: the folder holds what the node has itself'
  exit 1
fi
ls "$wheels"/kvds-*-py3-none-any.whl "$wheels"/deepspeed-*-py3-none-any.whl

# The node's own torch, and what torch itself wants: links into this environment.
own=$(python -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
"$(python -c 'import sys; print(sys._base_executable)')" -m venv "$scratch/venv"
site=$("$scratch/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
for name in torch torchgen functorch sympy mpmath networkx; do
  for found in "$own/$name" "$own/$name"-*.dist-info; do
    if [ -e "$found" ]; then ln -s "$found" "$site/"; fi
  done
done
before=$(readlink "$site/torch")

unshare -n "$scratch/venv/bin/pip" install --quiet --no-index --find-links "$wheels" kvds
[ "$(readlink "$site/torch")" = "$before" ] || { echo 'FAILED: torch was replaced'; exit 1; }
cd "$scratch"
unset PYTHONPATH
unshare -n "$scratch/venv/bin/python" -c '
import deepspeed, kvds.train, torch, transformers
print("torch", torch.__version__, "deepspeed", deepspeed.__version__, "transformers", transformers.__version__)' | tail -n 1
unshare -n "$scratch/venv/bin/kvds" --help | head -n 1
echo 'PASSED wheelhouse: installed and imported without a network, the own torch kept'
