"""Saving, finding, verifying and resuming: what is on disk or in a bucket is data, complete, and checked.

A run uses it so, on every process:

    places = Places.of(folder, runs_folder, run_name)
    identity = Identity.of(config, world_size)
    with Owner(places, run_name) as owner:        # around all that follows
    resume = find_resume(places=places, identity=identity, algorithms=..., ...)   # before the Trainer
    if resume.finished: ...                       # nothing is left to train; see `settle`
    interrupt = Interrupt()
    checkpoints = build_checkpoints(places=places, identity=identity, owner=owner, resume=resume, ...)
    trainer = Trainer(callbacks=[..., checkpoints], spin_dataloaders=False)   # and no load_path: `before_load` restores
    interrupt.install()                           # after the Trainer, whose import installs handlers too
    trainer.fit()                                 # raises Interrupted, whose `status` is the exit status
    return checkpoints.finish()                   # the exit status

A checkpoint is `ep003-ba000123.safetensors` (format.py) with `ep003-ba000123.json` beside it, the manifest, without
which it does not count.
"""
