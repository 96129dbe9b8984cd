#!/usr/bin/env bash
# What goes into both images, the one of Dockerfile and the one of kvds.def: run as root, in a Debian with Python, on a copy of the
# sources.
#   bash install.sh SOURCES      (TORCH: its version or another requirement; default: 2.13.0 as PyPI has it, with CUDA)
set -euo pipefail
sources=${1:?usage: bash install.sh SOURCES}
apt-get update
# DeepSpeed compiles with g++ on first use, and reaches other nodes by pdsh and ssh.
apt-get install -y --no-install-recommends g++ git openssh-client pdsh
rm -rf /var/lib/apt/lists/*
export PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
# DeepSpeed's own setup imports setuptools and torch from the environment it is built in: hence no build isolation.
pip install 'setuptools>=77,<80' wheel ninja "torch==${TORCH:-2.13.0}"
pip install --no-build-isolation "${sources}[all]"
