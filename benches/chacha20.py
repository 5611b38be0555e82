"""The random numbers that promptweave takes (rand_chacha's ChaCha20 from a seed of 64 bits), so that another program can
begin with the same prompt and take the same batches."""

import itertools
import struct

MASK = 0xFFFFFFFF
COLUMNS = [(0, 4, 8, 12), (1, 5, 9, 13), (2, 6, 10, 14), (3, 7, 11, 15)]
DIAGONALS = [(0, 5, 10, 15), (1, 6, 11, 12), (2, 7, 8, 13), (3, 4, 9, 14)]


def words(seed):
    """Numbers of 32 bits, without end."""
    key = list(itertools.islice(expanded(seed), 8))
    constants = struct.unpack("<4I", b"expand 32-byte k")
    for block in itertools.count():
        yield from chacha20([*constants, *key, block & MASK, block >> 32, 0, 0])


def expanded(state):
    """A key's words from a seed: PCG32, as rand_core has it."""
    while True:
        state = (state * 6364136223846793005 + 11634580027462260723) % 2**64
        mixed = ((state >> 18 ^ state) >> 27) & MASK
        rotation = state >> 59
        yield (mixed >> rotation | mixed << (32 - rotation)) & MASK


def chacha20(block):
    state = list(block)

    def turn(to, by, on, left):
        state[to] = (state[to] + state[by]) & MASK
        mixed = state[on] ^ state[to]
        state[on] = (mixed << left | mixed >> (32 - left)) & MASK

    for _ in range(10):
        for a, b, c, d in COLUMNS + DIAGONALS:
            turn(a, b, d, 16)
            turn(c, d, b, 12)
            turn(a, b, d, 8)
            turn(c, d, b, 7)
    return [(x + y) & MASK for x, y in zip(state, block)]


def uniform(seed, count):
    """In [-1, 1]."""
    return [2 * (word / MASK) - 1 for word in itertools.islice(words(seed), count)]


def shuffles(n, seed):
    """0..n in random orders, without end (Fisher-Yates, two words a number)."""
    numbers = words(seed)
    while True:
        order = list(range(n))
        for last in range(n - 1, 0, -1):
            low, high = next(numbers), next(numbers)
            at = (low | high << 32) % (last + 1)
            order[last], order[at] = order[at], order[last]
        yield order
