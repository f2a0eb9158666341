"""SciPy's sparse matrices, or an error that names the extra to install."""

try:
    from scipy import sparse as sparse
except ImportError as error:
    raise ImportError("fluxmatching.velocity needs SciPy: pip install 'fluxkernels[rna]'") from error
