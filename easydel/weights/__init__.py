"""Read and write model files: Hugging Face folders, GGUF files and PEFT adapters."""
