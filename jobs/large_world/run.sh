#!/bin/sh
# The small world at 64x64 pixels: codec, judge, teacher, latents, both experts, the baseline, the evaluation.
#   sh jobs/large_world/run.sh        one large GPU: reckoned at an hour on an H200 with 16 cores, not run yet
#   sh jobs/large_world/run.sh toy    the same on two CPU cores in a few minutes, with networks and steps of no use
# Every part goes on where it stopped.
set -euf
out=runs/large_world
codec='' judge='' teacher='' prepare='' distill='' single='' evaluate=''
case "${1:-full}" in
full) ;;
toy)
  out=runs/large_world_toy
  here='device=cpu precision=fp32 threads=1'
  codec="$here codec_width=16 num_clips=96 num_steps=240 batch=16 learning_rate=4e-3 save_every=80"
  judge="$here num_clips=96 num_steps=30 batch=16 save_every=10"
  teacher="$here num_layers=2 num_heads=4 dim_head=32 ffn_dim=256 num_clips=192 num_steps=240 batch=16 save_every=80
    learning_rate=2e-3 muon_rate=4e-3"
  prepare='source.num_clips=96 decode.num_actors=1 encode.batch_size=16 encode.gpus_per_actor=0
    cluster.num_cpus=2 cluster.object_store_mib=200'
  local='engine.precision=fp32 scale.use_gpu=false scale.cpus_per_worker=0.5 scale.threads_per_worker=1
    semantic.global_batch=8 semantic.micro_batch=8 semantic.optimizer.warmup_steps=2 save_every=10 report_every=5'
  distill="$local semantic.num_steps=20 detail.num_steps=10 detail.global_batch=8 detail.micro_batch=8
    detail.optimizer.warmup_steps=2"
  single="$local semantic.num_steps=30"
  evaluate='num_clips=8 reference_clips=64 batch_size=8 num_draws=40 threads=1 teacher_steps=[8,4,2,1]
    latency.rounds=1 latency.threads=1 pictures.captions=4'
  ;;
*)
  echo "usage: sh jobs/large_world/run.sh [toy]" >&2
  exit 2
  ;;
esac
networks=$out/networks
# A job, its settings, and what differs from them.
job() {
  name=$1 settings=$2
  shift 2
  python "jobs/$name.py" --config "jobs/large_world/$settings.yaml" "$@"
}
job pretrain codec output=$networks $codec
job pretrain judge output=$networks $judge
job pretrain teacher output=$networks $teacher
job prepare prepare output=$out/latents source.path=$out/world encode.codec=$networks/codec $prepare
trained="teacher=$networks/teacher codec=$networks/codec data=$out/latents"
job distill distill $trained output=$out/dual $distill
job distill single $trained output=$out/single $single
job evaluate evaluate output=$out/evaluation teacher=$networks/teacher codec=$networks/codec judge=$networks/judge \
  "students.dual=[$out/dual/student]" "students.single=[$out/single/student]" \
  metrics.dual=$out/dual/metrics.jsonl metrics.single=$out/single/metrics.jsonl $evaluate
