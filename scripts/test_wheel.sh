#!/usr/bin/env bash
# Install a wheel in a fresh environment and run the tests against it from outside the tree.
#   scripts/test_wheel.sh PYTHON WHEEL     PYTHON: the interpreter of an environment that holds the dependencies
set -euo pipefail
python=$(realpath --no-symlinks "$1")
wheel=$(realpath "$2")
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m venv "$work/env"
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
    > "$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/dependencies.pth"
"$work/env/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps "$wheel"

cd "$work"
"$work/env/bin/python" - "$work" <<'PY'
import sys
import secateur
assert secateur.__file__.startswith(sys.argv[1]), f"not the wheel: {secateur.__file__}"
PY
SECATEUR_TEST_WHEEL=1 OMP_NUM_THREADS=1 "$work/env/bin/python" -m pytest -c "$root/pyproject.toml" \
    --rootdir "$root" -p no:cacheprovider -n 2 --dist loadfile "$root/tests"
