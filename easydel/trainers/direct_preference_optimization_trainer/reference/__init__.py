"""Log-probs of the reference model: computed, kept, and looked up."""
