"""From raw files to the samples of a mixture's sources, prepared once and read by memory map. No tensors, no model.

raw file ─formats─> row ─datasets─> Sample ─store─> tables ─truncate, encoded_arrays─> token ids ─sources─> batches

formats/          published file formats as rows, in bounded memory
datasets/         one file a dataset: row -> Sample
store/            prepared datasets on disk
truncate          what does not fit a pack: shortened, split or left out
encoded_arrays    the token ids of a store as flat arrays
validation_split  what is held out of training
orders            seeded permutations of the samples of a source
prepared_source   one source of a mixture: what the planner asks of it
reader            samples and pixels, read by their place
sources           all sources of a mixture, on one side of what is held out
prepare           all of it for a recipe; check_recipe: whether what it names is there
statistics        what a store holds; export: the same for other toolkits
"""
