"""Made-up samples and batches of an evaluation."""

from collections.abc import Sequence

from megatron_dms.evaluation.samples import Batch, Chain, Sample


def sample(id: str, texts: Sequence[str], batch: Batch, first: int = 1) -> Sample:
    """Return a sample whose chains cost first, first + 1, ...; the first one was cut off and loops."""
    chains = [
        Chain(text, n, n > first, n == first, 10.0 * n, 100 * n, 1000.0 * n)
        for n, text in enumerate(texts, first)
    ]
    return Sample(id, chains, batch)


def batch(index: int = 0, problems: int = 1, seconds: float = 1.0, fraction: float = 0.5) -> Batch:
    """Return a batch that decided about 30 pairs per head."""
    return Batch(index, problems, seconds, fraction, decided=30, peak_bytes=100)
