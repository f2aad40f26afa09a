#!/usr/bin/env bash
# What needs a GPU, each part one call of at most ten minutes, in order of worth.
#
#   bench/gpu.sh check FOLDER                        does it run at all: train, resume, evaluate, draw
#   bench/gpu.sh tests FOLDER                        tests/test_gpu.py
#   bench/gpu.sh speed FOLDER                        images/s, FLOPs, memory of every preset
#   bench/gpu.sh recipe FOLDER [MINUTES]             the recipe on CIFAR-10, 100 epochs of masks
#   bench/gpu.sh recipe-long FOLDER [MINUTES]        300 epochs; both resume what was stopped
#   bench/gpu.sh vit-base FOLDER                     seconds an epoch of stl10-vit-base
#   bench/gpu.sh peers FOLDER OFFICIAL HOMEMADE      the official step next to ours; their folders
#   bench/gpu.sh --dry FOLDER                        all but peers, tiny and on the CPU (minutes)
#
# What it finds is written to FOLDER as it comes. recipe reads CIFAR-10 from data/.
set -u
if [ $# -lt 2 ]; then
    echo "error: expected a part (see the first lines of $0) and a folder" >&2
    exit 2
fi
part=$1 out=$(mkdir -p "$2" && cd "$2" && pwd)
shift 2
cd "$(dirname "$0")/.."
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)
parts=("$part") device=cuda seconds=5 steps=200 more_steps=300 failed=0 tiny=() few=()
if [ "$part" = --dry ]; then
    parts=(check tests speed recipe recipe-long vit-base) device=cpu seconds=.05 steps=4 more_steps=6
    tiny=(--device cpu --encoder 16x1x2 --predictor 8x1x2 --batch-size 8 --accumulation 1)
    few=(--device cpu --test-images 100)
    export TEST_GPU_DEVICE=cpu TORCH_COMPILE_DISABLE=1
fi

attempt() { # a name for failed.txt, then a command: one that fails must not end the others
    local name=$1
    shift
    "$@" && return
    echo "$name failed" | tee -a "$out/failed.txt"
    failed=1
}

bench() { # a name, then flags of train.py
    local name=$1
    shift
    attempt "$name" "$python" -m extras.benchmark --synthetic --seconds $seconds \
        --json "$out/speed_$name.json" "$@" "${tiny[@]}"
}

recipe() { # a name, epochs of masks (four masks an image), minutes
    local name=$1 steps=$(($2 * 45000 / 256)) minutes=$3 run=$out/$1
    local more=(--preset cifar10 --batch-size 64 --predictor 96x2x2 --crop-scale .6 1
        --context-size 16 --lr 1.5e-3 --lr-start 1.5e-4 --lr-final 1e-5 --weight-decay .05
        --weight-decay-final .05 --clip-grad 3 --max-steps "$steps" --epochs 100000
        --held-out 5000)
    [ $device = cpu ] && more+=(--dataset shapes "${tiny[@]}" --max-steps 4 --held-out 100)
    [ -f "$run/checkpoint.pt" ] && more=(--resume)
    # A run that is told to stop saves itself.
    attempt "$name" timeout -s TERM "${minutes}m" "$python" -m extras.recipe --masks-per-image 4 \
        "${more[@]}" --out "$run"
    [ -f "$run/checkpoint.pt" ] && attempt "$name-evaluate" "$python" evaluate.py "$run" "${few[@]}"
}

for part in "${parts[@]}"; do case $part in
check)
    for precision in auto fp32; do
        run=$out/check-$precision
        attempt "train $precision" "$python" train.py --device $device --precision $precision \
            --max-steps $steps --out "$run" "${tiny[@]}"
        attempt "resume $precision" "$python" train.py --resume --override \
            --max-steps $more_steps --out "$run"
        attempt "evaluate $precision" "$python" evaluate.py "$run" --train-images 2000 "${few[@]}"
        attempt "draw $precision" "$python" predict_and_visualize.py "$run" --device $device \
            --images 500
    done
    ;;
tests)
    attempt tests "$python" -m pytest tests/test_gpu.py -q -rs
    ;;
speed)
    for preset in cifar10 stl10 stl10-vit-base shapes shapes3d medmnist3d; do
        bench "$preset" --preset "$preset"
        bench "$preset-compiled" --preset "$preset" --compile
    done
    bench stl10-vit-base-256 --preset stl10-vit-base --batch-size 256 --accumulation 1
    bench imagenet-vit-huge-16 --preset imagenet-vit-huge --batch-size 16 --accumulation 1
    ;;
recipe)
    recipe recipe-100 100 "${1:-8}"
    ;;
recipe-long)
    recipe recipe-300 300 "${1:-8}"
    ;;
vit-base)
    bench stl10-vit-base-compiled --preset stl10-vit-base --compile
    bench stl10-vit-base --preset stl10-vit-base
    ;;
peers)
    attempt peers "$python" bench/peers.py --official "$1" --homemade "$2" --steps 20 \
        --json "$out/peers.json"
    ;;
*)
    echo "error: $part is unknown; see the first lines of $0" >&2
    exit 2
    ;;
esac; done
exit $failed
