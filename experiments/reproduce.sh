#!/usr/bin/env bash
# Re-makes rows of the results table from scratch: compress the float model, export, evaluate both.
# Usage: experiments/reproduce.sh MODEL_FOLDER "TEST_DATA..." [ROW...]      without rows: all that lack
#   experiments/reproduce.sh experiments/an4 ../shared/an4 int8 structured_30
# MODEL_FOLDER holds the float model.pt. Results go to MODEL_FOLDER/ROW_pt.json and ROW_onnx.json,
# models to MODEL_FOLDER/ROW/. A row that is named is made again, whatever is there.
# Fine-tuning takes as many epochs as suit AN4's 42 minutes; EPOCHS_DIVISOR=5 takes a fifth of
# them, at least one, which suits some hours of speech. FINE_TUNE_DATA=FILE fine-tunes on this data
# instead of what the model was trained on.
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
if [ $# -lt 2 ]; then
    sed -n '2,/^set/{/^set/d;s/^# \?//p}' "$0" >&2
    exit 2
fi
folder=$1 test_data=$2
shift 2

tuned() { # EPOCHS [more flags]
    local divisor=${EPOCHS_DIVISOR:-1}
    echo --fine_tune_epochs $((($1 + divisor - 1) / divisor)) \
        ${FINE_TUNE_DATA:+--fine_tune_data "$FINE_TUNE_DATA"} "${@:2}"
}

flags() { # the settings of a row
    case $1 in
        fp16 | int8 | int4) echo --method quantization --precision "$1" ;;
        int4_qat) echo --method quantization --precision int4 "$(tuned 5)" ;;
        int2_qat) echo --method quantization --precision int2 \
            "$(tuned 20 --fine_tune_learning_rate 3e-4)" ;;
        ternary_qat) echo --method quantization --precision ternary \
            "$(tuned 20 --fine_tune_learning_rate 3e-4)" ;;
        unstructured_30) echo --method pruning --sparsity 0.3 --importance taylor ;;
        unstructured_50) echo --method pruning --sparsity 0.5 --importance taylor \
            "$(tuned 5 --fine_tune_learning_rate 1e-4 --hint_weight 10)" ;;
        structured_30) echo --method pruning --pruning_type structured --sparsity 0.3 \
            --importance taylor "$(tuned 20 --fine_tune_learning_rate 6e-4 --hint_weight 10)" ;;
        low_rank) echo --method factorization --size_ratio 2.2 --activation_aware \
            "$(tuned 20 --fine_tune_learning_rate 6e-4 --hint_weight 10)" ;;
        clustering_256) echo --method clustering --num_clusters 256 ;;
        clustering_16) echo --method clustering --num_clusters 16 --codebooks 16 \
            --activation_aware "$(tuned 5)" ;;
        pruned_50_int8) echo --method quantization --precision int8 ;; # of unstructured_50
        *) echo "$0: no row is named $1; see the list in this file" >&2 && exit 2 ;;
    esac
}

measure() { # NAME MODEL [more flags]
    # shellcheck disable=SC2086
    python evaluate.py --model_path "$2" --test_data $test_data --no_texts \
        --output_file "$folder/$1.json" "${@:3}"
}

make_row() {
    local row=$1 from=$folder settings
    settings=$(flags "$row")
    if [ "$row" = pruned_50_int8 ]; then
        from=$folder/unstructured_50
        [ -e "$from/model.pt" ] || make_row unstructured_50
    fi
    echo "== $row"
    # shellcheck disable=SC2086
    python compress.py $settings --model_path "$from/model.pt" --output_dir "$folder/$row"
    python scripts/export_onnx.py --model_path "$folder/$row/model.pt" \
        --output_path "$folder/$row/model.onnx"
    measure "${row}_pt" "$folder/$row/model.pt" --compare "$folder/float_pt.json"
    measure "${row}_onnx" "$folder/$row/model.onnx" --compare "$folder/${row}_pt.json"
}

if [ ! -e "$folder/model.pt" ]; then
    echo "$folder/model.pt: no such model; train it first, see experiments/README.md" >&2
    exit 2
fi
if [ ! -e "$folder/model.onnx" ] || [ ! -e "$folder/float_onnx.json" ]; then
    python scripts/export_onnx.py --model_path "$folder/model.pt" --output_path "$folder/model.onnx"
    measure float_pt "$folder/model.pt"
    measure float_onnx "$folder/model.onnx" --compare "$folder/float_pt.json"
fi
if [ $# -gt 0 ]; then
    for row in "$@"; do flags "$row" >/dev/null; done
    for row in "$@"; do make_row "$row"; done
    exit
fi
for row in fp16 int8 int4 clustering_256 clustering_16 int4_qat int2_qat ternary_qat unstructured_30 \
    unstructured_50 pruned_50_int8 structured_30 low_rank; do
    if [ -e "$folder/$row/model.onnx" ] && [ -e "$folder/${row}_onnx.json" ]; then
        echo "== $row is there already; name it to make it again"
    else
        make_row "$row"
    fi
done
