# Sourced by the legs beside it: the README's test command, and a fresh virtual environment that is switched on.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck disable=SC2034
command=$(sed -n '/<!-- test-command -->/,/^```$/p' README.md | grep -v -e '<!--' -e '^```')
[ -n "$command" ] || { echo "README.md has no test command between its markers" >&2; exit 1; }

environment=$(mktemp -d)
trap 'rm -rf "$environment"' EXIT
python3 -m venv "$environment"
# shellcheck disable=SC1091
source "$environment/bin/activate"
export OMP_NUM_THREADS=1
