"""`python -m recipes.plan`: what a run takes and costs, before it starts."""
