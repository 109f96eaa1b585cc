#!/usr/bin/env bash
# Size and speed of every compressed form of the `small` preset: what depends on shapes alone, so
# the weights are random and nothing is fine-tuned. WER is in an4/ and librispeech/.
# Usage: experiments/measure_small.sh [results folder, default experiments/small] [preset]
# One run of interleaved rounds in ONNX Runtime, one thread, 10 s of audio: speed.json; sizes.json.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
out=${1:-experiments/small} preset=${2:-small}
work=runs/measure_$preset
mkdir -p "$out" "$work/float"

python - "$work/float/model.pt" "$preset" <<'PYTHON'
import sys
from pathlib import Path
from experiments.measure_compressing import save_random_model
save_random_model(Path(sys.argv[1]), sys.argv[2])
PYTHON

compress() { # ROW FROM FLAGS...
    python compress.py --model_path "$work/$2/model.pt" --output_dir "$work/$1" "${@:3}" >/dev/null
}
compress fp16 float --method quantization --precision fp16
compress int8 float --method quantization --precision int8
compress int4 float --method quantization --precision int4
compress int2 float --method quantization --precision int2
compress ternary float --method quantization --precision ternary
compress unstructured_30 float --method pruning --sparsity 0.3
compress unstructured_50 float --method pruning --sparsity 0.5
compress structured_30 float --method pruning --pruning_type structured --sparsity 0.3
compress low_rank float --method factorization --size_ratio 2.2
compress clustering_256 float --method clustering --num_clusters 256
compress clustering_16 float --method clustering --num_clusters 16 --codebooks 16
compress pruned_50_int8 unstructured_50 --method quantization --precision int8

models=()
for row in float fp16 int8 int4 int2 ternary unstructured_30 unstructured_50 structured_30 low_rank \
    clustering_256 clustering_16 pruned_50_int8; do
    python scripts/export_onnx.py \
        --model_path "$work/$row/model.pt" --output_path "$work/$row/model.onnx" >/dev/null
    models+=("$work/$row/model.onnx")
done
python - "$work" "$out/sizes.json" "$preset" <<'PYTHON'
import sys
from pathlib import Path
from asr.runtime.files import write_json
from asr.measure.machine import describe_machine
from asr.common.provenance import commit
rows = {p.parent.name: p.stat().st_size for p in sorted(Path(sys.argv[1]).glob("*/model.pt"))}
ratios = {name: round(rows["float"] / size, 3) for name, size in rows.items()}
command = "experiments/measure_small.sh"
write_json(sys.argv[2], {"command": command, "commit": commit(), "seed": 0, "preset": sys.argv[3],
                         "pt_bytes": rows, "smaller": ratios, "machine": describe_machine()})
PYTHON
python scripts/benchmark.py infer --threads 1 --rounds 30 --model_path "${models[@]}" \
    --output_path "$out/speed.json"
