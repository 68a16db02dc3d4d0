"""What a training step of Idefics2 costs (`cost`), counted as that of Idefics3, with its gated MLP and perceiver as a
resampler."""
