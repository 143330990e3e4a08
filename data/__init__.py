"""From bytes on a disk to uint8 batches."""
