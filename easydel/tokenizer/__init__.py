"""Check, load and save the files of a model's tokenizer."""
