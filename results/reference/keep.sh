#!/usr/bin/env bash
# What the steps of a script left becomes reference runs: bash keep.sh results/runs/h200 h200
#
# Copies the folder of every step that is done to results/reference/PREFIX_STEP, less what is drawn
# again by `python -m harness.report` and what only resuming needs. Afterwards, at a clean commit:
# `python -m harness experiment=claims claims.from=[...]`, `python -m harness.pages README.md`, and
# the notebooks.
set -euo pipefail

RESULTS=${1:?the folder that RESULTS named}
PREFIX=${2:?what the names begin with}
here=$(dirname "${BASH_SOURCE[0]}")

for step in "$RESULTS"/.done/*; do
  [[ $step != *.txt ]] || continue
  from=$(cat "$step")
  to=$here/${PREFIX}_$(basename "$step")
  rm -rf "$to"
  cp -r "$from" "$to"
  rm -rf "$to"/{.lock,.trial,logs,report.html,run.bib} "$to"/*.tex
  echo "$to"
done
