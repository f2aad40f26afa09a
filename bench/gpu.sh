#!/usr/bin/env bash
# What needs a GPU, written to FOLDER as it comes; `speed` takes about ten minutes on an H200.
#
#   bench/gpu.sh speed FOLDER [OFFICIAL HOMEMADE]   images/s, FLOPs, memory of every preset; with
#                                                   two folders, compared with these public codes
#   bench/gpu.sh recipe FOLDER                      changes of the cifar10 preset, 20 epochs each
#   bench/gpu.sh budgets FOLDER                     what 1 to 100 epochs of cifar10 reach
#
# Further flags of recipe and budgets go to every run. They read CIFAR-10 from data/.
set -u
if [ $# -lt 2 ]; then
    echo "error: expected speed, recipe or budgets, and a folder" >&2
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

case $part in
speed)
    for preset in shapes shapes3d cifar10 stl10 medmnist3d stl10-vit-base; do
        bench "$preset" --preset "$preset"
        bench "$preset-compiled" --preset "$preset" --compile
    done
    bench stl10-vit-base-256 --preset stl10-vit-base --batch-size 256 --accumulation 1
    bench imagenet-vit-huge-16 --preset imagenet-vit-huge --batch-size 16 --accumulation 1
    if [ $# -eq 2 ]; then
        attempt peers "$python" bench/peers.py --official "$1" --homemade "$2" --steps 20 \
            --json "$out/peers.json"
    fi
    ;;
recipe)
    attempt recipe "$python" -m extras.experiments recipe --preset cifar10 --epochs 20 \
        --measurements 0 --jobs 6 "$@"
    cp results/recipe_cifar10.* "$out"
    ;;
budgets)
    attempt budgets "$python" -m extras.experiments budgets --preset cifar10 --measurements 0 "$@"
    cp results/budgets_cifar10.* "$out"
    ;;
*)
    echo "error: $part is unknown, expected speed, recipe or budgets" >&2
    exit 2
    ;;
esac
