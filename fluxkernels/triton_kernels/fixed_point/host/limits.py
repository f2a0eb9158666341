"""Sizes of tiles and blocks, and what fits in memory and in 32 and 64 bits."""

from typing import NamedTuple

# Pairs whose matrices are held at once: 256 MiB of products, as much for weights, and 16 bytes more per pair for
# derivatives. With a quarter of it, many launches of few queries take 1.2 times as long.
MOST_PAIRS = 2**25
# Products of chains in Gram space that are held at once: 1 GiB.
MOST_PRODUCTS = 2**27
# Words of points of chains that are held at once: 2 GiB.
MOST_WORDS = 2**29
# Reference points up to which a chain runs in Gram space, where a step costs M² per query instead of M·D.
MOST_REFS = 1024
# Dimensions up to which sums of products of words fit in 64 bits.
MOST_DIMENSIONS = 2**16
CHAINS_OF_PROGRAM = 16  # chains that one program runs together
# (queries, reference points) from which sums over reference points are worth a copy of their words by columns.
LEAST_BY_COLUMNS = 128, 4096
DEPTH = 64  # terms of a tile at once
LONGEST = 2**15  # terms whose sums of products of digits fit in 32 bits
MOST_SPLITS = 8
EXTENTS = 512  # partial maxima per group
# Numbers of the tile of a program that walks along rows of pairs: with fewer reference points than the second, and with
# as many or more.
SMALL_TILE, LARGE_TILE = 512, 4096


class Tile(NamedTuple):
    """A tile of the product, and how it is computed.

    Attributes:
        memory: bytes of shared memory.
        resident: programs that run on a multiprocessor of an H200 at once.
        time: relative time of the same work.
    """

    rows: int
    columns: int
    num_warps: int
    num_stages: int
    memory: int
    resident: int
    time: float


# The larger tile loads fewer words and takes 0.72 times as long on an H200; but many tiles are needed to fill a GPU,
# and where terms are rows of the arrays it takes 1.3 times as long.
TILES = (Tile(32, 64, 4, 3, 49152, 4, 1.0), Tile(128, 64, 8, 4, 163840, 1, 0.72))
