"""What a run leaves on disk, for all that write or read it: the command line, training, evaluation, reports.

names       what RECIPE, RUN and MODEL on the command line stand for
status      run.json: how far a run is
checkpoint  complete checkpoints only
"""
