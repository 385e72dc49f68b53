#!/usr/bin/env bash
# The report's machine: every experiment on 8 x H200, one command, from an empty folder.
#
#   bash results/reference/run_8xh200.sh               all steps that are not done yet
#   bash results/reference/run_8xh200.sh scaling       one step
#
# A step that reaches LIMIT_SECONDS is interrupted, and so is the script (exit status 75): run it
# again, and it goes on where it was. NVLink multicast stays as the environment has it.
#
#   RANKS=2 HARDWARE=scale_model WORDS="hardware.capacity=8GiB ..." bash .../run_8xh200.sh
#   RANKS=1 WORDS="parallel.backend=nccl" bash .../run_8xh200.sh      one GPU, talking to itself
set -euo pipefail

RANKS=${RANKS:-8}                  # ranks that run; the model is shaped for 8
CONTEXT=${CONTEXT:-10M}
HARDWARE=${HARDWARE:-auto}
RESULTS=${RESULTS:-results/runs/8xh200}
PYTHON=${PYTHON:-python}
LIMIT_SECONDS=${LIMIT_SECONDS:-570}
read -r -a more <<< "${WORDS:-}"

STEPS=(
  tp_headline_report tp_headline_qwen3 tp_headline_llama4 tp_root_cause tp_claims
  scaling_report scaling_qwen3 context_report context_qwen3 context_llama4
)

words_of() {  # the command line of a step, a word a line
  local both='strategy=static,paged'
  local scout=(model=llama4_scout model.hybrid=true)
  case $1 in
    tp_headline_report) words=(experiment=headline model=report) ;;
    tp_headline_qwen3) words=(experiment=headline model=qwen3_30b_a3b) ;;
    tp_headline_llama4) words=(-m "$both" "${scout[@]}" experiment.name=headline_llama4) ;;
    tp_root_cause) words=(experiment=root_cause) ;;
    tp_claims) words=(experiment=claims) ;;
    scaling_report) words=(experiment=scaling model=report) ;;
    scaling_qwen3) words=(experiment=scaling model=qwen3_30b_a3b) ;;
    context_report) words=(-m "$both" parallel=context model=report) ;;
    context_qwen3) words=(-m "$both" parallel=context model=qwen3_30b_a3b) ;;
    context_llama4) words=(-m "$both" parallel=context "${scout[@]}") ;;
    *) echo "run_8xh200: $1: no such step; allowed: ${STEPS[*]}" >&2; exit 2 ;;
  esac
  words+=(context="$CONTEXT" hardware="$HARDWARE" results="$RESULTS")
  case $1 in
    scaling_*) ;;                  # its arms say how many ranks run
    context_*) words+=(parallel.processes="$RANKS" experiment.name="$1") ;;
    tp_*) words+=(parallel=tp parallel.processes="$RANKS") ;;
  esac
}

mkdir -p "$RESULTS/.done"
steps=("$@")
[ ${#steps[@]} -gt 0 ] || steps=("${STEPS[@]}")
for step in "${steps[@]}"; do
  words_of "$step"
  if [ -e "$RESULTS/.done/$step" ]; then
    echo "== $step: done"
    continue
  fi
  echo "== $step: $PYTHON -m harness ${words[*]} ${more[*]-}"
  status=0
  timeout --signal=INT --kill-after=30 "$LIMIT_SECONDS" \
    "$PYTHON" -m harness "${words[@]}" ${more[@]+"${more[@]}"} || status=$?
  case $status in
    0) touch "$RESULTS/.done/$step" ;;
    124 | 130 | 137) echo "== $step: not done after $LIMIT_SECONDS s; run again to resume"; exit 75 ;;
    *) echo "== $step: exit status $status" >&2; exit "$status" ;;
  esac
done

for manifest in "$RESULTS"/*/*/manifest.json; do
  folder=$(dirname "$manifest")
  "$PYTHON" -m harness.report "$folder" > /dev/null
  "$PYTHON" -m harness.check "$folder" || echo "== $folder: a check failed" >&2
done
