#!/bin/sh
# The main job on the networks in the package: who runs with whose attention, how far MiTA's two
# sizes can be moved after training, and whether its experts are clusters. Ends with a report.
set -eu
MITASWAP=${MITASWAP:-.venv/bin/mitaswap} OUT=${OUT:-runs/demo} REPORT=${REPORT:-runs/demo/report}
LIMIT=${LIMIT:-400} KEYS=${KEYS:-4,9,16,25,49} EXPERTS=${EXPERTS:-4,9,16,25,49}
DATA="digit-scenes"

"$MITASWAP" eval embedded:standard embedded:linear embedded:agent embedded:mita \
  --data "$DATA" --limit "$LIMIT" --run standard,linear,agent,mita -b 32 -o "$OUT/matrix"
"$MITASWAP" eval embedded:mita embedded:standard --data "$DATA" --limit "$LIMIT" \
  --grid "K=$KEYS" --grid "N=$EXPERTS" --stats overlap -b 32 -o "$OUT/grid"
"$MITASWAP" report "$OUT/matrix" "$OUT/grid" -o "$REPORT"
