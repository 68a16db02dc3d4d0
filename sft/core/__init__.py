"""What every other folder stands on: the nouns, errors, files, images, processes. Imports nothing of `sft` outside it.

sample       Sample, EncodedSample, PlacedSample, Pack, Batch: what flows through the toolkit
errors       the two ways to fail on purpose; contain: work whose failure must not end what runs around it
files        files that are written whole or not at all
file_lock    one process at a time in a folder
images       images from untrusted files, opened and checked
parallel     a map over several processes, a prefetching thread
launch       starting several processes that work together
distributed  which of them this one is, what they tell each other, how work is assigned
precision    number formats of the computation
shipped      files that travel with the toolkit
"""
