#!/usr/bin/env bash
# One H200: every run of results/reference that one GPU can make, one command, from an empty folder.
#
#   bash results/reference/run_h200.sh                 all steps that are not done yet: about 20 minutes
#   bash results/reference/run_h200.sh report qwen3    two of them
#
# Resumable, a step at a time (steps.sh). The most telling come first; `claims` judges what the others
# left. The engines themselves start where SGLANG and VLLM name their Pythons (docs/REPRODUCE.md).
#
#   HARDWARE=scale_model bash .../run_h200.sh          the same without a GPU, at 1:192
set -euo pipefail

CONTEXT=${CONTEXT:-10M}
HARDWARE=${HARDWARE:-auto}
RESULTS=${RESULTS:-results/runs/h200}
SGLANG=${SGLANG:-}
VLLM=${VLLM:-}

STEPS=(
  report qwen3_30b_a3b scout nccl root_cause requests_128 remedies waste mem_fraction
  repeats fragmentation granularity precision ballast real_engines claims
)

words_of() {  # the command line of a step; none where it cannot be taken here
  local both='strategy=static,paged' one_size=(sweep.brackets=false)
  case $1 in
    report | qwen3_30b_a3b) words=(-m "$both" model="$1" context="$CONTEXT") ;;
    scout)
      words=(strategy=paged model=llama4_scout model.hybrid=true context="$CONTEXT" "${one_size[@]}"
        "sweep.contexts=[1M,$CONTEXT]" experiment.name=scout) ;;
    nccl)
      [ "$HARDWARE" != scale_model ] || return 0
      # One of 8 ranks, alone in its group: its collectives go through NCCL.
      words=(strategy=paged parallel=tp parallel.processes=1 parallel.backend=nccl
        context=100K "sweep.contexts=[100K]" "${one_size[@]}" experiment.name=nccl) ;;
    requests_128)  # the most with which SGLang starts there, and so the most that graphs cost
      words=(-m strategy=sglang model=qwen3_30b_a3b strategy.max_running_requests=128
        strategy.disable_cuda_graph=false,true context="$CONTEXT" "sweep.points=[1.0]"
        "${one_size[@]}" fill=0 trial.timing=false experiment.name=requests_128) ;;
    ballast)  # a device of 24 GiB: the driver refuses beside memory that is held and never touched
      words=(-m "$both" hardware.capacity=24GiB context=1M "sweep.contexts=[1M]" fill=0
        trial.timing=false experiment.name=ballast) ;;
    repeats)  # how far a speed repeats, and what compare decides of each length
      words=(-m "$both" context="$CONTEXT" "sweep.contexts=[1M,5M]" sweep.repeats=3 fill=1
        "${one_size[@]}" experiment.name=repeats) ;;
    root_cause) words=(experiment=root_cause context="$CONTEXT") ;;
    real_engines)
      [ -n "$SGLANG$VLLM" ] || return 0
      words=(experiment=real_engines ${SGLANG:+engine.sglang.python="$SGLANG"}
        ${VLLM:+engine.vllm.python="$VLLM"}) ;;
    claims) words=(experiment=claims "claims.from=[$(folders_done)]") ;;
    *) words=(experiment="$1") ;;
  esac
  words+=(hardware="$HARDWARE" results="$RESULTS")
}

folders_done() {  # of every other step that is done, with commas between
  local step
  for step in "${STEPS[@]}"; do
    [ "$step" = claims ] || cat "$RESULTS/.done/$step" 2> /dev/null || true
  done | paste -sd,
}

# shellcheck source=results/reference/steps.sh
source "$(dirname "${BASH_SOURCE[0]}")/steps.sh"
run_steps "$@"
