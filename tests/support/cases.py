"""The adversarial inputs that every backend has to get right, one list for all tests and tables.

Each case is drawn from its own seed and rounded to float32, so that the truth is that of the numbers a kernel sees.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Case:
    """One group of N queries and M reference points in D dimensions.

    Attributes:
        offset: common translation of queries and reference points.
        spread: standard deviation of the reference points about it.
        duplicates: each reference point (and query) occurs this often.
        far: distance of the queries from the cloud of reference points, in units of its spread.
        outlier: distance of the first reference point from the others, in units of their spread.
        clusters: standard deviation of four clusters, whose centers have the given spread, or 0 for no clusters.
        pixels: whether the reference points are whole numbers from 0 to 255.
        tau: horizon of the chain and the transition.
        drawn_as: the first name of a renamed case; its numbers come from that name.
    """

    name: str
    N: int = 33
    M: int = 65
    D: int = 2
    sigma2: float = 0.1
    offset: float = 0.0
    spread: float = 1.0
    duplicates: int = 1
    far: float = 0.0
    outlier: float = 0.0
    clusters: float = 0.0
    pixels: bool = False
    tau: float = 1.0
    drawn_as: str | None = None

    def arrays(self) -> dict[str, np.ndarray]:
        """float32 arrays: refs `[M, D]`, z and field `[N, D]`, noise `[4, N, D]`."""
        name = self.drawn_as or self.name
        rng = np.random.default_rng([len(name), *name.encode()])
        refs = self.offset + self.spread * rng.standard_normal((self.M, self.D))
        refs = np.repeat(refs, self.duplicates, axis=0)[: self.M]
        refs[0] += self.outlier * self.spread
        if self.clusters:
            refs = refs[np.arange(self.M) % 4] + self.clusters * rng.standard_normal(refs.shape)
        if self.pixels:
            refs = np.clip(np.round(127 + 64 * refs), 0, 255)
        # As in training: the queries are noised reference points.
        z = (
            refs[np.arange(self.N) % self.M]
            + np.sqrt(self.sigma2) * np.repeat(rng.standard_normal((self.N, self.D)), self.duplicates, axis=0)[: self.N]
        )
        z = z + self.far * self.spread
        arrays = {
            "refs": refs,
            "z": z,
            "field": rng.standard_normal((self.N, self.D)),
            "noise": rng.standard_normal((4, self.N, self.D)),
        }
        return {key: value.astype(np.float32) for key, value in arrays.items()}


CASES = [
    Case("plain"),
    Case("offset 1000, spread 1", offset=1e3),
    Case("offset 1000, D = 200", offset=1e3, D=200, sigma2=40.0),
    Case("sigma2 = 4e-6", sigma2=4e-6, offset=1.0, spread=0.005),
    Case("sigma2 = 4e-6, spread 1", sigma2=4e-6),
    Case("sigma2 = 4e-6, D = 3072", sigma2=4e-6, D=3072, N=9, M=17, offset=1.0, spread=8e-5),
    Case("sigma2 = 6400", sigma2=6400.0),
    Case("sigma2 = 6400, D = 3072", sigma2=6400.0, D=3072, N=9, M=17),
    Case("duplicates", duplicates=5),
    Case("duplicates, D = 17, sigma2 = 4e-6", duplicates=5, D=17, sigma2=4e-6),
    Case("M = 1", M=1),
    Case("N = 1", N=1),
    Case("N = M = 1, D = 1", N=1, M=1, D=1),
    *(Case(f"D = {d}", D=d, sigma2=0.3 * d) for d in (1, 3, 7, 16, 17, 200)),
    Case("D = 3072", D=3072, N=17, M=33, sigma2=300.0),
    Case("sizes of no tile", N=129, M=257, D=3),
    Case("M much larger than N", N=3, M=20011, D=2, sigma2=0.01),
    Case("rows of one group split", N=40, M=5003, D=5),
    Case("far queries", far=30.0, sigma2=0.01),
    Case("tau = 0", tau=0.0),
    Case("tau = 0, duplicates, D = 17", tau=0.0, duplicates=5, D=17),
    Case("tau = 1e-6", tau=1e-6),
    Case("tau = 1e-6, D = 200", tau=1e-6, D=200, sigma2=40.0),
    Case("tau = 4", tau=4.0),
    # Compiled kernels change their layout above D = 24 and cut reference points into tiles: 168 of them at D = 24, 816
    # at D = 5, 1024 at D = 1 and 2, 256 above D = 24.
    *(Case(f"D = {d}, M = {m}", D=d, M=m, sigma2=0.3 * d) for d in (24, 25) for m in (7, 8, 168, 169, 256, 257, 513)),
    *(Case(f"D = {d}, M = {m}", D=d, M=m, sigma2=0.3) for d, m in ((1, 1024), (2, 1025), (5, 816), (5, 817))),
    # From M = 64 on they sort the reference points of a wide group into cells and look at a window of them.
    *(Case(f"windows, M = {m}", M=m, sigma2=1e-4) for m in (63, 64, 65, 1025)),
    *(Case(f"windows, D = {d}", M=300, D=d, sigma2=1e-3) for d in (1, 3, 24)),
    Case("windows, offset 1000", M=300, offset=1e3, sigma2=1e-3),
    Case("windows, duplicates", M=300, duplicates=7, sigma2=1e-4),
    Case("windows, far queries", M=300, far=3.0, sigma2=0.01),
    Case(
        "windows, more queries than reference points",
        N=200,
        M=100,
        sigma2=0.01,
        drawn_as="windows, more queries than centres",
    ),
    Case("windows, one far outlier", M=300, outlier=1e4, sigma2=0.1),
    Case("windows, one far outlier, tau = 4", M=300, outlier=1e4, sigma2=0.1, tau=4.0),
    # Triton's kernels for many dimensions round coordinates to 31 bits of the largest one.
    *(
        Case(f"clusters of size {s}, D = 40", N=9, M=40, D=40, clusters=s, spread=10.0, sigma2=s * s)
        for s in (0.1, 1e-3)
    ),
    Case("clusters of size 0.01, one far outlier, D = 20", N=9, M=33, D=20, clusters=0.01, outlier=1e3, sigma2=1e-4),
    Case("an outlier as first point, D = 30", N=9, M=33, D=30, outlier=100.0, sigma2=9.0),
    Case("a far outlier as first point, D = 20", N=9, M=33, D=20, outlier=1e3, sigma2=0.3, tau=0.5),
    Case("duplicates, sigma2 = 9, D = 20", N=10, M=40, D=20, duplicates=4, sigma2=9.0),
    Case("pixels, D = 48", N=9, M=33, D=48, pixels=True, sigma2=2500.0),
    Case("pixels, sigma2 = 1, D = 48", N=9, M=33, D=48, pixels=True, sigma2=1.0),
    Case("all reference points equal", M=100, spread=0.0, offset=1.0, drawn_as="all centres equal"),
    Case(
        "all reference points but one equal",
        M=100,
        duplicates=100,
        outlier=50.0,
        drawn_as="all centres but one equal",
    ),
]
