"""Lines of JSON on standard input to a run of Weights & Biases.

The first line describes the run, the last one says that it is over; without that one the run failed.
"""

import json
import os
import sys
from pathlib import Path

import wandb

first = json.loads(sys.stdin.readline())
# Under the trainer's own name, so that a run that goes on is the same run there.
identity = Path(first["dir"], "wandb", "run-id")
resumed = identity.read_text().strip() if first["goes_on"] and identity.exists() else None
# What the user has said by the client's own variables comes first.
run = wandb.init(
    dir=None if os.environ.get("WANDB_DIR") else first["dir"],
    name=None if os.environ.get("WANDB_NAME") else first["name"],
    config=first["config"],
    id=resumed,
    resume="allow" if resumed else None,
    settings=wandb.Settings(console="off"),
)
identity.parent.mkdir(parents=True, exist_ok=True)
identity.write_text(run.id)
# Steps of the trainer are an axis of their own: a resumed run may tell some again.
run.define_metric("step")
run.define_metric("*", step_metric="step")
is_over = False
for line in sys.stdin:
    message = json.loads(line)
    if is_over := message.get("over", False):
        break
    run.log({**message["figures"], "step": message["step"]})
run.finish(exit_code=0 if is_over else 1)
