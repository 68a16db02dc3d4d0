"""The files of a run, for everything that writes or reads them: the command line, training, evaluation, reports.

RECIPE, RUN, MODEL ─names─> folder ─status─> run.json
                                   ─checkpoint─> checkpoints/checkpoint-<step>/ and its state/

names       which folder or recipe a name on the command line stands for
status      run.json: how many steps are done, and how the run ended
checkpoint  checkpoints are staged, hashed and renamed once, so only complete ones are found
"""
