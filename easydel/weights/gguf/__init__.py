"""Read llama.cpp's ``.gguf`` model files as if they were Hugging Face folders."""
