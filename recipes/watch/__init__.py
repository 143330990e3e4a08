"""Watching a run: `build_watchers` in build.py makes all of it, figures.py computes what the others show and write."""
