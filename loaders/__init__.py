"""Weights, configuration and tokenizer of a model, from whatever files it comes in."""
