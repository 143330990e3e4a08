"""`python -m recipes.find_lr`: a learning-rate range test over the run's own pipeline."""
