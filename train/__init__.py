"""Training of every stage: one loop (`train.loop.run`), one objective a stage, entry points for `accelerate launch`."""
