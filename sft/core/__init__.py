"""What every other folder stands on: the nouns, errors, files, images, processes. Imports nothing of `sft` outside it.

sample       Sample, EncodedSample, PlacedSample, Pack, Batch: what flows through the toolkit
errors       the two ways to fail on purpose
files        files that are whole or not there; file_lock: one process at a time in a folder
images       images that nobody vouches for, opened and checked
parallel     work in several processes or a thread, results in order
distributed  processes that train together: which one this is, starting them, what they tell each other
precision    what is computed in
shipped      files that travel with the toolkit
"""
