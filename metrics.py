"""Numbers about sets of features: diversity (Vendi), distance of distributions (Frechet), precision and coverage.

All of them see features alone, whatever made them, in float64. Each answers another question: the Frechet distance
whether two sets have the same mean and covariance, precision whether what is drawn could be real, coverage whether what
is real is drawn. A blurred model loses precision, a collapsed one coverage; both raise the Frechet distance. The Vendi
score is the effective number of different samples in a set and needs no reference.
"""

import numpy as np
import torch


def _rows(x):
    x = torch.as_tensor(np.asarray(x) if not torch.is_tensor(x) else x).detach().cpu().double()
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"features are (n, d) with n >= 1, got {tuple(x.shape)}")
    return x


def vendi_kernel(K):
    """Effective number of different items, 1..n, of a similarity matrix K (n, n), symmetric with ones on its diagonal.

    exp of the entropy of the eigenvalues of K / n (the paper's Eq. 17; Friedman & Dieng, arXiv:2210.02410).
    Raises ValueError for a K that is not square and symmetric with a unit diagonal.
    """
    K = _rows(K)
    if K.shape[0] != K.shape[1] or (K - K.T).abs().max() > 1e-4 or (K.diagonal() - 1).abs().max() > 1e-4:
        raise ValueError(f"K must be square and symmetric with ones on its diagonal, got {tuple(K.shape)}")
    p = torch.linalg.eigvalsh(K / len(K))
    p = p[p > 0]  # rounding leaves a few just below 0
    return float(torch.exp(-(p * p.log()).sum()))


def vendi(features):
    """Vendi score of features (n, d) under the cosine kernel: rows are normalised, not centred. Array or tensor."""
    x = _rows(features)
    norm = x.norm(dim=1, keepdim=True)
    if (norm == 0).any() or not torch.isfinite(norm).all():
        raise ValueError("a row of features is zero or not finite: its direction is not defined")
    x = x / norm
    return vendi_kernel(x @ x.T)


def frechet(a, b):
    """Frechet distance of the Gaussians fitted to features a (n, d) and b (m, d) (no root taken, as in FID and FVD).

    |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^(1/2)). Finite sets make it too large by about d^2-over-n terms, so compare
    it at equal n only. Raises ValueError for fewer than two rows.
    """
    a, b = _rows(a), _rows(b)
    if min(len(a), len(b)) < 2:
        raise ValueError("a covariance needs at least two rows")
    return frechet_gaussian(a.mean(0), torch.cov(a.T).reshape(a.shape[1], -1), b.mean(0), torch.cov(b.T))


def frechet_gaussian(mean_a, cov_a, mean_b, cov_b):
    """The same from means (d,) and covariances (d, d). tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2): symmetric."""
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b.reshape(root.shape) @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.reshape(root.shape).trace() - 2 * cross)


def jackknife(statistic, *sets, groups=10):
    """Standard error of statistic(*sets) by leaving out one of `groups` interleaved parts of all sets at a time."""
    n = min(map(len, sets))
    if n < 2 * groups:
        return float("nan")
    keep = torch.arange(n) % groups
    values = torch.tensor([statistic(*(_rows(s)[:n][keep != g] for s in sets)) for g in range(groups)]).double()
    return float(((groups - 1) * values.var(correction=0)).sqrt())


def neighbours(real, fake, k=5):
    """Precision, recall and coverage of fake (m, d) against real (n, d) by balls that reach to the k-th neighbour.

    precision: share of fakes in the ball of some real (Kynkaanniemi et al., arXiv:1904.06991); recall: share of reals
    in the ball of some fake; coverage: share of reals whose own ball holds a fake (Naeem et al., arXiv:2002.09797),
    which outliers among the fakes cannot raise. Raises ValueError for k or fewer rows.
    """
    real, fake = _rows(real), _rows(fake)
    if min(len(real), len(fake)) <= k:
        raise ValueError(f"{k} neighbours need more than {k} rows")
    reach = lambda x: torch.cdist(x, x).kthvalue(k + 1, dim=1).values  # the nearest of all is the point itself
    between = torch.cdist(real, fake)  # (n, m)
    inside_real, inside_fake = between <= reach(real)[:, None], between <= reach(fake)
    share = lambda hits: hits.double().mean().item()
    return {
        "precision": share(inside_real.any(0)),
        "recall": share(inside_fake.any(1)),
        "coverage": share(inside_real.any(1)),
    }


def mean_error(values):
    """Mean and standard error of a list of numbers, NaN left out: {"mean", "error", "n"}."""
    x = torch.as_tensor(values, dtype=torch.float64)
    x = x[~x.isnan()]
    error = (x.std() / len(x) ** 0.5).item() if len(x) > 1 else float("nan")
    return {"mean": x.mean().item() if len(x) else float("nan"), "error": error, "n": len(x)}
