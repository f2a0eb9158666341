"""FID and Inception score by torch-fidelity, if it is installed and the Inception network's weights are available."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from experiments.common.registry import UsageError

ADVICE = "set fid=false, and the distance on random convolutions remains"


def check(weights: str) -> None:
    """Download the weights if needed; raise UsageError with advice if they or torch-fidelity are not available."""
    _load()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    if weights and not Path(weights).is_file():
        raise UsageError(f"no file {weights} with the Inception network's weights; leave it empty to download them")
    try:
        FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights or None)
    except Exception as error:  # whatever a download or a damaged file raises
        raise UsageError(
            f"the Inception network's weights cannot be had ({type(error).__name__}: {error}); give their file by "
            f"inception_weights=FILE, or {ADVICE}"
        ) from error


def fid_and_inception_score(samples: Tensor, real: Tensor, weights: str, device: torch.device) -> tuple[float, float]:
    """FID of samples against real images, and their Inception score, by the usual TensorFlow Inception network.

    Args:
        samples, real: bytes `[n, 3, size, size]`.
        weights: file of torch-fidelity's `weights-inception-2015-12-05`; empty takes the download of `check`.
        device: device of the network.
    """
    found = _load()(
        input1=_Pictures(samples),
        input2=_Pictures(real),
        fid=True,
        isc=True,
        cuda=device.type == "cuda",
        batch_size=100,
        verbose=False,
        feature_extractor_weights_path=weights or None,
        isc_splits=min(10, len(samples)),
    )
    return found["frechet_inception_distance"], found["inception_score_mean"]


class _Pictures(TensorDataset):
    """Images as tensors; a TensorDataset alone would return tuples of one."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)[0]


def _load() -> Any:
    try:
        from torch_fidelity import calculate_metrics
    except (ImportError, RuntimeError) as error:  # torchvision of another PyTorch raises RuntimeError
        raise UsageError(
            f"FID and Inception score need torch-fidelity, which cannot be imported ({error}): "
            f"pip install 'fluxkernels[fid]', or {ADVICE}"
        ) from error
    return calculate_metrics
