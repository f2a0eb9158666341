"""Independent truths: NumPy in extended precision, term by term, and closed forms. They import no package of ours."""

import numpy as np

Array = np.ndarray


def _pairs(z: Array, refs: Array) -> tuple[Array, Array]:
    """Differences r_j - z_n `[N, M, D]` and squared distances `[N, M]`, in extended precision."""
    z, refs = z.astype(np.longdouble), refs.astype(np.longdouble)
    difference = refs[None] - z[:, None]
    return difference, (difference**2).sum(-1)


def kde_weights(z: Array, refs: Array, sigma2: float) -> tuple[Array, Array, Array, Array]:
    """(w, a, r_j - z_n, log Σ exp) of one group; w_nj = softmax_j(-a_nj/2σ²)."""
    difference, a = _pairs(z, refs)
    logits = -a / (2 * np.longdouble(sigma2))
    top = logits.max(-1, keepdims=True)
    w = np.exp(logits - top)
    total = w.sum(-1, keepdims=True)
    return w / total, a, difference, (top + np.log(total))[:, 0]


def kde_shift(z: Array, refs: Array, sigma2: float) -> Array:
    """m(z) - z."""
    w, _, difference, _ = kde_weights(z, refs, sigma2)
    return np.einsum("nm,nmd->nd", w, difference)


def kde_score(z: Array, refs: Array, sigma2: float) -> Array:
    return kde_shift(z, refs, sigma2) / np.longdouble(sigma2)


def kde_mean(z: Array, refs: Array, sigma2: float) -> Array:
    return z.astype(np.longdouble) + kde_shift(z, refs, sigma2)


def kde_log_density(z: Array, refs: Array, sigma2: float) -> Array:
    _, _, _, normalizer = kde_weights(z, refs, sigma2)
    M, D = refs.shape
    return normalizer - np.log(np.longdouble(M)) - 0.5 * D * np.log(2 * np.longdouble(np.pi) * np.longdouble(sigma2))


def kernel_average(z: Array, refs: Array, sigma2: float, values: Array, log_weights: Array) -> Array:
    """Average of values under weights softmax_j(b_j - |z - r_j|²/2σ²)."""
    _, a = _pairs(z, refs)
    logits = log_weights.astype(np.longdouble) - a / (2 * np.longdouble(sigma2))
    w = np.exp(logits - logits.max(-1, keepdims=True))
    return (w / w.sum(-1, keepdims=True)) @ values.astype(np.longdouble)


def langevin_chain(x0: Array, refs: Array, sigma2: float, tau: float, noise: Array) -> Array:
    """Eq. 8 with the given noise `[K, N, D]`, as printed: x ← μ + ρ (x - μ) + σ√(1-ρ²) ξ."""
    x = x0.astype(np.longdouble)
    rho = np.exp(-np.longdouble(tau) / len(noise))
    for xi in noise.astype(np.longdouble):
        mu = x + kde_shift(x, refs, sigma2)
        x = mu + rho * (x - mu) + np.sqrt(np.longdouble(sigma2) * (1 - rho**2)) * xi
    return x


def transition_weights(x0: Array, xt: Array, refs: Array, sigma2: float, tau: float) -> Array:
    """Eq. 52, softmax over the starts i; τ = 0 gives each end to its nearest start."""
    mu = x0.astype(np.longdouble) - np.expm1(-np.longdouble(tau)) * kde_shift(x0, refs, sigma2)
    _, a = _pairs(xt, mu)
    if tau == 0:
        w = (a == a.min(-1, keepdims=True)).astype(np.longdouble)
        return (w / w.sum(-1, keepdims=True)).T
    variance = -np.longdouble(sigma2) * np.expm1(-2 * np.longdouble(tau))
    logits = -a / (2 * variance)
    w = np.exp(logits - logits.max(-1, keepdims=True))
    return (w / w.sum(-1, keepdims=True)).T


def transition_average(x0: Array, xt: Array, values: Array, refs: Array, sigma2: float, tau: float) -> Array:
    """Eq. 9: values of the ends `[E, V]`, averaged for each start."""
    return transition_weights(x0, xt, refs, sigma2, tau) @ values.astype(np.longdouble)


def residual_gradient(z: Array, field: Array, refs: Array, sigma2: float, factor: float = 1.0) -> Array:
    """J_s f - c ∇(Δp̂/p̂) from the covariances of the design's closed form, written out."""
    w, a, difference, _ = kde_weights(z, refs, sigma2)
    s2 = np.longdouble(sigma2)
    shift = np.einsum("nm,nmd->nd", w, difference)
    e = difference - shift[:, None]
    covariance_f = np.einsum("nm,nmd,nm->nd", w, e, np.einsum("nmd,nd->nm", e, field.astype(np.longdouble)))
    covariance_a = np.einsum("nm,nmd,nm->nd", w, e, a)
    return (covariance_f / s2 - field) / s2 - np.longdouble(factor) * (-2 * shift + covariance_a / s2) / s2**2


def relative_error(got: Array, truth: Array) -> float:
    """|got - truth| / |truth| in the Euclidean norm; the plain norm of the error where the truth is zero."""
    truth = np.asarray(truth, dtype=np.longdouble)
    error = np.linalg.norm((np.asarray(got, dtype=np.longdouble) - truth).ravel().astype(float))
    norm = np.linalg.norm(truth.ravel().astype(float))
    return float(error / norm) if norm else float(error)


def gaussian_flux_loss(u: Array) -> float:
    """E ℓ for p̂ = N(0, σ²I), f = -x/σ² + Ux, τ ~ U[0, 4]: 2(1-e⁻⁸)|(U+Uᵀ)/2|²_F, whatever σ."""
    symmetric = (u + u.T) / 2
    return float(-2 * np.expm1(-8.0) * (symmetric**2).sum())
