"""Next-scale prediction transformers: layers, conditioning, heads, masks, caches."""
