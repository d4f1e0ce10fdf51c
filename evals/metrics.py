"""Numbers about sets of features: diversity (Vendi), distance of distributions (Frechet), precision and coverage.

All of them see features alone, whatever made them, in float64. Each answers another question: the Frechet distance
whether two sets have the same mean and covariance, precision whether what is drawn could be real, coverage whether what
is real is drawn. A blurred model loses precision, a collapsed one coverage; both raise the Frechet distance. The Vendi
score is the effective number of different samples in a set and needs no reference; of video files it is taken over
pixels and over Inception features, key frame by key frame (Eq. 17), with the conventions of the package vendi-score.
"""

import math
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.models import inception_v3
from torchvision.transforms.v2 import functional as v2
from tqdm import tqdm

from common import UserError
from video import VIDEOS, read_video


def _rows(x):
    x = torch.as_tensor(x).detach().cpu().double()
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"features are (n, d) with n >= 1, got {tuple(x.shape)}")
    return x


def vendi_kernel(K):
    """Effective number of different items, 1..n, of a similarity matrix K (n, n), symmetric with ones on its diagonal.

    exp of the entropy of the eigenvalues of K / n (the paper's Eq. 17; Friedman & Dieng, arXiv:2210.02410).
    Raises ValueError for a K that is not square and symmetric with a unit diagonal.
    """
    K = _rows(K)
    square = K.shape[0] == K.shape[1]
    if not (square and (K - K.T).abs().max() <= 1e-4 and (K.diagonal() - 1).abs().max() <= 1e-4):  # NaN is neither
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
    cov_a, cov_b = torch.cov(a.T), torch.cov(b.T)
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # tr (A B)^(1/2) = tr (A^(1/2) B A^(1/2))^(1/2), of a symmetric matrix
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def jackknife(statistic, *sets, groups=10):
    """Standard error of statistic(*sets) by leaving out one of `groups` interleaved parts of all sets at a time."""
    n = min(map(len, sets))
    if n < 2 * groups:
        return float("nan")
    keep = torch.arange(n) % groups
    values = [statistic(*(_rows(s)[:n][keep != g] for s in sets)) for g in range(groups)]
    values = torch.tensor(values, dtype=torch.float64)
    return float(((groups - 1) * values.var(correction=0)).sqrt())


def neighbours(real, fake, k=5):
    """Precision and coverage of fake (m, d) against real (n, d) by balls around reals that reach to the k-th neighbour.

    precision: share of fakes in the ball of some real (Kynkaanniemi et al., arXiv:1904.06991); coverage: share of reals
    whose own ball holds a fake (Naeem et al., arXiv:2002.09797). Raises ValueError for k or fewer reals.
    """
    real, fake = _rows(real), _rows(fake)
    if len(real) <= k:
        raise ValueError(f"{k} neighbours need more than {k} rows")
    reach = torch.cdist(real, real).kthvalue(k + 1, dim=1).values  # the nearest of all is the point itself
    inside = (torch.cdist(real, fake) <= reach[:, None]).double()  # (n, m)
    return {"precision": inside.amax(0).mean().item(), "coverage": inside.amax(1).mean().item()}


def mean_error(values):
    """Mean and standard error of a list of numbers, NaN left out: {"mean", "error", "n"}."""
    x = torch.as_tensor(values, dtype=torch.float64)
    x = x[~x.isnan()]
    error = (x.std() / len(x) ** 0.5).item() if len(x) > 1 else float("nan")
    return {"mean": x.mean().item() if len(x) else float("nan"), "error": error, "n": len(x)}


def pm(score, scale=1.0, digits=1):
    """A score and its standard error: 91.2±0.6."""
    if not score or score["mean"] is None or not math.isfinite(score["mean"]):
        return "-"
    error = score.get("error")
    known = error is not None and math.isfinite(error)
    mean = round(scale * score["mean"], digits) + 0.0  # never -0.0
    return f"{mean:.{digits}f}" + (f"±{scale * error:.{digits}f}" if known else "")


# ---------------------------------------------------------------------------------------------------------------------
# diversity of video files


def pixel_features(pictures):
    """uint8 pictures (n, H, W, 3) -> (n, 3072): resized to 32x32 (bicubic, the shape is not kept), flattened."""
    small = [v2.resize(Image.fromarray(p), [32, 32], v2.InterpolationMode.BICUBIC) for p in pictures]
    return np.stack([np.asarray(image).flatten() for image in small])


class Inception:
    """torchvision's Inception v3 up to its pooled features (not the one of FID). weights: inception_v3_google-*.pth.

    Raises UserError for a file that is missing or does not hold these weights.
    """

    def __init__(self, weights, device="cpu"):
        self.device = device
        self.model = inception_v3(weights=None, transform_input=True, aux_logits=True, init_weights=False)
        try:
            self.model.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
        except Exception as e:  # missing, no pickle, another network
            reason = str(e).splitlines()[0]
            raise UserError(f"{weights} does not hold torchvision's Inception v3 (IMAGENET1K_V1): {reason}") from e
        self.model.fc = torch.nn.Identity()
        self.model.to(device).eval()

    @torch.no_grad()
    def __call__(self, pictures):
        """uint8 pictures (n, H, W, 3) -> (n, 2048). Like vendi-score, without ImageNet's normalisation."""
        # Pillow's own resizing, as there: the shorter side becomes 299, then the centre
        x = [v2.center_crop(v2.resize(Image.fromarray(picture), [299]), [299]) for picture in pictures]
        x = torch.stack([v2.pil_to_tensor(image) for image in x]) / 255
        return self.model(x.to(self.device)).float().cpu()


def video_diversity(videos, features, every=20):
    """Eq. 17 for the videos of one prompt: Vendi over them at frames 0, every, 2 every, ..., and the mean over these.

    videos: uint8 (F, H, W, 3) each; frames beyond the shortest are not compared. -> 1..n
    """
    length = min(map(len, videos))
    return float(np.mean([vendi(features(np.stack([v[k] for v in videos]))) for k in range(0, length, every)]))


def diversity_of_folder(folder, kinds, copies, every, prompts, seed):
    """Eq. 17 for the prompts of a folder of videos PROMPT-0, PROMPT-1, ...: `copies` videos each.

    kinds: {name: function of pictures that gives features}; every: as `video_diversity`; prompts: at most so many,
    drawn at random by `seed`. -> ({name: a list of scores}, the number of prompts left out, since videos are missing
    or broken). Raises UserError where no prompt is left.
    """
    groups = {}
    for file in sorted(f for f in Path(folder).rglob("*") if f.suffix.lower() in VIDEOS):
        groups.setdefault(re.sub(r"-\d+$", "", str(file.with_suffix(""))), []).append(file)
    names = sorted(name for name, files in groups.items() if len(files) >= copies)
    random.Random(f"vendi {seed}").shuffle(names)
    scores, left_out = {kind: [] for kind in kinds}, len(groups) - len(names)
    for name in tqdm(names[:prompts], desc="vendi", dynamic_ncols=True, leave=False):
        try:
            clips = [read_video(file)[0] for file in groups[name][:copies]]
        except UserError as e:
            print(f"{e}: its prompt is left out", file=sys.stderr)
            left_out += 1
            continue
        for kind, features in kinds.items():
            scores[kind].append(video_diversity(clips, features, every))
    if not any(scores.values()):
        raise UserError(f"{folder} has no prompt with {copies} readable videos PROMPT-0 .. PROMPT-{copies - 1}")
    return scores, left_out
