#!/bin/sh
# Open question 3, memory: what every layout needs from 125M to 175B parameters, predicted from shapes alone (no
# weights, no GPU), one JSON object per line:
#
#   sh experiments/open_questions/scaling/memory.sh [options of lit-rlhf memory] > memory.jsonl
set -eu
shapes=$(cd "$(dirname "$0")" && pwd)/shapes
for model in opt-125m opt-1.3b opt-6.7b \
  "random:$shapes/opt_13b" "random:$shapes/opt_30b" "random:$shapes/opt_66b" "random:$shapes/opt_175b"; do
  lit-rlhf memory --model "$model" --lora_rank 128 --gradient_checkpointing true --json true "$@"
done
