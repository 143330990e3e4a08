"""The techniques: each is a module and a card (`NAME.py`, `NAME.md`); `config.py` has their fields and the index."""


def bare_name(name: str) -> str:
    """A tensor's name without the prefixes of DDP, Composer's model and torch.compile."""
    while name.startswith(("module.", "_orig_mod.")):
        name = name.partition(".")[2]
    return name
