#!/usr/bin/env bash
# The English model that ships, from public speech and a trained phoneme recogniser: collected speech and
# text, a front that hears as the recogniser does, blocks for characters on top, a language model.
# Usage: scripts/train_english.sh SPEECH LIBRISPEECH OTHER TEXT TEACHER [folder, default runs/english]
#   SPEECH       folders common_voice, librispeech_dev, storybooks, minds14, each with train.json;
#                common_voice_unlabelled is used where it is there
#   LIBRISPEECH  folders train-clean-100, dev-clean, test-clean, test-other
#   OTHER        folders cmu_arctic, kathleen, ljspeech, speechocean762, each with train.json
#   TEXT         sentences for the language model, one a line, without those of the test sets
#   TEACHER      asr_waveform.hama of the wheel hama 1.7.0 (pip download --no-deps hama==1.7.0)
#
# Every stage leaves a file and is passed over when that is there; training goes on where it stopped.
# FAST=1 is a rehearsal of all stages in minutes, with a few hundred utterances.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
[ $# -ge 5 ] || { sed -n 5,10p "$0" >&2; exit 2; }
speech=$1 librispeech=$2 other=$3 text=$4 teacher=$5 out=${6:-runs/english}
run() { printf '\n$ %s\n' "$*"; "$@"; }
minutes=17 epochs=3 half=1 ngrams=1400000
[ -z "${FAST:-}" ] || { minutes=0.5 epochs=2 half=0.02 ngrams=20000; }

[ -e "$out/prepared/dev-clean.json" ] || run python scripts/prepare_data.py --to_wav \
    --data_dir "$speech"/{common_voice,librispeech_dev,storybooks,minds14}/train.json \
    "$other"/{cmu_arctic,kathleen,ljspeech,speechocean762}/train.json \
    "$librispeech"/{train-clean-100,dev-clean} --output_dir "$out/prepared"
[ -e "$out/data/dev-open.json" ] ||
    run python scripts/english_data.py --data_dir "$out/prepared" --output_dir "$out/data"
[ -e "$out/start.pt" ] || run python scripts/teach_front.py --teacher "$teacher" \
    --data_dir "$out/data" --minutes "$minutes" --output_path "$out/start.pt" --report_path "$out/front.json"

# Half of the data an epoch: telephone texts have errors, and three voices read the same sentences
# (cmu_arctic, kathleen). The first epoch trains what is above the front alone.
weights=
for pair in clean-100=0.5 librispeech_dev=0.5 common_voice=0.6 storybooks=0.5 ljspeech=0.5 \
    cmu_arctic=0.2 kathleen=0.2 speechocean762=0.25 minds14=0.15; do
    weights+=${weights:+,}${pair%=*}=$(awk "BEGIN { print ${pair#*=} * $half }")
done
train() {
    run python train.py --resume --epochs "$epochs" --freeze_blocks 4 --batch_seconds 40 \
        --batch_size 32 --sorted_epochs 0 --max_duration 24 --freq_masks 1 --warp 0 --silence 0.2 \
        --reverb 0.08 --babble 0.03 --noise 0.15 --clip 0.03 --telephone 0.08 --codec 0.003 \
        --level 0.2 "$@"
}
train --init_from "$out/start.pt" --data_dir "$out/data" --output_dir "$out/model" --time_masks 2 \
    --corpus_weights "$weights" --freeze_epochs 1 --front_rate 0.3 --learning_rate 1.4e-3 \
    --warmup_steps 150

[ -e "$out/english.lm" ] || run python scripts/build_lm.py --order 3 --prune 0,1,1 \
    --max_ngrams "$ngrams" --text "$text" "$out"/data/train-*.json --output_path "$out/english.lm" \
    --exclude "$out"/data/dev-*.json "$librispeech"/test-{clean,other}

# Texts by the model itself for Common Voice without transcripts, where it is sure, and on with these.
final=model unlabelled=$speech/common_voice_unlabelled/train.json
if [ -e "$unlabelled" ]; then
    [ -e "$out/heard/train-heard.json" ] || run python scripts/label_speech.py \
        --model_path "$out/model/model.pt" --lm "$out/english.lm" --beam_size 8 --min_confidence 0.75 \
        --data_dir "$unlabelled" --output_path "$out/heard/train-heard.json"
    further() {
        train --data_dir "$out/data" "$out/heard/train-heard.json" --learning_rate 8e-4 \
            --warmup_steps 60 --time_masks 1 \
            --corpus_weights "$weights,heard=$(awk "BEGIN { print 0.5 * $half }")" "$@"
    }
    further --init_from "$out/model/model.pt" --output_dir "$out/model_2" --front_rate 0.4
    # The front stays as it is and hears every recording once: epochs of a third of the time.
    further --init_from "$out/model_2/model.pt" --output_dir "$out/model_3" --freeze_epochs "$epochs"
    # Trained on so, it hears better and is surer, also of its mistakes: the mean is best with the
    # language model.
    mkdir -p "$out/mean"
    [ -e "$out/mean/model.pt" ] || run python scripts/average_models.py --model_path \
        "$out"/model_{2,3}/model.pt --output_path "$out/mean/model.pt"
    final=mean
fi
run python experiments/ship_model.py --model_path "$out/$final/model.pt" --output_dir "$out/shipped"
cp "$out/english.lm" "$out/shipped/"
run python scripts/tune_lm.py --model_path "$out/shipped/model_int8.onnx" --lm "$out/english.lm" \
    --dev_data "$out"/data/dev-{clean,open}.json --output_path "$out/tune_lm.json"
for set in "$out"/data/dev-{clean,open}.json "$librispeech"/test-{clean,other}; do
    name=$(basename "$set" .json)
    run python evaluate.py --model_path "$out/shipped/model_int8.onnx" --test_data "$set" \
        --output_path "$out/results/$name.json"
    run python evaluate.py --model_path "$out/shipped/model_int8.onnx" --test_data "$set" \
        --lm "$out/english.lm" --output_path "$out/results/${name}_lm.json"
done
