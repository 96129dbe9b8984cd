#!/usr/bin/env bash
# launch/wheelhouse.sh for this machine's Python, then an installation from its folder in a fresh environment with the network cut,
# beside a torch that the environment has already. tests/cluster/run.sh starts it; alone:
#   [KVDS_WHEELS=FOLDER] bash tests/cluster/wheelhouse.sh     (FOLDER: wheels made before; else a package index is needed)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
unshare -n true 2>/dev/null || { echo 'SKIPPED: this container may not make namespaces (docker: --privileged)'; exit 0; }
begun=$SECONDS
scratch=$(mktemp -d "${TMPDIR:-/tmp}/kvds-wheelhouse.XXXXXX")
trap 'rm -rf "$scratch"' EXIT
fail() {
  echo "FAILED wheelhouse: $*"
  exit 1
}

wheels=${KVDS_WHEELS:-$scratch/wheels}
if [ -z "$(ls "$wheels" 2>/dev/null)" ]; then
  if ! bash launch/wheelhouse.sh --to "$wheels" >"$scratch/made.txt" 2>&1; then
    if grep -qE 'NewConnectionError|Network is unreachable|Temporary failure in name' "$scratch/made.txt"; then
      echo 'SKIPPED wheelhouse: no package index is within reach'
      exit 0
    fi
    tail -n 25 "$scratch/made.txt"
    fail 'launch/wheelhouse.sh'
  fi
  tail -n 2 "$scratch/made.txt" | head -n 1
fi
ls "$wheels" | grep -iE '^(torch|triton|nvidia)[-_]' && fail 'the folder holds what the node has itself'
ls "$wheels"/kvds-*-py3-none-any.whl "$wheels"/deepspeed-*-py3-none-any.whl >/dev/null

# The node's own torch with what torch itself wants, and nothing else of this environment. Hard links where the disk allows: pip
# replaces files, it does not write into them.
"$(python -c 'import sys; print(sys._base_executable)')" -m venv --without-pip "$scratch/venv"
site=$("$scratch/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
python - >"$scratch/own.txt" <<'PY'
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement

wanted, seen = ["torch"], set()
while wanted:
    name = wanted.pop()
    try:
        own = distribution(name)
    except PackageNotFoundError:
        continue
    tops = {file.parts[0] for file in own.files or [] if file.parts[0] not in ("..", "__pycache__")} - seen
    seen |= tops
    for top in sorted(tops):
        print(own.locate_file(top))
    needs = [Requirement(text) for text in own.requires or []]
    wanted += [need.name for need in needs if tops and (need.marker is None or need.marker.evaluate({"extra": ""}))]
PY
while read -r found; do
  cp -al "$found" "$site/" 2>/dev/null || cp -a "$found" "$site/"
done <"$scratch/own.txt"
record=$(ls -i "$site"/torch-*.dist-info/RECORD)

unset PYTHONPATH # this checkout's own kvds is not to be found
unshare -n python -m pip --python "$scratch/venv/bin/python" install --quiet --disable-pip-version-check --no-compile --no-index \
  --find-links "$wheels" kvds || fail 'pip install --no-index'
unshare -n python -m pip --python "$scratch/venv/bin/python" install --quiet --disable-pip-version-check --dry-run --no-index \
  --find-links "$wheels" 'kvds[all]' || fail 'the extras of kvds'
[ "$(ls -i "$site"/torch-*.dist-info/RECORD)" = "$record" ] || fail 'torch was replaced'
cd "$scratch"
unshare -n "$scratch/venv/bin/python" -c '
import sys, deepspeed, importlib.util, kvds.training.run, torch, transformers
assert not importlib.util.find_spec("mlflow"), "an extra came along"
assert kvds.__file__.startswith(sys.prefix), kvds.__file__
print("torch", torch.__version__, "deepspeed", deepspeed.__version__, "transformers", transformers.__version__)' | tail -n 1
unshare -n "$scratch/venv/bin/kvds" --help >"$scratch/help.txt" || fail 'kvds --help'
unshare -n "$scratch/venv/bin/kvds" ab problems_300 2>"$scratch/ab.txt" && fail 'kvds ab without its extra'
grep -q "pip install 'kvds\[statistics\]'" "$scratch/ab.txt" || fail 'no word on the extra'
echo "PASSED wheelhouse: installed and imported without a network, the own torch kept ($((SECONDS - begun)) s)"
