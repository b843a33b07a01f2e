"""Bootstrap over prompts, the same draws for every stage."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def bootstrap_weights(n_samples: int, draws: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the weights of S samples in D draws with replacement, shape (D, S); each row sums to 1."""
    return rng.multinomial(n_samples, np.full(n_samples, 1 / n_samples), size=draws) / n_samples
