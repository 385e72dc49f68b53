#!/usr/bin/env bash
# The report's machine: every experiment on 8 x H200, one command, from an empty folder.
#
#   bash results/reference/run_8xh200.sh                  all steps that are not done yet
#   bash results/reference/run_8xh200.sh scaling_report   one step
#
# Resumable, a step at a time (steps.sh). NVLink multicast stays as the environment has it.
#
#   RANKS=2 HARDWARE=scale_model WORDS="hardware.capacity=8GiB ..." bash .../run_8xh200.sh
#   RANKS=1 WORDS="parallel.backend=nccl" bash .../run_8xh200.sh      one GPU, talking to itself
set -euo pipefail

RANKS=${RANKS:-8}                  # ranks that run; the model is shaped for 8
CONTEXT=${CONTEXT:-10M}
HARDWARE=${HARDWARE:-auto}
RESULTS=${RESULTS:-results/runs/8xh200}

STEPS=(
  tp_headline_report tp_headline_qwen3 tp_headline_llama4 tp_root_cause tp_claims
  scaling_report scaling_qwen3 context_report context_qwen3 context_llama4
)

words_of() {  # the command line of a step
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
  esac
  words+=(context="$CONTEXT" hardware="$HARDWARE" results="$RESULTS")
  case $1 in
    scaling_*) ;;                  # its arms say how many ranks run
    context_*) words+=(parallel.processes="$RANKS" experiment.name="$1") ;;
    tp_*) words+=(parallel=tp parallel.processes="$RANKS") ;;
  esac
}

# shellcheck source=results/reference/steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
run_steps "$@"
