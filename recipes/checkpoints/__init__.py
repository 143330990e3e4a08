"""Saving, finding, verifying and resuming: what is on disk or in a bucket is data, complete, and checked.

A run uses it so, on every process:

    places = Places.of(folder, runs_folder, run_name)
    identity = Identity.of(config, world_size)
    resume = find_resume(places=places, identity=identity, algorithms=..., ...)   # before the Trainer
    if resume.finished: ...                       # nothing is left to train; see `settle`
    interrupt = Interrupt()
    checkpoints = build_checkpoints(places=places, identity=identity, resume=resume, interrupt=interrupt, ...)
    trainer = Trainer(callbacks=[..., checkpoints], spin_dataloaders=False)   # and no load_path: `before_load` restores
    interrupt.install()                           # after the Trainer, whose import installs handlers too
    trainer.fit()                                 # raises Interrupted, whose `status` is the exit status
    if not checkpoints.finish(): ...              # exit status EXIT_NOT_UPLOADED

A checkpoint is `ep003-ba000123.safetensors` (format.py) with `ep003-ba000123.json` beside it, the manifest, without
which it does not count.
"""
