"""Watching a run: `build_watchers` in build.py creates it all, figures.py computes what the others show and write."""
