"""Top-1 and top-5 of a checkpoint on a folder of images: counting, and showing."""
