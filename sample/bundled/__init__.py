"""The model that comes with the package, in `save_pretrained` layout: `load_pipeline("scenes")` reads it."""
