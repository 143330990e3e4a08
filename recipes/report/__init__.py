"""report.html: one page about a run, or several side by side, from what they left in their folders.

`read.py` reads a folder and says what of it is missing or damaged; the rest turns that into sections of a page. Nothing
here imports torch, so that `python -m recipes.report` answers quickly.
"""
