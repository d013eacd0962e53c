#!/usr/bin/env bash
# The four scripts of the MambaSWELU plan, as verbs:   bash steps.sh SHAREGPT OPENASSISTANT DOLLY [run.yaml] [SUITE]
# Files may have any shape the data room reads; the shares are those of the plan (90k, 160k and 15k examples).
set -euo pipefail
if [ $# -lt 3 ]; then
  echo "usage: bash steps.sh SHAREGPT OPENASSISTANT DOLLY [run.yaml] [SUITE]" >&2
  exit 2
fi
sharegpt=$1 openassistant=$2 dolly=$3 run=${4:-run.yaml} suite=${5:-}

# 1. prepare: one conversational set with weights, duplicates across the files left out
ftf data mix "$sharegpt=0.34" "$openassistant=0.60" "$dolly=0.06" --out conversations.jsonl --overwrite
ftf data check conversations.jsonl

# 2. finetune: checkpoints every 1,000 steps, test prompts at 5k, 10k, 15k and 20k, as the run file says
ftf lint "$run" --set data.train=conversations.jsonl || test $? -eq 2
ftf train "$run" --set data.train=conversations.jsonl ${suite:+--set evaluation.suite="$suite"}

# 3. compare before and after, and what was forgotten
ftf compare base latest --out comparison.json

# 4. benchmark: perplexity, BLEU and ROUGE, acceptance
ftf evaluate latest ${suite:+--suite "$suite"}
