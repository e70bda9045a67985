"""The switch, read when the module is imported."""

import os

VLLM_BATCH_INVARIANT = os.environ.get("FAKE_VLLM") != "ignores-the-switch" and bool(
    int(os.environ.get("VLLM_BATCH_INVARIANT", "0"))
)
