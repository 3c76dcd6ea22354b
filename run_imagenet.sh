#!/usr/bin/env bash
# Table 3 of the paper: ten classes of ImageNet as ID data, the other 990 as auxiliary data.
# Run the same command again to go on after a stop, however it came: finished runs are skipped.
set -euo pipefail
shopt -s inherit_errexit 2>/dev/null || true # bash 4.4
here=$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

usage() {
  cat <<EOT
usage: run_imagenet.sh [--dry-run]

  Trains and evaluates every row of Table 3 on DenseNet-121, with three seeds.
  --dry-run  print the command and its runs, each for one process; run nothing, link nothing

Environment variables and their defaults:
  IMAGENET   ROOT/imagenet   folder with train/WNID/*.JPEG and val/WNID/*.JPEG
  CLASSES    the authors' ten; or names with commas
  GPUS       1               processes of torchrun, which share batches of 64: a divisor of that
  PYTHON     a Python with torch; .venv is made beside this script if none is found
  ARCHS      densenet121
  METHODS    every training method of the table, such as "energy greg+"
  SEEDS      "0 1 2"
  OOD        "inaturalist sun places textures"; or name=path, separated by commas or else blanks
  ROOT       data            folder of the data sets
  RUNS       runs            folder of the results
  WORKERS    4               decoding processes for each GPU, of ID and as many of auxiliary images
  DOWNLOAD   empty           1: fetch the OOD sets and torchvision's DenseNet-121 where absent
  EXTRA      empty           further options of "greg.py table", such as "--amp", or on one GPU
                             "--channels-last --cuda-graph"

examples:
  IMAGENET=/data/imagenet DOWNLOAD=1 EXTRA=--amp bash run_imagenet.sh
  IMAGENET=/data/imagenet GPUS=8 WORKERS=8 EXTRA="--amp --sync-bn" bash run_imagenet.sh
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

[[ ${1:-} == --help || ${1:-} == -h ]] && { usage; exit 0; }
dry_run=${1:-} root=${ROOT:-data} gpus=${GPUS:-1}
[[ $# -le 1 && $dry_run =~ ^(--dry-run)?$ && $gpus =~ ^[1-9][0-9]*$ ]] || { usage >&2; exit 2; }
if [[ -n ${IMAGENET:-} && -z $dry_run && ! $IMAGENET -ef $root/imagenet ]]; then
  [[ -d $IMAGENET ]] || { echo "IMAGENET=$IMAGENET is no folder" >&2; exit 2; }
  [[ ! -e $root/imagenet || -L $root/imagenet ]] || {
    echo "$root/imagenet is another folder than IMAGENET=$IMAGENET: name another ROOT" >&2; exit 2; }
  mkdir -p "$root"
  ln -sfn "$(realpath "$IMAGENET")" "$root/imagenet"
fi
python=${PYTHON:-$(find_python)}

words archs "${ARCHS:-}"
words methods "${METHODS:-}"
words seeds "${SEEDS:-0 1 2}"
if [[ ${OOD:-} == *,* ]]; then IFS=$',\n' words ood "$OOD"; else words ood "${OOD:-}"; fi
words extra "${EXTRA:-}"
launch=("$python")
[[ $gpus == 1 ]] || launch+=(-m torch.distributed.run --standalone --nproc_per_node="$gpus")
options=(--runs "${RUNS:-runs}" --root "$root" --seeds "${seeds[@]}" --workers "${WORKERS:-4}")
[[ -z ${CLASSES:-} ]] || options+=(--id "imagenet:$CLASSES")
[[ ${DOWNLOAD:-} != 1 ]] || options+=(--download)
[[ ${#archs[@]} -eq 0 ]] || options+=(--archs "${archs[@]}")
[[ ${#methods[@]} -eq 0 ]] || options+=(--methods "${methods[@]}")
[[ ${#ood[@]} -eq 0 ]] || options+=(--ood "${ood[@]}")
command=("${launch[@]}" "$here/greg.py" table 3 "${options[@]}" ${extra[@]+"${extra[@]}"})
has_torch='from importlib.util import find_spec; assert find_spec("torch")'
if [[ -n $dry_run ]] && "$python" -c "$has_torch" 2>/dev/null
then "$python" "$here/greg.py" table 3 "${options[@]}" ${extra[@]+"${extra[@]}"} --dry-run; fi
printf '+%s\n' "$(printf ' %q' "${command[@]}")"
# glibc returns large blocks to the system as soon as they are free, and every step on a CPU waits for
# fresh pages. Both variables are needed for it to keep them.
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_--1}
[[ -n $dry_run ]] || "${command[@]}"
