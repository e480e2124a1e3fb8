#!/usr/bin/env bash
# Write the versions of everything installed in an environment, as constraints for pip.
#   scripts/lock.sh PYTHON > requirements/lock.txt
# torch, torchvision and triton stay free, so that pip takes the build that fits the machine (CPU or CUDA).
set -euo pipefail
minor=$("$1" -c 'import sys; print(f"{sys.version_info[0]}.{sys.version_info[1]}")')
echo "# Versions with which the tests pass, written by 'make lock' on Python $minor. Older Pythons are left unconstrained."
"$1" -m pip --disable-pip-version-check freeze --exclude-editable |
    grep -vE '^(torch|torchvision|triton|secateur|nvidia-[^=]*|cuda-[^=]*)([=@ ]|$)' |
    sed "s/\$/; python_version >= '$minor'/"
