#!/usr/bin/env bash
# A folder of wheels from which kvds is installed on a node without internet, beside the torch that the node already has.
#   bash launch/wheelhouse.sh [--to wheels] [--python 3.12] [--platform manylinux_2_28_x86_64] [--without torch triton nvidia]
# On the node, in its environment:
#   pip install --no-index --find-links wheels 'kvds[all]'
# DeepSpeed comes as a wheel without compiled operations: it builds those that it needs on first use. What --without names (a
# package, or the beginning of packages' names such as nvidia) is neither brought nor wanted; the node must have it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

to=wheels
python=$(python -c 'import sys; print("%d.%d" % sys.version_info[:2])')
platform=manylinux_2_28_x86_64
without=(torch triton nvidia)
while [ $# -gt 0 ]; do
  case $1 in
    --to) to=$2 && shift 2 ;;
    --python) python=$2 && shift 2 ;;
    --platform) platform=$2 && shift 2 ;;
    --without)
      without=() && shift
      while [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; do without+=("$1") && shift; done
      ;;
    *)
      echo "wheelhouse: unknown argument $1; expected --to, --python, --platform or --without" >&2
      exit 2
      ;;
  esac
done
if [[ ! $platform =~ ^manylinux_2_([0-9]+)_([a-z0-9_]+)$ ]] || [[ ! $python =~ ^3\.[0-9]+$ ]]; then
  echo "wheelhouse: --platform $platform --python $python: expected such as manylinux_2_28_x86_64 and 3.12" >&2
  exit 2
fi
[[ $platform =~ ^manylinux_2_([0-9]+)_([a-z0-9_]+)$ ]]
newest=${BASH_REMATCH[1]} machine=${BASH_REMATCH[2]}
# pip takes a platform literally; a node of glibc 2.28 runs wheels for every older one, too.
tags=()
for ((minor = newest; minor >= 5; minor--)); do tags+=(--platform "manylinux_2_${minor}_$machine"); done
tags+=(--platform "manylinux2014_$machine" --platform "manylinux1_$machine")

mkdir -p "$to"
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

# kvds, and DeepSpeed in the version that pip chooses: wheels for any Python. From a copy, since a build folder that an earlier
# build left in the checkout would bring modules that are gone.
mkdir "$scratch/source"
mkdir "$scratch/source/launch"
cp -r pyproject.toml setup.py README.md LICENSE kvds ds_configs "$scratch/source"
cp -r launch/recipes launch/quickstart_teacher "$scratch/source/launch"
pip wheel --quiet --no-deps --wheel-dir "$to" "$scratch/source"
DS_BUILD_OPS=0 pip wheel --quiet --no-deps --no-build-isolation --wheel-dir "$to" \
  "$(python -c 'import tomllib; print(next(d for d in tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"] if d.startswith("deepspeed")))')"

# Empty packages stand in for what the node has, as new as kvds takes them, so that pip resolves without them and what they want.
# A constraints file of this machine, which is not about the node, might hold pip to an older torch than the stand-in.
python - "$scratch" "${without[@]}" <<'PY'
import re, sys, zipfile
folder, *names = sys.argv[1:]
wishes = open("pyproject.toml").read()
for name in names:
    bound = re.search(rf'"{name}[^"]*<(\d+)"', wishes)
    version = f"{int(bound[1]) - 1}.9999" if bound else "9999"
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    with zipfile.ZipFile(f"{folder}/{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: wheelhouse\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
PY
PIP_CONSTRAINT=/dev/null pip download --quiet --dest "$to" --find-links "$scratch" --find-links "$to" --only-binary=:all: --implementation cp \
  --python-version "$python" --abi "cp${python/./}" --abi abi3 --abi none "${tags[@]}" "$(echo "$to"/kvds-*.whl)[all]" "$to"/deepspeed-*.whl
for name in "${without[@]}"; do
  rm -f "$to/${name//-/_}"[-_]*.whl
done

count=$(find "$to" -name '*.whl' | wc -l)
echo "wheelhouse: $count wheels, $(du -sh "$to" | cut -f1) in $to for Python $python on $platform, without ${without[*]:-nothing}"
echo "on the node: pip install --no-index --find-links $to 'kvds[all]'"
