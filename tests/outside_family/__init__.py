"""A family outside the tree, in the parts of Idefics3: proof that the toolkit takes one by its dotted name."""
