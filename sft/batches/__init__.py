"""From the sources of a mixture to micro-batches: which sample is next, in which pack, on which process.

sources ─mixture─> samples ─packing, pack_stream─> packs ─steps─> micro-batches ─data_loader, collate─> Batch

source_stream   one source: the order of its samples, and how far it is
mixture         exact shares: how much each source gives to a window
packing         samples -> packs, under a cap on tokens and one on images
pack_stream     the endless, resumable stream of packs, planned a window at a time
steps           the packs of a step, assigned to processes by cost
data_loader     a plan of packs -> a batch; workers: batches that are made by worker processes
collate         packs -> Batch: the only place where tensors are made
image_source    where collate gets the tiles of an image
feature_cache   the output of a frozen vision tower, cached on disk
mixture_report  what a mixture will be; mixture_counts: what its packs hold
look_ahead      what a training will draw, and the step at which it ends
declared_sizes  sources of declared sizes, to plan a mixture without its data
inspect_pack    one pack as the model sees it
"""
