"""llama.cpp's model files, read as if they were Hugging Face folders."""
