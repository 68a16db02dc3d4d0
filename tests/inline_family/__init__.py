"""A family whose images are tokens of the text, on transformers' Idefics3: proof that the seam carries one.

Images are cut into tiles of 32 pixels, up to 2 x 3 of them and one that shows the whole. A tile has 4 states.
"""
