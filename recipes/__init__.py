"""A run: its config, and from the config a Composer Trainer."""
