"""The files of a run, for everything that writes or reads them: the command line, training, evaluation, reports.

names       what RECIPE, RUN and MODEL on the command line stand for
status      run.json: how far a run is
checkpoint  checkpoints that are complete or not there
"""
