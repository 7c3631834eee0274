"""A model's tokenizer: its files checked, loaded and saved."""
