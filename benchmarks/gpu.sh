#!/usr/bin/env bash
# Everything one wants from half an hour of a GPU, in order of worth: tests, passes, speed, lanes, losses, peers, accuracy.
#
#   benchmarks/gpu.sh [OUT] [--data folder:DIR] [--mdistiller DIR] [--repdistiller DIR] [--torchdistill DIR]
#
# Runs from a checkout, without a network, with the `python` on PATH. A part that was done is not done again, and
# one that fails or takes too long does not keep the others from running; the same command goes on with what is left.
# Tables and logs lie in OUT (default: $OUT, else gpu-results); they are printed last.
#
#   SKIP=tests,peers   leaves parts out
#   QUICK=1            small settings that prove the script, on a CPU too; its numbers are worth nothing
#   WHEELS=DIR         installs the wheels of a folder first
#   MINUTES=8          the most that a part may take
#   EPOCHS=15          of the teacher and of each student in the accuracy run
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")

out=${OUT:-gpu-results} data= peers=()
while (($#)); do
  case $1 in
    --data) data=$2; shift 2 ;;
    --mdistiller | --repdistiller | --torchdistill) peers+=("$1" "$(realpath "$2")"); shift 2 ;;
    -*) echo "error: unknown option $1; the first lines of $0 list all" >&2; exit 2 ;;
    *) out=$1; shift ;;
  esac
done
mkdir -p "$out" || exit 2
out=$(realpath "$out")
[[ $data == folder:* ]] && data=folder:$(realpath "${data#folder:}")
cd "$root" || exit 2
export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1 KDZOO_CACHE=${KDZOO_CACHE:-$out/cache}
done_file=$out/done.txt
touch "$done_file"

if [[ -n ${WHEELS:-} ]]; then
  python -m pip install --quiet --no-index --find-links "$WHEELS" "$WHEELS"/*.whl || exit 2
fi
if ! python -c "from kdzoo import registry; raise SystemExit(not registry.names())"; then
  # The methods are found by an entry point, which takes an installation, if only of the checkout itself.
  python -m pip install --quiet --no-index --no-deps --no-build-isolation --editable "$root" || exit 2
fi

# part NAME COMMAND...: runs it, unless it is to be skipped or was done; what it says goes to a log.
part() {
  local name=$1 begun=$SECONDS
  shift
  if [[ ",${SKIP:-}," == *",$name,"* ]]; then echo "$name: skipped"; return; fi
  if grep -qx "$name" "$done_file"; then echo "$name: done before"; return; fi
  timeout --kill-after=20 "${MINUTES:-8}m" "$@" >"$out/$name.log" 2>&1
  local code=$?
  if ((code == 0)); then
    echo "$name" >>"$done_file"
    echo "$name: done in $((SECONDS - begun)) s"
  elif ((code == 124)); then
    echo "$name: stopped after ${MINUTES:-8} minutes; the same command goes on"
  else
    echo "$name: failed ($code), see $out/$name.log:"
    tail -n 5 "$out/$name.log"
  fi
}

quick=${QUICK:-}
passes=() speed=() lanes=() losses=() compared=() pair="resnet32x4, resnet8x4" epochs=${EPOCHS:-15} limits=()
if [[ -n $quick ]]; then
  pair="resnet20, resnet8" epochs=1 limits=(data.limit=512 teacher.allow_weak=true)
  speed=(--pairs resnet20:resnet8 --methods kd uhkd --batches 16 --lanes 1 2 --seconds 1)
  passes=(--teachers resnet20 --students resnet8 --batch-size 8 --rounds 1)
  lanes=(--pairs resnet20:resnet8 --methods kd dkd --steps 1 --rounds 1)
  losses=(--pairs resnet20:resnet8 --methods kd figkd --batch-size 8 --rounds 1)
  compared=(--teacher resnet20 --student resnet8 --batch-size 16 --steps 2 --rounds 1 --warm-up 1 --workers 1)
fi
cat >"$out/accuracy.yaml" <<YAML
data: ${data:-cifar100}
protocol: {name: crd, epochs: $epochs}
pairs: [[$pair]]
distillers: [none, kd, uhkd, figkd, lfcc]
teacher: {epochs: $epochs}
YAML

# Options of setup.cfg ask for pytest-xdist; one GPU serves one process.
part tests python -m pytest -o addopts= --import-mode=importlib -q -rs -p no:cacheprovider -m gpu tests
part passes python "$here/passes.py" --results "$out" "${passes[@]}"
part speed python "$here/speed.py" --results "$out" "${speed[@]}"
part lanes python "$here/lanes.py" --results "$out" "${lanes[@]}"
part losses python "$here/losses.py" --results "$out" "${losses[@]}"
if [[ -n $data && ${#peers[@]} -gt 0 ]]; then
  part peers python "$here/peers.py" --results "$out" --data "$data" "${peers[@]}" "${compared[@]}"
else
  echo "peers: skipped; expected --data and a checkout of another library"
fi
if [[ -n $data ]]; then
  part accuracy python -m kdzoo.cli bench "$out/accuracy.yaml" --out "$out/runs" "${limits[@]}"
  python -m kdzoo.cli table "$out/runs" >"$out/accuracy.md" 2>>"$out/accuracy.log"
else
  echo "accuracy: skipped; expected --data"
fi

for file in tests.log accuracy.md; do
  [[ -s $out/$file ]] && printf '\n== %s\n' "$file" && tail -n 20 "$out/$file"
done
python - "$out" <<'PYTHON'
import sys
from pathlib import Path

import pandas as pd

for file in sorted(Path(sys.argv[1]).glob("*.csv")):
    print(f"\n== {file.name}\n{pd.read_csv(file).to_string(index=False)}")
PYTHON
