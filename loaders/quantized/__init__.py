"""Checkpoints in safetensors whose matrices have few bits: how each library stores them, and what they stand for."""
