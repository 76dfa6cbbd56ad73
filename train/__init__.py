"""Training of every stage: one loop (`train.loop.run`), one objective per stage, entry points for `accelerate launch`."""
