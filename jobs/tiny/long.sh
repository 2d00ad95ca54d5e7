#!/bin/sh
# The runs behind README's table: dual and single at equal compute, three training seeds each, then the evaluation.
# About three quarters of an hour on two idle CPU cores; every part goes on where it stopped. One worker per run: two runs side by side
# use two cores better than two workers of one run, and the numbers are the same.
set -eu
python jobs/prepare.py --config jobs/tiny/prepare.yaml
run() {
  python jobs/distill.py --config "jobs/tiny/$1.yaml" seed="$3" output="runs/long/$2-$3" scale.num_workers=1 \
    semantic.micro_batch=32 detail.micro_batch=32 save_every=200 "$4" detail.num_steps=800
}
for seed in 7 8 9; do
  run distill dual "$seed" semantic.num_steps=2400 &
  run single single "$seed" semantic.num_steps=3400
  wait $!
done
python jobs/evaluate.py --config jobs/tiny/long.yaml --update-readme
