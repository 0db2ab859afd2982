"""A stranger's job for the tests, on the standard library: sums up numbers, slowly.

    counting_job.py OUT TOTAL [EVERY]       options by environment variables
"""
import json
import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import checkpointing  # noqa: E402

out, total, every = sys.argv[1], int(sys.argv[2]), int((sys.argv[3:] or [10])[0])
pause = float(os.environ.get("PAUSE", 0))          # seconds a step
hang_at = int(os.environ.get("HANG_AT", -1))       # a step that never ends
fail_at = int(os.environ.get("FAIL_AT", -1))
more = json.loads(os.environ.get("RUN_OPTIONS", "{}"))
settings = json.loads(os.environ.get("SETTINGS", "{}"))

with checkpointing.Run(out, total, every=every, suffix=".json", settings=settings, **more) as run:
    values = run.load([], read=json.load)
    for i in run.steps(write=lambda file: file.write(json.dumps(values).encode())):
        if i == hang_at:
            time.sleep(3600)
        if i == fail_at:
            raise ValueError(f"step {i} is wrong\nin two lines")
        time.sleep(pause)
        values.append(i * i)
