"""A trained network for use outside this project: weights, programs, preprocessing, class names and a model card."""
