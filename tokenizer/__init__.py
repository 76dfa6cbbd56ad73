"""Images to token pyramids and back: scale schedules, multi-scale residual quantisers, the tokenizer model."""
