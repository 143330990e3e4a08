"""One room per technique; `config.py` is the index that knows them all."""
