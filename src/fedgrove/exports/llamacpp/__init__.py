"""What llama.cpp makes of a GGUF file, for the export ``gguf``: rotary positions and the vocabulary."""
