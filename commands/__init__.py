"""The commands, one file each: options to configs, then one call of the engine."""
