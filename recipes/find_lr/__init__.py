"""`python -m recipes.find_lr YAML`: a learning-rate range test over the run's own pipeline.

Smith 2017, "Cyclical Learning Rates for Training Neural Networks", section 3.3, with the exponential ramp that fastai
made usual.
"""
