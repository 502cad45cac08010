#!/usr/bin/env bash
# Everything that a CUDA device is to show, in some six minutes: tests, a whole search, throughput, memory, a profile.
# (An estimate: on an H200 the steps were run one by one.)
#
#   bash benchmarks/gpu.sh                    all steps
#   bash benchmarks/gpu.sh tests profile      some of: versions tests search again throughput large cifar memory profile
#   DEVICE=cpu bash benchmarks/gpu.sh         the same in small, to try the script
#
# DEVICE (cuda), OUT (gpu_out: logs and JSON), PYTHON (python3). Wheels in .whl/, if there are any, are installed first, into
# a folder of their own: for a machine without a package registry. The last lines of the output sum up all steps.
set -u
cd "$(dirname "$0")/.."
DEVICE=${DEVICE:-cuda}; OUT=${OUT:-gpu_out}; PYTHON=${PYTHON:-python3}
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
mkdir -p "$OUT"; rm -f "$OUT/summary.txt"
export PYTHONPATH=$PWD PYTHONUNBUFFERED=1 MPLCONFIGDIR=$work
if compgen -G ".whl/*.whl" >/dev/null; then
  "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$work/site" .whl/*.whl || exit 1
  PYTHONPATH=$PWD:$work/site
fi
steps=" ${*:-versions tests search again throughput large cifar memory profile} "; failures=0

# step NAME SECONDS PATTERN COMMAND…: runs a command and prints its end; lines with the pattern go into the summary.
step() {
  local name=$1 limit=$2 pattern=$3 start=$SECONDS status head; shift 3
  timeout --kill-after=5 "$limit" "$@" >"$OUT/$name.log" 2>&1 </dev/null; status=$?
  [ $status = 0 ] || failures=$((failures + 1))
  head="== $name: rc $status, $((SECONDS - start)) s"
  echo "$head"; tail -n 40 "$OUT/$name.log"
  { echo "$head"
    if [ $status = 0 ]; then grep -E -- "$pattern" "$OUT/$name.log"; else tail -n 6 "$OUT/$name.log"; fi | cut -c1-150 | tail -n 14
  } >>"$OUT/summary.txt"
}
chosen() { [[ $steps == *" $1 "* ]]; }

if [ "${DEVICE%%:*}" = cpu ]; then
  small=(--rows 1 4 --seconds 0.1 --repeats 1 --samples 64); large=(--models net --rows 2 "${small[@]:2}")
  precisions=("bf16" "bf16 --channels-last"); profiled=(--rows 4 --samples 64)
  memory=(--samples 32 --most 2); profiled_bf16=(--models net "${profiled[@]}"); cifar=(--samples 32 --epochs 2 --trials 2 --group 2)
else
  small=(--rows 1 8 32 64 --seconds 0.5 --repeats 2)
  large=(--models resnet18 --rows 1 8 --seconds 0.5 --repeats 1 --samples 512)
  precisions=("fp32" "tf32" "bf16" "bf16 --channels-last"); profiled=(--rows 32)
  memory=(); profiled_bf16=(--models resnet18 --rows 8 --samples 1024)
  cifar=(--samples 5000 --epochs 4 --trials 50 --group 25 --precision bf16)
fi

chosen versions && step versions 60 . "$PYTHON" -W ignore -c '
import sys, torch, torchvision, optuna, mlflow
print(*(f"{m.__name__} {m.__version__}" for m in (torch, torchvision, optuna, mlflow)), "Python", sys.version.split()[0])
if sys.argv[1] != "cpu":
    about = torch.cuda.get_device_properties(sys.argv[1])
    print(f"{about.name}, capability {about.major}.{about.minor}, {about.total_memory / 2**30:.1f} GiB,",
          f"CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
' "$DEVICE"

# Other versions of libraries may warn of what is to change; the tests are about the device.
chosen tests && step tests 120 'passed|failed|skipped|^(FAILED|ERROR)' "$PYTHON" -m pytest -m gpu -q --tb=long \
  -p no:cacheprovider -o addopts= -o filterwarnings=default tests/test_gpu.py

chosen search && step search 120 '^(best  |real)|better than|50/50|test/' \
  bash -c 'time "$@"' - "$PYTHON" -m pipeline.search --trials 50 --root "$work/root" --study gpu --device "$DEVICE"
chosen again && step again 60 'epoch  20/20|^[a-df-z]' \
  "$PYTHON" -m pipeline.train "$work/root/mlruns/studies/gpu/best.yaml" --out "$work/model.pt" --device "$DEVICE"

chosen throughput && step throughput 120 '^(peak|RATIOS)|end with|do not fit' \
  "$PYTHON" benchmarks/throughput.py --device "$DEVICE" --models mlp cnn net "${small[@]}" --json "$OUT/throughput.json"
for options in "${precisions[@]}"; do
  name=large-${options/ --channels-last/-channels-last}
  # shellcheck disable=SC2086
  chosen large && step "$name" 45 '^RATIOS|end with|do not fit' \
    "$PYTHON" benchmarks/throughput.py --device "$DEVICE" --precision $options "${large[@]}" --json "$OUT/$name.json"
done

chosen cifar && step cifar 75 '^(complete|search|images|TFLOP|memory)' \
  "$PYTHON" benchmarks/cifar_search.py --device "$DEVICE" "${cifar[@]}"

figures='^(per training step|rows|steps|epoch_ms|step|launches|graph|sync|kernels|busy|first|gaps|allocated|reserved)'
chosen memory && step memory 60 'predicted|epoch|rows|memory' \
  "$PYTHON" benchmarks/gpu_memory.py --device "$DEVICE" "${memory[@]}"

chosen profile && step profile 60 "$figures" \
  "$PYTHON" benchmarks/gpu_profile.py --device "$DEVICE" "${profiled[@]}" --json "$OUT/profile.json"
chosen profile && step profile-eager 60 "$figures" \
  "$PYTHON" benchmarks/gpu_profile.py --device "$DEVICE" "${profiled[@]}" --eager --json "$OUT/profile-eager.json"
chosen profile && step profile-bf16 45 "$figures" \
  "$PYTHON" benchmarks/gpu_profile.py --device "$DEVICE" --precision bf16 "${profiled_bf16[@]}" --json "$OUT/profile-bf16.json"

echo; echo "==== all steps, $SECONDS s, of which $failures failed; logs and JSON in $OUT"
cat "$OUT/summary.txt"
exit $((failures > 0))
