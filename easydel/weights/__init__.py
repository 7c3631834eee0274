"""Model folders and files: Hugging Face, GGUF, PEFT, tokenizers."""
