"""How long tests wait for what is sure to come: as long as a slow and busy machine may need."""

import time

# Seconds until a wait counts as one for nothing; where a test passes, they cost nothing.
# pytest's own timeout, which ends a test that hangs, is longer.
LONG = 300.0


def until(condition, seconds=LONG):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to that"
        time.sleep(0.01)
