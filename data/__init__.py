"""From image files to uint8 batches."""
