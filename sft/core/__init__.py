"""What every other folder uses: records, errors, files, images, processes. Imports nothing of `sft` outside itself.

Sample ─encode─> EncodedSample ─locate─> PlacedSample ─pack─> Pack ─collate─> Batch        all defined in `sample`

sample       the records that flow through the toolkit, with the meaning and shape of each field
errors       UserError for a mistake of the user, RunError for a failure of the work
contain      runs work whose failure must not end what runs around it
files        files that are written whole or not at all
file_lock    one process at a time in a folder
image_formats  what Pillow leaves open: orientation, a JPEG without its end, HEIC
images       images from untrusted files, checked before they are decoded
metric       what a score measures and how it is printed
parallel     a map over several processes; a thread that prefetches
launch       starts several processes that work together
distributed  which of these processes this one is; sums and checks over all of them
precision    the number format of the computation
shipped      files that are installed with the toolkit: recipes, chat templates, the small base
"""
