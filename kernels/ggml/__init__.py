"""Quantized weights as GGUF files hold them (ggml's ``ggml-quants.c``), for every backend."""
