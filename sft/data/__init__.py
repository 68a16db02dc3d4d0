"""From raw files to the samples of a mixture's sources, prepared once and memory-mapped. No tensors, no model.

raw file ─formats─> row ─datasets─> Sample ─store─> tables ─truncate, encoded_arrays─> token ids ─sources─> batches

formats/          readers of published file formats, in bounded memory
datasets/         one file a dataset: row -> Sample
store/            prepared datasets on disk
truncate          samples that do not fit a pack: shortened, split or left out
encoded_arrays    the token ids of a store, as flat arrays
prepare           all of this for a recipe; check_recipe: whether the files that it names are there
validation_split  what is held out of training
orders            seeded permutations of the samples of a source
prepared_source   one source of a mixture: sizes and images of its samples
sources           all sources of a mixture, without what is held out, or only that
reader            samples and image bytes, by their location
recognise         which adapter reads a folder of one's own data; new_recipe: a recipe for it
statistics        what a store holds; export: a store as parquet for other toolkits
"""
