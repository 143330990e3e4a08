"""What the commands' pages and pictures share: one HTML page that works offline, and one style of chart."""
