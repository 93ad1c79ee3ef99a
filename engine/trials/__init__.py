"""What is tried on an engine: its speed, its memory, its retrieval. Nothing of the engine imports this."""
