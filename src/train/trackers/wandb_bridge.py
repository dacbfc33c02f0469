"""Lines of JSON on standard input to a run of Weights & Biases: the first describes the run."""

import json
import sys

import wandb

first = json.loads(sys.stdin.readline())
run = wandb.init(dir=first["dir"], name=first["name"], config=first["config"])
for line in sys.stdin:
    message = json.loads(line)
    # Steps of the trainer are an axis of their own: a resumed run may tell some again.
    run.log({**message["figures"], "step": message["step"]})
run.finish()
