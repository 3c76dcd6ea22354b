#!/usr/bin/env bash
# Tables 1, 2, 4, 5 and 6 of the paper (CIFAR-10, CIFAR-100), or a demonstration on built-in images.
# Run the same command again to go on after a stop: finished runs are skipped.
set -euo pipefail
shopt -s inherit_errexit 2>/dev/null || true # bash 4.4
here=$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<EOT
usage: run_cifar.sh demo | cifar10 | cifar100 | 4 | 5 | 6 [--dry-run]

  demo       a few minutes on two CPU cores: pre-train, fine-tune and tabulate on built-in images
  cifar10    Table 1: every method, three networks, three seeds
  cifar100   Table 2, likewise
  4, 5, 6    Tables 4 (gradient term), 5 (sampling) and 6 (ID accuracy)
  --dry-run  print the command, and of a table its runs, and run nothing

Environment variables and their defaults (demo takes PYTHON, SEEDS and RUNS alone):
  PYTHON     a Python with torch; .venv is made beside this script if none is found
  ARCHS      the table's "resnet18 wrn40_2 densenet100"
  METHODS    every training method of the table, such as "energy greg"
  SEEDS      "0 1 2" (demo: 0)
  ID, AUX    the CIFAR set and random300k; or paths of your own data
  OOD        the paper's six sets; or names and name=path, separated by commas or else by blanks
  ROOT       data            folder of the data sets
  RUNS       runs            folder of the results
  DOWNLOAD   empty           1: fetch the data sets that are absent
  EXTRA      empty           further options of "greg.py table", such as "--amp", or on a GPU
                             "--channels-last --cuda-graph" (an H100: half a DenseNet step)

examples:
  bash run_cifar.sh demo
  SEEDS=0 ARCHS=wrn40_2 METHODS="energy greg" DOWNLOAD=1 bash run_cifar.sh cifar10
EOT
}

words() { read -d "" -ra "$1" <<<"$2" || true; } # a variable's words, on however many lines

find_python() { # a Python with torch: ours, the system's, or a new environment
  local venv=$here/.venv/bin/python candidate
  local needs='import sys, torch.nn.attention, torchvision, numpy, tqdm, matplotlib, scipy; assert sys.version_info >= (3, 10)'
  for candidate in "$venv" python3 python; do
    if command -v "$candidate" >/dev/null && "$candidate" -c "$needs" 2>/dev/null
    then echo "$candidate"; return; fi
  done
  [[ -z $dry_run ]] || { echo "No Python with torch here to tell the runs" >&2; echo python3; return; }
  python3 -c 'import sys; assert sys.version_info >= (3, 10)' 2>/dev/null || {
    echo "no python3 of version 3.10 or later here: install one, or name it in PYTHON" >&2; exit 2; }
  echo "No Python with torch here: installing into $here/.venv (some GB, once)" >&2
  python3 -m venv "$here/.venv" >&2 || {
    echo "python3 has no venv module: install it (Debian, Ubuntu: python3-venv)" >&2; exit 2; }
  "$here/.venv/bin/pip" install --quiet "$here" >&2
  echo "$venv"
}

run() { # print a command so that it can be pasted; run it unless --dry-run
  printf '+%s\n' "$(printf ' %q' "$@")"
  if [[ -z $dry_run ]]; then "$@"; fi
}

[[ ${1:-} == --help || ${1:-} == -h ]] && { usage; exit 0; }
job=${1:-} dry_run=${2:-}
[[ $job =~ ^(demo|cifar10|cifar100|4|5|6)$ && $dry_run =~ ^(--dry-run)?$ && $# -le 2 ]] || {
  usage >&2; exit 2; }
# glibc returns large blocks to the system as soon as they are free, and every step waits for fresh
# pages: on a CPU up to a third of its time. Both variables are needed for it to keep them.
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_--1}
python=${PYTHON:-$(find_python)}
runs=${RUNS:-runs}

if [[ $job == demo ]]; then
  words seeds "${SEEDS:-0}"
  run "$python" "$here/greg.py" demo --runs "$runs" --seeds "${seeds[@]}"
  exit 0
fi

case $job in cifar10) number=1 ;; cifar100) number=2 ;; *) number=$job ;; esac
words archs "${ARCHS:-}"
words methods "${METHODS:-}"
words seeds "${SEEDS:-0 1 2}"
if [[ ${OOD:-} == *,* ]]; then IFS=$',\n' words ood "$OOD"; else words ood "${OOD:-}"; fi
words extra "${EXTRA:-}"
options=(--runs "$runs" --root "${ROOT:-data}" --seeds "${seeds[@]}")
[[ -z ${ID:-} ]] || options+=(--id "$ID")
[[ -z ${AUX:-} ]] || options+=(--aux "$AUX")
[[ ${DOWNLOAD:-} != 1 ]] || options+=(--download)
[[ ${#archs[@]} -eq 0 ]] || options+=(--archs "${archs[@]}")
[[ ${#methods[@]} -eq 0 ]] || options+=(--methods "${methods[@]}")
[[ ${#ood[@]} -eq 0 ]] || options+=(--ood "${ood[@]}")
has_torch='from importlib.util import find_spec; assert find_spec("torch")'
if [[ -n $dry_run ]] && "$python" -c "$has_torch" 2>/dev/null
then "$python" "$here/greg.py" table "$number" "${options[@]}" ${extra[@]+"${extra[@]}"} --dry-run; fi
run "$python" "$here/greg.py" table "$number" "${options[@]}" ${extra[@]+"${extra[@]}"}
