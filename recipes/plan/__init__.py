"""What a run will be, take and cost, told before anyone pays: `python -m recipes.plan YAML [key=value ...]`."""
