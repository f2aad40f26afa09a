#!/usr/bin/env bash
# Every figure that needs a GPU. Each part fits into ten minutes on an H200; what is measured is written as it comes.
#
#   bench/gpu.sh speed FOLDER [OFFICIAL HOMEMADE]   images/s, FLOPs, memory of every preset; beside checkouts of the two peers
#   bench/gpu.sh recipe FOLDER                      what each lever of the cifar10 preset is worth, 20 epochs each
#   bench/gpu.sh budgets FOLDER [flags of train.py] what half a minute to ten minutes of the cifar10 preset reach
#
# FOLDER receives the JSON files and tables. `recipe` and `budgets` read CIFAR-10 from data/.
set -u
part=$1 out=$(mkdir -p "$2" && cd "$2" && pwd)
shift 2
cd "$(dirname "$0")/.."
python=$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)

bench() { # name, then flags
    name=$1
    shift
    "$python" -m extras.benchmark --synthetic --seconds 5 --json "$out/speed_$name.json" "$@" || echo "$name: failed" | tee -a "$out/failed.txt"
}

case $part in
speed)
    for preset in shapes cifar10 cifar10-peer stl10 medmnist3d; do
        bench "$preset" --preset "$preset"
        bench "$preset-compiled" --preset "$preset" --compile
    done
    bench stl10-vit-base --preset stl10-vit-base
    bench stl10-vit-base-compiled --preset stl10-vit-base --compile
    bench stl10-vit-base-256 --preset stl10-vit-base --batch-size 256 --accumulation 1
    bench stl10-vit-base-256-recompute --preset stl10-vit-base --batch-size 256 --accumulation 1 --recompute
    bench imagenet-vit-huge-16 --preset imagenet-vit-huge --batch-size 16 --accumulation 1
    bench imagenet-vit-huge-64-recompute --preset imagenet-vit-huge --batch-size 64 --accumulation 1 --recompute
    if [ $# -eq 2 ]; then
        "$python" bench/peers.py --official "$1" --homemade "$2" --steps 20 --json "$out/peers_gpu.json" || echo "peers: failed" | tee -a "$out/failed.txt"
    fi
    ;;
recipe)
    "$python" -m extras.experiments recipe --preset cifar10 --epochs 20 --measurements 0 --jobs 6 --note "JPEG copy of CIFAR-10." "$@"
    cp results/recipe_cifar10.* "$out"
    ;;
budgets)
    "$python" -m extras.experiments budgets --preset cifar10 --measurements 0 --labels 0 --note "JPEG copy of CIFAR-10." "$@"
    cp results/budgets_cifar10.* "$out"
    cp runs/experiments/budgets_cifar10-10-min-0/encoder.pt "$out/encoder_10_min.pt"  # to be shipped: pretrained.pack
    ;;
*)
    echo "error: $part is none of speed, recipe, budgets" >&2
    exit 2
    ;;
esac
