"""The commands, one file each: text to frozen configs to one call."""
