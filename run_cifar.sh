#!/usr/bin/env bash
# Tables 1 and 2 of the paper (CIFAR-10, CIFAR-100), or a demonstration on synthetic images.
# Run the same command again to go on after a stop: finished runs are skipped.
set -euo pipefail
shopt -s inherit_errexit
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<EOT
usage: run_cifar.sh demo | cifar10 | cifar100 [--dry-run]

  demo       a few minutes on two CPU cores: pre-train, fine-tune and tabulate on synthetic images
  cifar10    Table 1: every method, three networks, three seeds
  cifar100   Table 2, likewise
  --dry-run  print the commands and run nothing

Environment variables and their defaults:
  PYTHON     a Python with torch; .venv is made beside this script if none is found
  ARCHS      the table's "resnet18 wrn40_2 densenet100"
  METHODS    every training method of the table, such as "energy greg"
  SEEDS      "0 1 2"
  ID, AUX    the CIFAR set and random300k; or paths of your own data
  OOD        the paper's six sets; or names and name=path, separated by blanks
  ROOT       data            folder of the data sets
  RUNS       runs            folder of the results
  DOWNLOAD   empty           1: fetch the data sets that are absent
  EXTRA      empty           further options of "greg.py table", such as "--amp --channels-last"

examples:
  bash run_cifar.sh demo
  SEEDS=0 ARCHS=wrn40_2 METHODS="energy greg" DOWNLOAD=1 bash run_cifar.sh cifar10
EOT
}

find_python() { # a Python with torch: the caller's, ours, the system's, or a new environment
  local venv=$here/.venv/bin/python candidate
  local needs='import sys, torch, torchvision, numpy, tqdm; assert sys.version_info >= (3, 10)'
  for candidate in "$venv" python3 python; do
    if command -v "$candidate" >/dev/null && "$candidate" -c "$needs" 2>/dev/null
    then echo "$candidate"; return; fi
  done
  echo "No Python with torch here: installing into $here/.venv (some GB, once)" >&2
  python3 -m venv "$here/.venv" >&2 || {
    echo "python3 has no venv module: install it (Debian, Ubuntu: python3-venv)" >&2; exit 2; }
  "$here/.venv/bin/pip" install --quiet "$here" >&2
  echo "$venv"
}

run() { # print a command; run it unless --dry-run
  printf '+ %s\n' "$*"
  if [[ -z $dry_run ]]; then "$@"; fi
}

[[ ${1:-} == --help || ${1:-} == -h ]] && { usage; exit 0; }
job=${1:-} dry_run=${2:-}
case "$job/$dry_run" in
  demo/ | cifar10/ | cifar100/ | demo/--dry-run | cifar10/--dry-run | cifar100/--dry-run) ;;
  *) usage >&2; exit 2 ;;
esac
if [[ -n $dry_run ]]; then python=${PYTHON:-python3}; else python=${PYTHON:-$(find_python)}; fi
runs=${RUNS:-runs}

if [[ $job == demo ]]; then
  run "$python" "$here/greg.py" demo --runs "$runs/demo"
  exit 0
fi

[[ $job == cifar10 ]] && number=1 || number=2
read -ra archs <<<"${ARCHS:-}"
read -ra methods <<<"${METHODS:-}"
read -ra seeds <<<"${SEEDS:-0 1 2}"
read -ra ood <<<"${OOD:-}"
read -ra extra <<<"${EXTRA:-}"
options=(--runs "$runs" --root "${ROOT:-data}" --seeds "${seeds[@]}")
[[ -z ${ID:-} ]] || options+=(--id "$ID")
[[ -z ${AUX:-} ]] || options+=(--aux "$AUX")
[[ -z ${DOWNLOAD:-} ]] || options+=(--download)
[[ ${#archs[@]} -eq 0 ]] || options+=(--archs "${archs[@]}")
[[ ${#methods[@]} -eq 0 ]] || options+=(--methods "${methods[@]}")
[[ ${#ood[@]} -eq 0 ]] || options+=(--ood "${ood[@]}")
run "$python" "$here/greg.py" table "$number" "${options[@]}" ${extra[@]+"${extra[@]}"}
