"""Define language models, their configs and their training state as pytrees, and lay them out on devices."""

import os

# transformers would warn at every start that torch is missing; nothing here needs torch.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
