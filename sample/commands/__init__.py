"""The commands that draw: their options, the jobs they describe, and the page. What they call knows nothing of them."""
