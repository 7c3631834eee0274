"""Model and state as pytrees, devices, files in and out."""

import os

# transformers would remark at every start that torch is missing; nothing here needs it.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
