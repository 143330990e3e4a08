"""Saving, finding, verifying and resuming: a checkpoint on disk or in a bucket is data, complete, and verified.

Every process of a run uses it like this:

    interrupt = Interrupt()
    interrupt.install()                           # after importing Composer, which installs handlers too
    places = Places.of(folder, runs_folder, run_name)
    identity = Identity.of(config, world_size, train_images, classes)
    with Owner(places, run_name) as owner:        # around all that follows
        resume = find_resume(config, places, identity)                  # before the Trainer
        if resume.finished: ...                                         # nothing left to train; `upload_finished`
        checkpoints = CheckpointManager(config, places=places, resume=resume, interrupt=interrupt, ...)
        trainer = Trainer(callbacks=[..., checkpoints])                 # no load_path: `before_load` restores
        trainer.fit()                             # raises Interrupted, whose `status` is the exit status
        return checkpoints.finish()               # the exit status

Modules: store.py (folder, bucket), manifest.py (a checkpoint's files), format.py (their bytes), find.py (the
newest good one), resume.py (where a run resumes), save.py, upload.py, claim.py (one owner), interrupt.py.
"""
