"""What each technique of a recipe is worth: taken from the recipe, and added to the baseline that has none."""
