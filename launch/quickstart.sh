#!/usr/bin/env bash
# Stage one and stage two on the embedded images: did pretraining help? A folder for the results may follow.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/environment.sh
environment ""

out="${1:-}"
if [ -z "$out" ]; then
  n=1
  while [ -e "$(printf 'runs/quickstart-%03d' "$n")" ]; do n=$((n + 1)); done
  out="$(printf 'runs/quickstart-%03d' "$n")"
fi

echo "== stage one: learn a backbone from 7,000 images, without reading a label"
ssl-pipeline pretrain recipe=quickstart_pretrain output="$out/pretrain"
echo
echo "== stage two: 10 labels a class, five seeds, four ways"
ssl-pipeline study recipe=quickstart_study "encoders.pretrained='$out/pretrain'" output="$out/study"
echo
echo "written to $out:"
echo "  pretrain/encoder.safetensors, pretrain/card.json   the backbone, and what it is"
echo "  pretrain/metrics.jsonl                             stage one's figures"
echo "  study/study.json, study.png                        the table above, and its picture"
echo "  study/models/pretrained_lp_ft_10/model.safetensors a model: try"
echo "      ssl-pipeline predict $out/study/models/pretrained_lp_ft_10 IMAGES…"
