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

attempt() { # a name for failed.txt, then a command: one that fails must not end the others
    local name=$1
    shift
    "$@" || echo "$name failed" | tee -a "$out/failed.txt"
}

bench() { # a name, then flags of train.py
    local name=$1
    shift
    attempt "$name" "$python" -m extras.benchmark --synthetic --seconds 5 \
        --json "$out/speed_$name.json" "$@"
}

recipe() { # a name, epochs of masks (four masks an image), minutes
    local name=$1 steps=$(($2 * 45000 / 256)) minutes=$3 run=$out/$1
    local more=(--preset cifar10 --batch-size 64 --predictor 96x2x2 --crop-scale .6 1
        --context-size 16 --lr 1.5e-3 --lr-start 1.5e-4 --lr-final 1e-5 --weight-decay .05
        --weight-decay-final .05 --clip-grad 3 --max-steps "$steps" --epochs 100000
        --held-out 5000)
    [ -f "$run/checkpoint.pt" ] && more=(--resume)
    # A run that is told to stop saves itself.
    attempt "$name" timeout -s TERM "${minutes}m" "$python" -m extras.recipe --masks-per-image 4 \
        "${more[@]}" --out "$run"
    [ -f "$run/checkpoint.pt" ] && attempt "$name-evaluate" "$python" evaluate.py "$run"
}

case $part in
check)
    for precision in auto fp32; do
        run=$out/check-$precision
        attempt "train $precision" "$python" train.py --device cuda --precision $precision \
            --max-steps 200 --out "$run"
        attempt "resume $precision" "$python" train.py --resume --override --max-steps 300 \
            --out "$run"
        attempt "evaluate $precision" "$python" evaluate.py "$run" --train-images 2000
        attempt "draw $precision" "$python" predict_and_visualize.py "$run"
    done
    ;;
tests)
    attempt tests "$python" -m pytest tests/test_gpu.py -q
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
esac
