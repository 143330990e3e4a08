"""report.html: one page about a run, or several side by side, from what they left in their folders; without torch."""
