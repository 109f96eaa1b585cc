#!/usr/bin/env bash
# The whole job on the built-in corpus: prepare, train, compress, export, evaluate, transcribe.
# Training starts from the English model that ships: from nothing, minutes are too few.
# Usage: scripts/demo.sh [folder for the results, default runs/demo]
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
out=${1:-runs/demo}
run() { printf '\n$ %s\n' "$*"; "$@"; }

if [ -e "$out" ] && [ "$out" != runs/demo ] && [ ! -e "$out/.demo" ]; then
    echo "$out: is there already and not of an earlier demo; name another folder" >&2
    exit 2
fi
rm -rf "$out"
mkdir -p "$out"
touch "$out/.demo" # the next demo may replace the folder
run python scripts/prepare_data.py --to_wav --output_dir "$out/data" \
    --data_dir data/mini/train.json data/mini/dev.json data/mini/test.json
run python train.py --config experiments/recipes/demo.json \
    --data_dir "$out/data" --output_dir "$out/baseline"
run python compress.py --method quantization --precision int8 \
    --model_path "$out/baseline/model.pt" --output_dir "$out/int8"
for name in baseline int8; do
    run python scripts/export_onnx.py --model_path "$out/$name/model.pt" --output_path "$out/$name/model.onnx"
done
for model in baseline/model.pt baseline/model.onnx int8/model.onnx; do
    result=${model/\/model./_} # baseline_pt, baseline_onnx, int8_onnx
    run python evaluate.py --model_path "$out/$model" --test_data "$out/data/test.json" \
        --output_file "$out/results/$result.json"
done
run python scripts/report.py "$out/results"

sample=test/af_bella/0000.opus
printf '\nWhat was said in data/mini/%s:\n' $sample
sed -n "s|.*\"$sample\".*\"text\": \"\([^\"]*\)\".*|\1|p" data/mini/test.json
printf '\nWhat the fine-tuned model hears, as int8:'
run python transcribe.py --audio_path data/mini/$sample --model_path "$out/int8/model.onnx"
printf '\nWhat the English model that ships hears:'
run python transcribe.py --audio_path data/mini/$sample
