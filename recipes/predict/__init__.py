"""What a trained network sees in images: from files, folders and standard input."""
