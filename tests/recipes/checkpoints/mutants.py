"""`python -m tests.recipes.checkpoints.mutants FILE COUNT`: read that many changed copies of a checkpoint.

Each has a manifest that is true to it, as somebody with the bucket's keys could write. A copy must be refused in one
line or load; what loads is packed and read again and must be the same. The process may take three times the file's
bytes, and 8 MB, beyond what it has when it begins: an allocation beyond that ends it with a traceback or a signal.
"""

import json
import random
import resource
import sys
from pathlib import Path

from recipes.checkpoints.format import pack, unpack
from recipes.checkpoints.manifest import DamagedError

STRANGE = [None, True, -1, 0, 1.5, 10**30, "", "x" * 200, "\ud800", [], {}, [[]], {"$tensor": "x"}, {"$tuple": [1]}]
STRANGE += [{"$dict": [["a", 1]]}, {"$float": "nan"}, {"$timedelta": 1}, {"$array": "x"}, {"$evil": 0}, {"": ""}]


def split(data):
    """A file's header and what follows it."""
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header, rest):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + rest


def tree_of(data):
    header, rest = split(data)
    begin, end = header["tree.json"]["data_offsets"]
    return json.loads(rest[begin:end])


def with_tree(data, tree):
    """The file with other bytes for its tree, and offsets that fit them."""
    header, rest = split(data)
    pieces, end = [], 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        piece = tree if name == "tree.json" else rest[slice(*entry["data_offsets"])]
        entry["data_offsets"] = [end, end + len(piece)]
        if name == "tree.json":
            entry["shape"] = [len(piece)]
        pieces.append(piece)
        end += len(piece)
    return join(header, b"".join(pieces))


def mutate(data: bytes, drawn: random.Random) -> bytes:
    """Bytes changed, cut, put in and repeated."""
    changed = bytearray(data)
    for _ in range(drawn.choice([1, 1, 2, 8, 64])):
        kind, at = drawn.randrange(4), drawn.randrange(len(changed))
        if kind == 0:
            changed[at] ^= 1 << drawn.randrange(8)
        elif kind == 1:
            del changed[at : at + drawn.randrange(1, 64)]
        elif kind == 2:
            changed[at:at] = drawn.randbytes(drawn.randrange(1, 64))
        else:
            start = drawn.randrange(len(changed))
            changed[at : at + 32] = changed[start : start + 32]
        if not changed:
            return b"\0"
    return bytes(changed)


def mutate_json(node, drawn):
    """One node somewhere below replaced, removed, doubled or moved."""
    parent, place = None, node
    while isinstance(place, dict | list) and place and (parent is None or drawn.random() < 0.85):
        key = drawn.choice(list(place) if isinstance(place, dict) else range(len(place)))
        parent, place = place, place[key]
    action = drawn.randrange(4)
    if parent is None:
        return drawn.choice(STRANGE)
    if action == 0:
        parent[key] = drawn.choice(STRANGE)
    elif action == 1:
        del parent[key]
    elif isinstance(parent, list):
        parent.append(parent[key])
    else:
        new = f"{key}2" if action == 2 else drawn.choice(["$tuple", "$tensor", "repr", "apply"])
        parent[new] = parent[key] if action == 2 else parent.pop(key)
    return node


def mutant(original, drawn):
    kind = drawn.randrange(5)
    size = 8 + int.from_bytes(original[:8], "little")
    if kind == 0:  # anywhere: mostly in the weights
        return mutate(original, drawn)
    if kind == 1:  # the header's bytes, with a length that fits
        text = mutate(original[8:size], drawn)
        return len(text).to_bytes(8, "little") + text + original[size:]
    if kind == 2:
        header, rest = split(original)
        return join(mutate_json(header, drawn), rest)
    if kind == 3:
        return with_tree(original, mutate(json.dumps(tree_of(original)).encode(), drawn))
    return with_tree(original, json.dumps(mutate_json(tree_of(original), drawn)).encode())


def main():
    path, count = sys.argv[1], int(sys.argv[2])
    original = Path(path).read_bytes()
    drawn = random.Random(0)
    unpack(original)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    bound = pages * resource.getpagesize() + len(original) + 3 * len(original) + 8 * 2**20  # with the mutant itself
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    refused, loaded, longest = 0, 0, 0
    for _ in range(count):
        data = mutant(original, drawn)
        resource.setrlimit(resource.RLIMIT_AS, (bound, hard))
        try:
            content = unpack(data)
        except DamagedError as error:
            if "\n" in str(error):
                raise
            refused, longest = refused + 1, max(longest, len(str(error)))
            continue
        finally:
            resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        first = b"".join(pack(content))
        assert b"".join(pack(unpack(first))) == first
        loaded += 1
    print(json.dumps({"refused": refused, "loaded": loaded, "longest": longest}))


if __name__ == "__main__":
    main()
