# Steps of a script that makes reference runs; sourced. The script sets STEPS and defines words_of.
#
# A step is one command of the harness. One that reaches LIMIT_SECONDS is interrupted, and so is the
# script (exit status 75): run it again, and it goes on where it was. RESULTS/.done/STEP names the
# folder of a step that is done.

PYTHON=${PYTHON:-python}
LIMIT_SECONDS=${LIMIT_SECONDS:-570}
read -r -a more <<< "${WORDS:-}"

run_steps() {  # the steps named, or all of them
  local steps=("$@") step
  [ ${#steps[@]} -gt 0 ] || steps=("${STEPS[@]}")
  for step in "${steps[@]}"; do
    [[ " ${STEPS[*]} " == *" $step "* ]] || {
      echo "$0: $step: no such step; allowed: ${STEPS[*]}" >&2
      exit 2
    }
  done
  mkdir -p "$RESULTS/.done"
  for step in "${steps[@]}"; do run_step "$step"; done
}

run_step() {
  local step=$1 status=0 said="$RESULTS/.done/$1.txt"
  if [ -e "$RESULTS/.done/$step" ]; then
    echo "== $step: done"
    return
  fi
  words=()
  words_of "$step"
  if [ ${#words[@]} -eq 0 ]; then
    echo "== $step: left out"
    return
  fi
  echo "== $step: $PYTHON -m harness ${words[*]} ${more[*]-}"
  timeout --foreground --signal=INT --kill-after=30 "$LIMIT_SECONDS" \
    "$PYTHON" -m harness "${words[@]}" ${more[@]+"${more[@]}"} > >(tee "$said") || status=$?
  case $status in
    0) ;;
    124 | 130 | 137) echo "== $step: not done after $LIMIT_SECONDS s; run again to resume"; exit 75 ;;
    *) echo "== $step: exit status $status" >&2; exit "$status" ;;
  esac
  local folder
  folder=$(sed -n 's/^results  \(.*[^ )]\)\( (resumed.*)\)\{0,1\}$/\1/p' "$said" | head -1)
  "$PYTHON" -m harness.report "$folder" > /dev/null
  "$PYTHON" -m harness.check "$folder" || echo "== $folder: a check failed" >&2
  mv "$said" "$RESULTS/.done/$step"
  echo "$folder" > "$RESULTS/.done/$step"
}
