"""Saving, finding, verifying and resuming: what is on disk or in a bucket is data, complete, and checked.

A run uses it so, on every process:

    places = Places.of(folder, runs_folder, run_name)
    identity = Identity.of(config, world_size)
    with Owner(places, run_name) as owner:        # around all that follows
        resume = find_resume(config, places, identity, algorithms)      # before the Trainer
        if resume.finished: ...                                         # nothing is left to train; `upload_finished`
        interrupt = Interrupt()
        checkpoints = CheckpointManager(config, places=places, resume=resume, ...)
        trainer = Trainer(callbacks=[..., checkpoints])                 # no load_path: `before_load` restores
        interrupt.install()                       # after the Trainer, whose import installs handlers too
        trainer.fit()                             # raises Interrupted, whose `status` is the exit status
        return checkpoints.finish()               # the exit status

Modules: store.py (folder, bucket), manifest.py (what a checkpoint is there), format.py (its bytes), find.py (the newest
good one), resume.py, save.py, upload.py, claim.py (one owner), interrupt.py.
"""
