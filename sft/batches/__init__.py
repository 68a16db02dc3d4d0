"""From the sources of a mixture to micro-batches: which sample next, into which pack, to which process.

sources ─mixture─> samples ─packing, pack_stream─> packs ─steps─> micro-batches ─data_loader, collate─> Batch

source_stream   one source: the order of its samples, where it stands, what it gives next
mixture         exact shares: which source gives the next sample
packing         samples -> packs under two caps
pack_stream     the endless, resumable stream of packs
steps           the packs of a step, assigned to processes
collate         packs -> Batch: the only place where tensors are made
data_loader     batches by worker processes; feature_cache: what a frozen tower makes of images, kept
mixture_report  what a mixture will be; mixture_counts: what its packs hold; declared_sizes: sources without data
inspect_pack    one pack as the model sees it
"""
