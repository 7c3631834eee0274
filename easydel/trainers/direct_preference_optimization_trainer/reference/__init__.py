"""The reference model and its log-probs: computed, cached, and looked up."""
